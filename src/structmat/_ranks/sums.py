"""Sums over the batches of all processes, which do not depend on the number of processes to the last bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from structmat._ranks.exchange import receive, send
from structmat._ranks.group import SHARES, current, share_of

ARITY = 4
"""The number of sums that are added to one of the next level of the tree."""

Values = dict[Any, Any]
"""Tensors and numbers by name."""


@dataclass
class _Node:
    """The sum of the shares from ``start`` to before ``stop``."""

    start: int
    stop: int
    values: Values


class Sums:
    """Sums of tensors and numbers over batches, which do not depend on the number of processes to the last bit.

    A process adds the batches of one share one by one, then that sum to the sum before it, if the two lie within one
    node of a tree with ``ARITY`` branches. A few sums at a time are in memory.

    Attributes:
        nodes: The sums of shares in a row, which are not added yet.
    """

    def __init__(self) -> None:
        self._ranks = current()
        self.nodes: list[_Node] = []
        self._leaf: _Node | None = None

    @property
    def values(self) -> Iterator[Any]:
        """Everything that is in memory."""
        for node in [*self.nodes, *([] if self._leaf is None else [self._leaf])]:
            yield from node.values.values()

    def add(self, number: int, values: Mapping[Any, Any]) -> None:
        """Add the values of one batch; batches come in the order of ``Ranks.mine``.

        Args:
            number: The batch's number.
            values: New tensors, which may be changed from now on, and numbers.
        """
        share = share_of(number)
        if self._leaf is None or self._leaf.start != share:
            self._close()
            self._leaf = _Node(share, share + 1, {})
        _add(self._leaf.values, values)

    def total(self) -> Values:
        """The sums over the batches of all processes; nothing may be added any more."""
        ranks, step = self._ranks, 1
        self.complete()
        while step < ranks.size:
            if ranks.rank % (2 * step) == step:
                send(self.nodes, ranks.rank - step)
                self.nodes = []
            elif ranks.rank % (2 * step) == 0 and ranks.rank + step < ranks.size:
                for node in receive(ranks.rank + step):
                    self.push(node)
            step *= 2
        return ranks.of(0, lambda: self.nodes[0].values)

    def complete(self) -> None:
        """Put empty shares in the place of all that this process has no batch of; nothing may be added any more."""
        self._close()
        self._fill(-(-(self._ranks.rank + 1) * SHARES // self._ranks.size))

    def _close(self) -> None:
        """Put the share that is complete behind those before it."""
        if self._leaf is not None:
            self._fill(self._leaf.start)
            self.push(self._leaf)
        self._leaf = None

    def _fill(self, stop: int) -> None:
        """Put empty shares in the place of those that have no batch, up to a number."""
        first = -(-self._ranks.rank * SHARES // self._ranks.size)
        for share in range(self.nodes[-1].stop if self.nodes else first, stop):
            self.push(_Node(share, share + 1, {}))

    def push(self, node: _Node) -> None:
        """Put a sum behind those before it, and add what is within one node of the tree."""
        self.nodes.append(node)
        while len(self.nodes) > 1 and _within_one(*self.nodes[-2:]):
            right = self.nodes.pop()
            self.nodes[-1].stop = right.stop
            _add(self.nodes[-1].values, right.values)


def _within_one(left: _Node, right: _Node) -> bool:
    """Whether the tree adds the right sum, which is a whole branch, to the left one, the branches before it."""
    size = 1
    while size < right.stop - right.start:
        size *= ARITY
    whole = size == right.stop - right.start and right.start % size == 0
    return whole and left.start % (ARITY * size) == 0 and right.start - left.start < ARITY * size


def _add(sums: Values, new: Mapping[Any, Any]) -> None:
    """Add values to sums in place; what the sums lack is taken over."""
    for name, value in new.items():
        if name not in sums:
            sums[name] = value
        elif isinstance(value, Tensor):
            sums[name].add_(value)
        else:
            sums[name] = sums[name] + value
