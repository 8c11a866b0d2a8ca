"""Download, check and pack data sets."""
