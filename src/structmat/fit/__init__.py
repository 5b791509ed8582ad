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
from structmat.formats import DEFAULT_METHODS, Blast, BlockDiagonal, BlockSparse, Format, GaudiGblr, LowRank, Monarch

DEFAULT_METHODS |= {
    LowRank: TruncatedSvd(),
    BlockDiagonal: Magnitude(),
    BlockSparse: Magnitude(),
    Monarch: Dao2022Monarch(),
    Blast: Lee2024Blast(),
    GaudiGblr: Lee2024Gblr(),
}


def default_method(format: Format) -> Method[Any]:
    """The method for a format where none is given.

    Args:
        format: The format.

    Returns:
        Its entry in ``DEFAULT_METHODS``.

    Raises:
        ValueError: If the table has none.
    """
    if type(format) not in DEFAULT_METHODS:
        known = ", ".join(f.__name__ for f in DEFAULT_METHODS)
        raise ValueError(
            f"expected a format with a default method ({known}), got {format}; pass method=, GradientFit() fits any"
        )
    return DEFAULT_METHODS[type(format)]


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
