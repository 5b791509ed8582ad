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

TARGETS = {"onnx": "to_onnx", "executorch": "to_executorch"}
"""The function that writes for each runtime."""


@dataclass(frozen=True)
class Destination(Options):
    """Where and for what a model is exported.

    Attributes:
        out: The file to write.
        to: The runtime.
        dtype: The dtype of the weights.
        fixed: Whether a program of ExecuTorch has fixed shapes.
        int8: Whether a program of ExecuTorch has its weights in int8.
        overwrite: Whether to replace a file that is there.
    """

    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; it appears when it is checked.")]
    to: Annotated[str, typer.Option(help=f"The runtime that is to run the model: {', '.join(TARGETS)}.")] = "onnx"
    dtype: DtypeOption = "auto"
    fixed: Annotated[
        bool, typer.Option("--fixed", help="Give an ExecuTorch program fixed shapes, so that more runs in XNNPACK.")
    ] = False
    int8: Annotated[
        bool, typer.Option("--int8", help="Store the weights of an ExecuTorch program in int8, and compute with them.")
    ] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there already.")] = False

    def __post_init__(self) -> None:
        _checks.one_of(self.to, TARGETS, "--to")
        if self.to != "executorch" and (self.fixed or self.int8):
            option = "--fixed" if self.fixed else "--int8"
            raise ValueError(f"expected --to executorch for {option}, got --to {self.to}; leave {option} out")
        if self.out.is_dir() or (self.out.exists() and not self.overwrite):
            kind = "a folder" if self.out.is_dir() else "a file, which --overwrite replaces"
            raise FileExistsError(f"expected a new file for --out, but {str(self.out)!r} is {kind}; choose another")


def export(model: Model, destination: Destination) -> None:
    """Run ``structmat export``."""
    write = getattr(importlib.import_module("structmat.export"), TARGETS[destination.to])
    dtype, options = destination.dtype, {}
    if destination.to == "executorch":
        dtype = "float32" if dtype == "auto" else dtype
        options = {"dynamic": not destination.fixed, "int8": destination.int8}
    loaded = models.load(model, Placement(dtype, "cpu"))
    written = write(loaded, destination.out, **options)
    say(f"wrote {destination.out}")
    print(written)
