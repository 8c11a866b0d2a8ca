"""Stages, the loop they run in, its hooks, checkpoints and processes."""
