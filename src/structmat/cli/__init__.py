"""The command line; ``main`` is what the program ``structmat`` runs.

Importing this package is lean: typer and rich come in when a command runs, torch and transformers when it needs them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

NEEDED = ("typer", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``structmat``.

    Args:
        arguments: The words after the command's name; None for those of the process.

    Returns:
        The exit status: 0, 1 for an error that was explained on standard error, 2 for words that make no command, 130
        for an interrupt.
    """
    try:
        if any(importlib.util.find_spec(name) is None for name in NEEDED):
            print("structmat: the command line needs typer and rich: pip install 'structmat[cli]'", file=sys.stderr)
            return 1
        app = importlib.import_module("structmat.cli.app")
        return app.run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:  # while the program itself is imported
        print("structmat: interrupted", file=sys.stderr)
        return 130
