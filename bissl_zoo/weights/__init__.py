"""Weights in and out: files of other projects, and exports of a backbone."""
