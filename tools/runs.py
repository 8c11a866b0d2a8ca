#!/usr/bin/env python
"""`bissl runs` in a checkout."""

import sys

from bissl_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main(["runs", *sys.argv[1:]]))
