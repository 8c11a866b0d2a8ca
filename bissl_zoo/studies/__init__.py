"""Questions that take many runs: searches of settings, and comparisons over seeds and data sets."""
