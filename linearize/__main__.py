"""`python -m linearize`."""

import sys

from linearize.cli import main

if __name__ == "__main__":
    sys.exit(main())
