"""Seconds as the unit of a budget: what the product with each format takes where it is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from structmat import _checks
from structmat.bench.autotune import DENSE, TILED, measured_ways
from structmat.formats import Dense, Format
from structmat.nn import StructuredLinear


class Seconds:
    """The seconds that products with matrices of a format take here, the fastest way being taken as by ``autotune_``.

    Each format is timed beside a dense product of its shape, and only the ratio of the two is believed: a machine whose
    speed drifts gives all formats of a shape the same unit. ``allocate(..., unit=Seconds(tokens=[1]))`` then shares out
    the time of one step of a generation.

    Args:
        tokens: The numbers of vectors of the products, whose seconds are added up: 1 for a step of a generation, and
            the length of the prompt.
        dtype: The dtype of the products.
        device: Where they run.
        rounds: How often each is timed.

    Raises:
        ValueError: If there are no tokens, or a number is not positive.

    Example:
        >>> from structmat import LowRank
        >>> seconds = Seconds(tokens=[1], rounds=1)
        >>> seconds(LowRank(64, 64, rank=4)) > 0
        True
    """

    name = "seconds"

    def __init__(
        self,
        tokens: Sequence[int] = (1,),
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rounds: int = 10,
    ) -> None:
        self.tokens = tuple(_checks.positive_int(count, "tokens") for count in tokens)
        if not self.tokens:
            raise ValueError("expected at least one number of tokens, got none")
        self.dtype, self.device, self.rounds = dtype, device, _checks.positive_int(rounds, "rounds")
        self._ratios: dict[Format, list[float]] = {}
        self._dense: dict[tuple[int, int], list[float]] = {}

    def __call__(self, format: Format) -> float:
        """The seconds of one product for each number of tokens, added up.

        Args:
            format: The format; its factors are random.

        Returns:
            The seconds, in units of the first dense product that was timed for the format's shape.
        """
        if format not in self._ratios:
            self._measure(format)
        return sum(map(float.__mul__, self._ratios[format], self._dense[format.shape]))

    def _measure(self, format: Format) -> None:
        """Time a format and a dense product of its shape side by side."""
        generator = torch.Generator().manual_seed(0)
        layer = StructuredLinear(format, bias=False, generator=generator, device=self.device, dtype=self.dtype).eval()
        found = [measured_ways(layer, count, self.dtype, self.rounds) for count in self.tokens]
        self._dense.setdefault(format.shape, [ways[DENSE] for ways in found])
        tiled = all(TILED in ways for ways in found)
        self._ratios[format] = [
            1.0
            if isinstance(format, Dense)
            else min(seconds for way, seconds in ways.items() if way != DENSE and (tiled or way != TILED)) / ways[DENSE]
            for ways in found
        ]

    def __repr__(self) -> str:
        return f"Seconds(tokens={list(self.tokens)}, dtype={self.dtype}, device={self.device!r})"
