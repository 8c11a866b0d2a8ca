#!/usr/bin/env python
"""`bissl predict` in a checkout."""

import sys

from bissl_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
