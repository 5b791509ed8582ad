"""The second part of the demo: how fast a layer of a real size is in every structure, beside a dense one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from structmat._progress import progress_bar
from structmat.bench import autotune_
from structmat.demo.settings import Settings, rule_for
from structmat.formats import Factors, Format
from structmat.nn import StructuredLinear

SIZE = 2048
"""The number of rows and columns of the weight."""

TOKENS = (1, 16, 512)
"""The numbers of vectors that a call multiplies."""

ROUNDS, QUICK_ROUNDS = 7, 3
"""How often each way to multiply is timed, and how often in a quick run."""


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
    hardened from their random init, and formats with a faster layout for inference, such as tiles, are laid out so.

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
                format, factors = _hardened(name, settings.keep)
            except ValueError as error:
                refused[name] = str(error)
            else:
                found += _timed(name, format, factors, QUICK_ROUNDS if settings.quick else ROUNDS)
            bar.update()
    return found, refused


def _hardened(name: str, keep: float) -> tuple[Format, Factors]:
    """A format and random factors, made final if the structure is learned."""
    format = rule_for(name, keep).format_for(SIZE, SIZE)
    factors = format.init(generator=torch.Generator().manual_seed(0))
    return format.hardened(factors) if format.learns else (format, factors)


def _timed(name: str, format: Format, factors: Factors, rounds: int) -> list[Speed]:
    keep = format.num_parameters(factors) / (SIZE * SIZE)
    timed, factors = format.for_inference(factors) or (format, factors)
    layer = StructuredLinear(timed, bias=False, factors=factors)
    tuning = autotune_(nn.Sequential(layer).eval(), tokens=TOKENS, rounds=rounds)
    return [
        Speed(name, str(timed), keep, choice.tokens, choice.algorithm, choice.seconds, choice.dense_seconds)
        for choice in tuning.choices
    ]
