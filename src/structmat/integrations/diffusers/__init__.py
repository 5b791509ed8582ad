"""Structured networks in Hugging Face diffusers: models and whole pipelines, plain save and plain load.

Importing this package registers structmat with diffusers, as ``import structmat`` does once diffusers is in use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from structmat.integrations import doors

if TYPE_CHECKING:
    from structmat.integrations.diffusers.quantizer import (
        StructmatDiffusersConfig,
        StructmatDiffusersQuantizer,
        write_down,
    )

doors.check_version("diffusers")
_quantizer = importlib.import_module(f"{__name__}.quantizer")
StructmatDiffusersConfig = _quantizer.StructmatDiffusersConfig
StructmatDiffusersQuantizer = _quantizer.StructmatDiffusersQuantizer
write_down = _quantizer.write_down

__all__ = ["StructmatDiffusersConfig", "StructmatDiffusersQuantizer", "write_down"]
