"""Checks before a run: the cost of a config, and the correctness of its hypergradient."""
