"""Structured networks in Hugging Face transformers: saving and loading, retraining, streaming, and speed.

Importing this package registers structmat with transformers, as ``import structmat`` does once transformers is in use.
The public names, and the modules behind them, are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from structmat.integrations import doors

if TYPE_CHECKING:
    from structmat.integrations.transformers.arguments import StructuredTrainingArguments
    from structmat.integrations.transformers.blast_llama import import_blast_checkpoint
    from structmat.integrations.transformers.callback import StructureCallback
    from structmat.integrations.transformers.generation import bench_generation
    from structmat.integrations.transformers.llamas import random_llama
    from structmat.integrations.transformers.quantizer import StructmatConfig, StructmatQuantizer, write_down
    from structmat.integrations.transformers.retraining import retrain
    from structmat.integrations.transformers.skeletons import skeleton
    from structmat.integrations.transformers.streaming import compress_checkpoint
    from structmat.integrations.transformers.trainer import StructuredTrainer

_HOMES = {
    "StructmatConfig": "quantizer",
    "StructmatQuantizer": "quantizer",
    "StructureCallback": "callback",
    "StructuredTrainer": "trainer",
    "StructuredTrainingArguments": "arguments",
    "bench_generation": "generation",
    "compress_checkpoint": "streaming",
    "import_blast_checkpoint": "blast_llama",
    "random_llama": "llamas",
    "retrain": "retraining",
    "skeleton": "skeletons",
    "write_down": "quantizer",
}
"""The module of every public name."""

__all__ = [
    "StructmatConfig",
    "StructmatQuantizer",
    "StructureCallback",
    "StructuredTrainer",
    "StructuredTrainingArguments",
    "bench_generation",
    "compress_checkpoint",
    "import_blast_checkpoint",
    "random_llama",
    "retrain",
    "skeleton",
    "write_down",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public are: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)


doors.check_version("transformers")
importlib.import_module(f"{__name__}.quantizer")
