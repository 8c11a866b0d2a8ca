"""Stages, the loop they run in, its hooks, checkpoints and processes."""

#: what data sets are for, in the order in which they are opened
ROLES = ("pretext", "train", "val", "test")
