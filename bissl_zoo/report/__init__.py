"""One HTML file on a run, on several side by side, or on a zoo."""
