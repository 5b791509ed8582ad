"""What a command prints: results on standard output, everything else on standard error."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def say(text: str) -> None:
    """Tell the user what goes on; of processes that work together, the first one tells."""
    ranks = sys.modules.get("structmat._ranks")  # where nothing has imported it, this process is alone
    if ranks is None or ranks.current().leads:
        _print(text)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def error(text: str) -> None:
    """Tell the user in one line why the command ends."""
    _print(f"structmat: {text}")


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Let warnings of Python be lines without a place in the program, while the context is entered."""

    def line(message: Any, *_: Any, **__: Any) -> str:
        return f"warning: {message}\n"

    before = warnings.formatwarning
    warnings.formatwarning = line
    try:
        yield
    finally:
        warnings.formatwarning = before


def warn(text: str) -> None:
    """Warn the user in one line."""
    say(f"warning: {text}")


def count(number: float) -> str:
    """A count with separators."""
    return f"{number:,.0f}"


def megabytes(size: float) -> str:
    """A number of bytes as text."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def root_mean_square(errors: Sequence[float]) -> float:
    """The root mean square, by which the errors of layers are shown as one; 0 of nothing."""
    return math.sqrt(sum(error**2 for error in errors) / max(1, len(errors)))
