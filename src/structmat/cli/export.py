"""``structmat export``."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from structmat import _checks
from structmat.cli import models
from structmat.cli.models import DtypeOption, Placement
from structmat.cli.options import Model, Options
from structmat.cli.show import say

TARGETS = {"onnx": "to_onnx"}
"""The function that writes for each runtime."""


@dataclass(frozen=True)
class Destination(Options):
    """Where and for what a model is exported.

    Attributes:
        out: The file to write.
        to: The runtime.
        dtype: The dtype of the weights.
        overwrite: Whether to replace a file that is there.
    """

    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; it appears when it is checked.")]
    to: Annotated[str, typer.Option(help=f"The runtime that is to run the model: {', '.join(TARGETS)}.")] = "onnx"
    dtype: DtypeOption = "auto"
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there already.")] = False

    def __post_init__(self) -> None:
        _checks.one_of(self.to, TARGETS, "--to")
        if self.out.is_dir() or (self.out.exists() and not self.overwrite):
            kind = "a folder" if self.out.is_dir() else "a file, which --overwrite replaces"
            raise FileExistsError(f"expected a new file for --out, but {str(self.out)!r} is {kind}; choose another")


def export(model: Model, destination: Destination) -> None:
    """Run ``structmat export``."""
    write = getattr(importlib.import_module("structmat.export"), TARGETS[destination.to])
    loaded = models.load(model, Placement(destination.dtype, "cpu"))
    written = write(loaded, destination.out)
    say(f"wrote {destination.out}")
    print(written)
