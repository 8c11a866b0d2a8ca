#!/usr/bin/env python
"""`bissl train` in a checkout."""

import sys

from bissl_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
