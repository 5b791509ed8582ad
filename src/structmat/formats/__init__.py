"""The structures: what a matrix of each is made of, how it multiplies, and what it costs."""

from __future__ import annotations

from structmat.formats.base import Factors, FactorSpec, Format, RankedFormat
from structmat.formats.blast import Blast
from structmat.formats.block_diagonal import BlockDiagonal
from structmat.formats.block_sparse import BlockSparse, flat_butterfly
from structmat.formats.conversions import to_blast
from structmat.formats.dense import Dense
from structmat.formats.gaudi_gblr import GaudiGblr
from structmat.formats.gblr import Gblr, tile
from structmat.formats.gblr_conversions import (
    add_gblr,
    harden,
    hardening_gap,
    interpolate_gaudi,
    to_gaudi,
    to_gblr,
)
from structmat.formats.learned import LearnedSegments, Unit
from structmat.formats.low_rank import LowRank
from structmat.formats.merged import Merged, plus_low_rank
from structmat.formats.monarch import Monarch
from structmat.formats.quantized import Quantized
from structmat.formats.registry import (
    DEFAULT_METHODS,
    FORMATS,
    format_from_json,
    format_named,
    load_plugins,
    register_format,
    sized_formats,
)
from structmat.formats.tiled_gblr import TiledGblr

for _kind in (
    Dense,
    LowRank,
    BlockDiagonal,
    Monarch,
    BlockSparse,
    Blast,
    Gblr,
    GaudiGblr,
    TiledGblr,
    Quantized,
    Merged,
):
    register_format(_kind)

__all__ = [
    "DEFAULT_METHODS",
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
    "LearnedSegments",
    "LowRank",
    "Merged",
    "Monarch",
    "Quantized",
    "RankedFormat",
    "TiledGblr",
    "Unit",
    "add_gblr",
    "flat_butterfly",
    "format_from_json",
    "format_named",
    "harden",
    "hardening_gap",
    "interpolate_gaudi",
    "load_plugins",
    "plus_low_rank",
    "register_format",
    "sized_formats",
    "tile",
    "to_blast",
    "to_gaudi",
    "to_gblr",
]
