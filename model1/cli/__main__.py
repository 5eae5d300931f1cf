"""`python -m model1.cli`, for where the `model1` script is not on the path."""

import sys

from model1.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
