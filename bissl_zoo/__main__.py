"""`python -m bissl_zoo COMMAND ...` is `bissl COMMAND ...`, for example under torchrun."""

import sys

from bissl_zoo.cli import main

if __name__ == "__main__":
    sys.exit(main())
