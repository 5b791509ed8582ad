"""``python -m structmat.cli``, which torchrun can start."""

import sys

from structmat.cli import main

if __name__ == "__main__":
    sys.exit(main())
