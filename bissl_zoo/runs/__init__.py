"""Run directories: layout, checkpoints, lock and listing."""
