#!/usr/bin/env python
"""`bissl search` in a checkout."""

import sys

from bissl_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
