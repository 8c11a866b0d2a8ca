"""What a config will cost, and whether its hypergradient is right, before a run."""
