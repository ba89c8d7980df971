"""The one exception for mistakes that a person can mend."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, what was expected and what to do.

    `run.py` and the scripts print its text without a traceback and exit with status 2; every other exception is a bug
    of ours and keeps its traceback.
    """
