"""Layers that do the same at different depths, as one kind."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a name that is a number."""

OTHERS = "others"
"""The label of the smallest kinds together."""


def kinds(names: Sequence[str], costs: Mapping[str, float], most: int) -> dict[str, list[str]]:
    """Put layers together whose names differ in numbers alone.

    Args:
        names: The names of the layers.
        costs: The weight of each layer, which decides what the smallest kinds are.
        most: The largest number of kinds; the smallest ones are one where there are more.

    Returns:
        The names of the layers of each kind, by what their names end with, ordered by their numbers.

    Example:
        >>> kinds(["h.0.up", "h.0.down", "h.1.up", "head"], {}, 8)
        {'up': ['h.0.up', 'h.1.up'], 'down': ['h.0.down'], 'head': ['head']}
    """
    patterns: dict[str, list[str]] = {}
    for name in names:
        patterns.setdefault(NUMBER.sub("*", name), []).append(name)
    for found in patterns.values():
        found.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    ends = [pattern.rpartition("*.")[2] for pattern in patterns]
    labels = [end if ends.count(end) == 1 else pattern for end, pattern in zip(ends, patterns, strict=True)]
    found = dict(zip(labels, patterns.values(), strict=True))
    if len(found) <= most:
        return found
    order = sorted(found, key=lambda label: sum(costs[name] for name in found[label]), reverse=True)
    rest = [name for label in found if label in order[most - 1 :] for name in found[label]]
    return {**{label: found[label] for label in found if label in order[: most - 1]}, OTHERS: rest}


def depths(names: Sequence[str]) -> list[int]:
    """Say at which depth the layers of a kind are: the first number in each name, or their order where that is unclear.

    Args:
        names: The names of the layers of one kind, in order.

    Returns:
        The depth of each.

    Example:
        >>> depths(["h.0.up", "h.2.up"]), depths(["h.0.expert.0", "h.0.expert.1"])
        ([0, 2], [0, 1])
    """
    found = [int(number[0]) if (number := NUMBER.search(name)) else 0 for name in names]
    return found if len(set(found)) == len(found) else list(range(len(names)))
