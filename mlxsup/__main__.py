"""`python -m mlxsup` is `mlxsup`."""

import sys

from mlxsup.cli import main

if __name__ == "__main__":
    sys.exit(main())
