"""Data sets, one family per file."""
