"""Tables of text: one printer for reports, the demo and the command line."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD, Box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PLAIN = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
"""The rule under the head in characters that every encoding has, for files and pipes."""

WIDE = 1_000_000
"""A width that no row exceeds."""


def table_text(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Lay out a table as text in which every row is one line, however long.

    Args:
        head: The titles of the columns.
        rows: The cells of each row; a row of empty cells alone is an empty line.
        right: The indices of the columns that are aligned to the right.

    Returns:
        The lines, without spaces at their ends.

    Example:
        >>> print(table_text(("layer", "size"), [("first", "1"), ("second", "128")], right=[1]))
        layer    size
        -------------
        first       1
        second    128
    """
    file = io.StringIO()
    Console(file=file, width=WIDE, color_system=None, highlight=False).print(_table(head, rows, right, PLAIN))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print a table on standard output: fitted to the terminal, or as ``table_text`` where there is none.

    Args:
        head: The titles of the columns.
        rows: The cells of each row; a row of empty cells alone is an empty line.
        right: The indices of the columns that are aligned to the right.
    """
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(_table(head, rows, right, SIMPLE_HEAD))
    else:
        print(table_text(head, rows, right=right))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int], box: Box) -> Table:
    table = Table(box=box, pad_edge=False, show_edge=False)
    for k, title in enumerate(head):
        table.add_column(Text(title), justify="right" if k in right else "left", overflow="fold")
    for row in rows:
        if any(row):
            table.add_row(*map(Text, row))
        else:
            table.add_section()
    return table


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Lay out a table as Markdown.

    Args:
        head: The titles of the columns.
        rows: The cells of each row.
        right: The indices of the columns that are aligned to the right.

    Returns:
        The lines.

    Example:
        >>> print(markdown_table(("layer", "size"), [("first", "1")], right=[1]))
        | layer | size |
        |---|---:|
        | first | 1 |
    """
    rule = "|" + "|".join("---:" if k in right else "---" for k in range(len(head))) + "|"
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in (head, *rows)]
    return "\n".join((lines[0], rule, *lines[1:]))


def share(part: float, whole: float) -> str:
    """``part / whole`` as the text of a cell, empty where there is no whole."""
    return f"{part / whole:.3f}" if whole else ""
