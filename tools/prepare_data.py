#!/usr/bin/env python
"""`bissl data` in a checkout."""

import sys

from bissl_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", *sys.argv[1:]]))
