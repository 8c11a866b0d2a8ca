#!/usr/bin/env python
"""`bissl probe` in a checkout."""

import sys

from bissl_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main(["probe", *sys.argv[1:]]))
