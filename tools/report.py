#!/usr/bin/env python
"""`bissl report` in a checkout."""

import sys

from bissl_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
