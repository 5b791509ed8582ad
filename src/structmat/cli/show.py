"""What a command prints: results on standard output, everything else on standard error."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Tell the user what goes on."""
    print(text, file=sys.stderr, flush=True)


def error(text: str) -> None:
    """Tell the user in one line why the command ends."""
    say(f"structmat: {text}")


def warn(text: str) -> None:
    """Warn the user in one line."""
    say(f"warning: {text}")


def count(number: float) -> str:
    """A count with separators."""
    return f"{number:,.0f}"
