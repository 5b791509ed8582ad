"""Fits: from a dense weight to the factors of a format."""

from __future__ import annotations

from typing import Any

from structmat.fit.base import Fit, Method, Progress
from structmat.fit.dao2022monarch import Dao2022Monarch
from structmat.fit.gradient import GradientFit
from structmat.fit.lee2024blast import Lee2024Blast
from structmat.fit.lee2024gblr import Lee2024Gblr
from structmat.fit.magnitude import Magnitude
from structmat.fit.svd import TruncatedSvd
from structmat.formats import Blast, BlockDiagonal, BlockSparse, Format, GaudiGblr, LowRank, Monarch, registry

DEFAULT_METHODS: dict[type[Format], Method[Any]] = registry.DEFAULT_METHODS
"""The method that fits each format where none is given; ``GradientFit`` fits the formats that have none here."""

DEFAULT_METHODS |= {
    LowRank: TruncatedSvd(),
    BlockDiagonal: Magnitude(),
    BlockSparse: Magnitude(),
    Monarch: Dao2022Monarch(),
    Blast: Lee2024Blast(),
    GaudiGblr: Lee2024Gblr(),
}


def default_method(format: Format) -> Method[Any]:
    """Look up the method for a format where none is given.

    Args:
        format: The format.

    Returns:
        The entry of the format in ``DEFAULT_METHODS``; ``GradientFit()``, which fits any format, where there is none.
    """
    return DEFAULT_METHODS.get(type(format), GradientFit())


__all__ = [
    "DEFAULT_METHODS",
    "Dao2022Monarch",
    "Fit",
    "GradientFit",
    "Lee2024Blast",
    "Lee2024Gblr",
    "Magnitude",
    "Method",
    "Progress",
    "TruncatedSvd",
    "default_method",
]
