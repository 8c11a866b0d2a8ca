#!/usr/bin/env python
"""`bissl compare` in a checkout."""

import sys

from bissl_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
