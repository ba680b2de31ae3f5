"""`python -m linearize`."""

import sys

from linearize.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
