"""What a command prints: results on standard output, everything else on standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def say(text: str) -> None:
    """Tell the user what goes on."""
    print(text, file=sys.stderr, flush=True)


def error(text: str) -> None:
    """Tell the user in one line why the command ends."""
    say(f"structmat: {text}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print a table; where it goes to a file or a pipe, every row is one line, however long.

    Args:
        head: Of the columns.
        rows: The cells; a row with nothing but empty cells is a line.
        right: Columns that are aligned to the right.
    """
    columns = list(zip(*([*rows, head]), strict=True))
    wide = sum(max(len(cell) for cell in column) + 3 for column in columns)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=wide)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for k, title in enumerate(head):
        shown.add_column(Text(title), justify="right" if k in right else "left", overflow="fold")
    for row in rows:
        if any(row):
            shown.add_row(*(Text(cell) for cell in row))
        else:
            shown.add_section()
    console.print(shown)


def count(number: float) -> str:
    """A count with separators."""
    return f"{number:,.0f}"
