"""What a person looks at: heatmaps of a pair, a gallery of queries, and one HTML file about an evaluation."""
