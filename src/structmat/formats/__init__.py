"""The structures: what a matrix of each is made of, how it multiplies, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from structmat import _checks
from structmat.formats.base import Factors, FactorSpec, Format, RankedFormat
from structmat.formats.blast import Blast
from structmat.formats.block_diagonal import BlockDiagonal
from structmat.formats.block_sparse import BlockSparse, flat_butterfly
from structmat.formats.conversions import to_blast
from structmat.formats.dense import Dense
from structmat.formats.gaudi_gblr import GaudiGblr
from structmat.formats.gblr import Gblr
from structmat.formats.gblr_conversions import (
    add_gblr,
    harden,
    hardening_gap,
    interpolate_gaudi,
    overlap,
    to_gaudi,
    to_gblr,
)
from structmat.formats.low_rank import LowRank
from structmat.formats.monarch import Monarch
from structmat.formats.tiled_gblr import TiledGblr, tile

FORMATS: dict[str, type[Format]] = {
    "dense": Dense,
    "low_rank": LowRank,
    "block_diagonal": BlockDiagonal,
    "monarch": Monarch,
    "block_sparse": BlockSparse,
    "blast": Blast,
    "gblr": Gblr,
    "gaudi_gblr": GaudiGblr,
    "tiled_gblr": TiledGblr,
}
"""Every format by its name in JSON and on the command line."""


def format_from_json(data: Mapping[str, Any]) -> Format:
    """Rebuild a format from what ``Format.to_json`` gave.

    Args:
        data: The format's name under ``"format"`` and its fields.

    Returns:
        The format.

    Raises:
        ValueError: If the name is unknown or the fields do not fit it.
    """
    fields = dict(data)
    name = fields.pop("format", None)
    _checks.one_of(name, FORMATS, "the format's name")
    try:
        return FORMATS[name](**fields)
    except TypeError as error:
        raise ValueError(f"the fields of a {name} format do not fit: {error}") from error


__all__ = [
    "FORMATS",
    "Blast",
    "BlockDiagonal",
    "BlockSparse",
    "Dense",
    "FactorSpec",
    "Factors",
    "Format",
    "GaudiGblr",
    "Gblr",
    "LowRank",
    "Monarch",
    "RankedFormat",
    "TiledGblr",
    "add_gblr",
    "flat_butterfly",
    "format_from_json",
    "harden",
    "hardening_gap",
    "interpolate_gaudi",
    "overlap",
    "tile",
    "to_blast",
    "to_gaudi",
    "to_gblr",
]
