"""Stages of a run, one file per stage."""
