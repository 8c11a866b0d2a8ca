#!/usr/bin/env python
"""`bissl convert` in a checkout."""

import sys

from bissl_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
