"""Names: those of layers that are alike as one name, and those that may have been meant by a misspelt one."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Hashable, Iterable


def alike(names: Iterable[tuple[str, Hashable]]) -> dict[str, list[str]]:
    """Put together names that differ in their numbers alone and have the same value.

    Args:
        names: The names, each with what must be the same for names that are put together.

    Returns:
        The names that are put together, by one name for all of them, in the order in which they come first.

    Example:
        >>> list(alike([("layers.0.up", 1), ("layers.0.down", 1), ("layers.1.up", 1), ("layers.2.up", 2)]))
        ['layers.{0-1}.up', 'layers.0.down', 'layers.2.up']
    """
    groups: dict[tuple[str, Hashable], list[str]] = {}
    for name, value in names:
        groups.setdefault((_shape(name), value), []).append(name)
    found: dict[str, list[str]] = {}
    for (shape, _), members in groups.items():
        joint = _joint(shape, members)
        found |= {name: [name] for name in members} if joint is None else {joint: members}
    return found


def _shape(name: str) -> str:
    """A name with a sign in the place of each part that is a number."""
    return ".".join("{}" if part.isdecimal() else part for part in name.split("."))


def _joint(shape: str, names: list[str]) -> str | None:
    """One name for all; None where the numbers are not all combinations of some."""
    numbers = [[int(part) for part in name.split(".") if part.isdecimal()] for name in names]
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    if math.prod(map(len, columns)) != len(names):
        return None
    parts = iter(_range(column) for column in columns)
    return re.sub(r"\{\}", lambda _: next(parts), shape)


def _range(numbers: list[int]) -> str:
    """Numbers as text: ``{0-3,7}``, or the only one."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) + "}"


def meant(name: str, names: Iterable[str]) -> str:
    """Ask whether another name was meant.

    Args:
        name: The name that is none of them.
        names: The names that there are.

    Returns:
        The question as the end of a message; empty where none is near.

    Example:
        >>> meant("kep", ["keep", "blocks"])
        '; did you mean keep?'
    """
    near = difflib.get_close_matches(name, list(names), 3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
