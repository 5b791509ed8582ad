"""``structmat`` in processes that differ, as if machines did: a program for ``test_cli_ranks``.

The first word says how: ``folders`` for a working folder of each process, ``options`` for other options in the second.
"""

import os
import sys
from pathlib import Path

from structmat.cli import main

if __name__ == "__main__":
    how, *words = sys.argv[1:]
    if how == "folders":
        own = Path(os.environ["RANK"])
        own.mkdir()
        os.chdir(own)
    elif os.environ["RANK"] == "1":
        words = ["9" if word == "8" else word for word in words]
    sys.exit(main(words))
