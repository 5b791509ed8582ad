"""Structured matrices for efficient deep learning: the public interface.

A ``Format`` is the shape of one structured matrix, a ``Method`` fits it to a dense weight, a ``Plan`` says which layer
of a network gets which format.

Names and packages are imported when they are first used, so that ``import structmat`` takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from structmat._version import __version__
from structmat.integrations import doors

if TYPE_CHECKING:
    from structmat import (
        bench as bench,
    )
    from structmat import (
        compress as compress,
    )
    from structmat import (
        data as data,
    )
    from structmat import (
        evaluate as evaluate,
    )
    from structmat import (
        export as export,
    )
    from structmat import (
        fit as fit,
    )
    from structmat import (
        formats as formats,
    )
    from structmat import (
        inspect as inspect,
    )
    from structmat import (
        integrations as integrations,
    )
    from structmat import (
        network as network,
    )
    from structmat import (
        nn as nn,
    )
    from structmat import (
        ops as ops,
    )
    from structmat import (
        training as training,
    )
    from structmat.bench.autotune import autotune_
    from structmat.checkpoint import load_model, save_model
    from structmat.compress.allocate import allocate
    from structmat.compress.api import compress_
    from structmat.compress.calibration import calibrate
    from structmat.compress.refinement import Refinement
    from structmat.export.quantize import quantize_
    from structmat.fit import Fit, default_method
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
        register_format,
    )
    from structmat.inspect.reports import report
    from structmat.integrations.hub import load_pretrained
    from structmat.integrations.peft import prepare_for_lora
    from structmat.network.surgery import apply_plan_, densify_, harden_, tile_
    from structmat.nn import StructuredConv2d, StructuredLinear
    from structmat.plan import Plan, Rule, make_plan, plan_of
    from structmat.pretrained import compress_pretrained

_HOMES = {
    "structmat.bench.autotune": ("autotune_",),
    "structmat.checkpoint": ("load_model", "save_model"),
    "structmat.compress.allocate": ("allocate",),
    "structmat.compress.api": ("compress_",),
    "structmat.compress.calibration": ("calibrate",),
    "structmat.compress.refinement": ("Refinement",),
    "structmat.export.quantize": ("quantize_",),
    "structmat.fit": ("Fit", "default_method"),
    "structmat.formats": (
        "Blast",
        "BlockDiagonal",
        "BlockSparse",
        "Dense",
        "Format",
        "GaudiGblr",
        "Gblr",
        "LowRank",
        "Monarch",
        "register_format",
    ),
    "structmat.inspect.reports": ("report",),
    "structmat.integrations.hub": ("load_pretrained",),
    "structmat.integrations.peft": ("prepare_for_lora",),
    "structmat.network.surgery": ("apply_plan_", "densify_", "harden_", "tile_"),
    "structmat.nn": ("StructuredConv2d", "StructuredLinear"),
    "structmat.plan": ("Plan", "Rule", "make_plan", "plan_of"),
    "structmat.pretrained": ("compress_pretrained",),
}
"""Every public name, by the module that defines it."""

_PACKAGES = (
    "bench",
    "compress",
    "data",
    "evaluate",
    "export",
    "fit",
    "formats",
    "inspect",
    "integrations",
    "network",
    "nn",
    "ops",
    "training",
)
"""The packages with everything else, such as ``structmat.training``."""

_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Blast",
    "BlockDiagonal",
    "BlockSparse",
    "Dense",
    "Fit",
    "Format",
    "GaudiGblr",
    "Gblr",
    "LowRank",
    "Monarch",
    "Plan",
    "Refinement",
    "Rule",
    "StructuredConv2d",
    "StructuredLinear",
    "__version__",
    "allocate",
    "apply_plan_",
    "autotune_",
    "calibrate",
    "compress_",
    "compress_pretrained",
    "default_method",
    "densify_",
    "harden_",
    "load_model",
    "load_pretrained",
    "make_plan",
    "plan_of",
    "prepare_for_lora",
    "quantize_",
    "register_format",
    "report",
    "save_model",
    "tile_",
]


def __getattr__(name: str) -> Any:
    """Import a public name or a package when it is first asked for."""
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _PACKAGES:
        return importlib.import_module(f"structmat.{name}")
    raise AttributeError(f"module 'structmat' has no attribute {name!r}; public are: {', '.join(__all__)}")


def __dir__() -> list[str]:
    """List the public names and packages."""
    return sorted({*__all__, *_PACKAGES})


doors.watch()
