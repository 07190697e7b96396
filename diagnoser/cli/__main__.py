"""``python -m diagnoser.cli``: the same as ``diagnoser``."""

import sys

from diagnoser.cli import main

if __name__ == "__main__":
    sys.exit(main())
