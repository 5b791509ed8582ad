"""Structured matrices for efficient deep learning: the public interface.

A ``Format`` is the shape of one structured matrix, a ``Method`` fits it to a dense weight, a ``Plan`` says which layer
of a network gets which format.
"""

from structmat import _doors
from structmat._version import __version__
from structmat.calibrate import Calibration, Moments, calibrate
from structmat.checkpoint import load, plan_of, save
from structmat.compress import compress_
from structmat.convert import apply_plan_, densify_, harden_, tile_
from structmat.fit import (
    Dao2022Monarch,
    Fit,
    GradientFit,
    Lee2024Blast,
    Lee2024Gblr,
    Magnitude,
    Method,
    TruncatedSvd,
    default_method,
)
from structmat.formats import (
    Blast,
    BlockDiagonal,
    BlockSparse,
    Dense,
    Format,
    GaudiGblr,
    Gblr,
    LowRank,
    Monarch,
    TiledGblr,
    add_gblr,
    flat_butterfly,
    format_from_json,
    harden,
    hardening_gap,
    interpolate_gaudi,
    tile,
    to_blast,
    to_gaudi,
    to_gblr,
)
from structmat.hub import load_pretrained
from structmat.nn import StructuredConv2d, StructuredLinear
from structmat.optimize import Optimization, optimize_
from structmat.plan import Plan, Rule, make_plan
from structmat.refine import Refinement
from structmat.report import Report, report

__all__ = [
    "Blast",
    "BlockDiagonal",
    "BlockSparse",
    "Calibration",
    "Dao2022Monarch",
    "Dense",
    "Fit",
    "Format",
    "GaudiGblr",
    "Gblr",
    "GradientFit",
    "Lee2024Blast",
    "Lee2024Gblr",
    "LowRank",
    "Magnitude",
    "Method",
    "Moments",
    "Monarch",
    "Optimization",
    "Plan",
    "Refinement",
    "Report",
    "Rule",
    "StructuredConv2d",
    "StructuredLinear",
    "TiledGblr",
    "TruncatedSvd",
    "__version__",
    "add_gblr",
    "apply_plan_",
    "calibrate",
    "compress_",
    "default_method",
    "densify_",
    "flat_butterfly",
    "format_from_json",
    "harden",
    "harden_",
    "hardening_gap",
    "interpolate_gaudi",
    "load",
    "load_pretrained",
    "make_plan",
    "optimize_",
    "plan_of",
    "report",
    "save",
    "tile",
    "tile_",
    "to_blast",
    "to_gaudi",
    "to_gblr",
]

_doors.watch()
