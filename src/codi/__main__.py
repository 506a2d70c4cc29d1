"""`python -m codi`: the same as the command `codi`."""

import sys

from .apps.cli import main

if __name__ == "__main__":
    sys.exit(main())
