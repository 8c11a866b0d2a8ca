"""Console output: log lines, the live display and metric writers."""
