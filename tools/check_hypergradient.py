#!/usr/bin/env python
"""`bissl check` in a checkout."""

import sys

from bissl_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main(["check", *sys.argv[1:]]))
