"""The reproduction study: study files, the runs they need, and tables and figures of the results."""
