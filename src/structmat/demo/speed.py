"""The second part of the demo: how fast a layer of a real size is in every structure, beside a dense one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from structmat._progress import progress_bar
from structmat.bench import autotune_
from structmat.demo.settings import Settings, rule_for
from structmat.nn import StructuredLinear

SIZE = 2048
"""The number of rows and columns of the weight."""

TOKENS = (1, 16, 512)
"""The numbers of vectors that a call multiplies."""

ROUNDS = 7
"""How often each way to multiply is timed."""


@dataclass(frozen=True)
class Speed:
    """How fast one structure is with one number of tokens.

    Attributes:
        name: The name of the structure.
        format: The format, as text.
        keep: The share of the dense parameters that the layer has.
        tokens: The number of vectors.
        algorithm: The way to multiply that was the fastest.
        seconds: The time of a call, the median.
        dense_seconds: The time of a call of the dense product that was timed in turn with it, the median.
    """

    name: str
    format: str
    keep: float
    tokens: int
    algorithm: str
    seconds: float
    dense_seconds: float

    @property
    def speedup(self) -> float:
        """How many times faster than dense it is."""
        return self.dense_seconds / self.seconds


def measure_speeds(settings: Settings) -> tuple[list[Speed], dict[str, str]]:
    """Time a layer of every structure, as ``autotune_`` leaves it, in turn with a dense product.

    Every call multiplies with another copy of the weights, so that no cache holds them. Structures that learn are
    hardened from their random init; ``autotune_`` lays GBLR out in tiles where that is faster.

    Args:
        settings: The structures and the budget.

    Returns:
        The speed of each structure and number of tokens, and the reason where a structure does not fit.
    """
    found: list[Speed] = []
    refused: dict[str, str] = {}
    with progress_bar(total=len(settings.formats), desc="time layers") as bar:
        for name in settings.formats:
            try:
                layer = _layer(name, settings.keep)
            except ValueError as error:
                refused[name] = str(error)
            else:
                found += _timed(name, layer, TOKENS)
            bar.update()
    return found, refused


def _layer(name: str, keep: float) -> StructuredLinear:
    """A layer with random factors, hardened if its structure is learned."""
    format = rule_for(name, keep).format_for(SIZE, SIZE)
    factors = format.init(generator=torch.Generator().manual_seed(0))
    if format.learns and (hardened := format.hardened(factors)) is not None:
        format, factors = hardened
    return StructuredLinear(format, bias=False, factors=factors)


def _timed(name: str, layer: StructuredLinear, tokens: Sequence[int]) -> list[Speed]:
    format = layer.format
    keep = format.num_parameters(layer.factors) / (format.M * format.N)
    tuning = autotune_(nn.Sequential(layer).eval(), tokens=tokens, rounds=ROUNDS)
    return [
        Speed(name, str(format), keep, choice.tokens, choice.algorithm, choice.seconds, choice.dense_seconds)
        for choice in tuning.choices
    ]
