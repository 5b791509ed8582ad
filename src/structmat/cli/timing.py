"""The options of ``structmat bench``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from structmat import _checks
from structmat.bench.models import SHAPES
from structmat.bench.timing import MODES
from structmat.cli import models
from structmat.cli.formats import HINT, NAMES, options_text, read_blocks, read_format
from structmat.cli.models import DeviceOption
from structmat.cli.options import Options
from structmat.plan import Rule

LAYERS, MODELS = "Layers", "Models"

MOST_TOKENS = 32
"""The number of tokens that are generated on a CPU by default; the times of longer texts are extrapolated."""


@dataclass(frozen=True)
class FormatsOptions(Options):
    """Which formats are timed.

    Attributes:
        formats: The formats, with their options.
        keep: The share of the dense parameters, for formats that do not say their own.
        blocks: The block counts, each for every format that has blocks and does not say its own.
    """

    formats: Annotated[
        tuple[str, ...],
        typer.Option(
            "--formats",
            metavar="FORMAT",
            help=f"A format to time, repeated for several: {NAMES}; {HINT}. Beside keep there are: {options_text()}.",
        ),
    ] = ("blast", "low_rank", "monarch")
    keep: Annotated[
        float, typer.Option(help="The share of the dense parameters, for formats without a keep of their own.")
    ] = 0.5
    blocks: Annotated[
        tuple[str, ...],
        typer.Option(
            "--blocks",
            metavar="COUNT",
            help="A block count such as 16 or 8x16 for every format that has blocks, repeated for several counts.",
        ),
    ] = ("16",)

    def rules(self) -> dict[str, Rule]:
        """Complete rules for the formats, by the labels that the table shows."""
        _checks.fraction(self.keep, "--keep")
        found: dict[str, Rule] = {}
        for text in self.formats:
            rule = read_format(text, "--formats")
            keep = self.keep if rule.keep is None else rule.keep
            counts: Sequence[Any] = [rule.blocks]
            if rule.format.takes_blocks and rule.blocks is None:
                counts = [read_blocks(count) for count in self.blocks]
            for count in counts:
                found[label(rule, keep, count)] = Rule(rule.format, keep, count, rule.options)
        return found


@dataclass(frozen=True)
class TimingOptions(Options):
    """How is timed.

    Attributes:
        dtypes: The dtypes; none for the usual one of the device.
        mode: The mode, one of ``MODES``.
        backward: Whether to time the backward pass and the training step.
        autotune: Whether to choose algorithms first.
        rounds: The number of times that each is timed.
        out: The folder for results.
        device: The device.
    """

    dtypes: Annotated[
        tuple[str, ...],
        typer.Option(
            "--dtypes",
            metavar="DTYPE",
            help=f"A dtype, repeated for several, but one alone for models: {', '.join(models.DTYPES[1:])}; by default "
            "float32 on a CPU and bfloat16 on a GPU.",
        ),
    ] = ()
    mode: Annotated[
        str,
        typer.Option(
            help=f"How dense and structured alike run: {', '.join(MODES)}, which are plain PyTorch, CUDA graphs and "
            "torch.compile."
        ),
    ] = "eager"
    backward: Annotated[bool, typer.Option("--backward", help="Time the backward pass and the training step too.")] = (
        False
    )
    autotune: Annotated[
        bool, typer.Option("--autotune", help="Choose the fastest algorithms for this machine first.")
    ] = False
    rounds: Annotated[int, typer.Option(help="The number of times that each is timed.")] = 20
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for bench.json and bench.png.")] = Path(
        "structmat-bench"
    )
    device: DeviceOption = "auto"

    def dtypes_on(self, device: torch.device) -> list[torch.dtype]:
        """The dtypes to time on a device."""
        return [dtype_for(name) for name in self.dtypes or ["float32" if device.type == "cpu" else "bfloat16"]]


@dataclass(frozen=True)
class LayerOptions(Options):
    """Which layers are timed, where no model is.

    Attributes:
        shapes: The shapes, ``OUTxIN`` each.
        tokens: The numbers of input vectors.
    """

    shapes: Annotated[
        tuple[str, ...],
        typer.Option(
            "--shapes",
            metavar="OUTxIN",
            help="The out features and in features of a layer, repeated for several layers.",
            rich_help_panel=LAYERS,
        ),
    ] = ("4096x4096",)
    tokens: Annotated[
        tuple[int, ...],
        typer.Option(
            "--tokens",
            metavar="COUNT",
            help="A number of input vectors, repeated for several numbers.",
            rich_help_panel=LAYERS,
        ),
    ] = (1, 16, 128)


@dataclass(frozen=True)
class ModelOptions(Options):
    """Which models are timed, and doing what.

    Attributes:
        shape: The shape of a model with random weights, a key of ``SHAPES``; None for models that are named.
        prefill: The lengths of prompts.
        generate: The lengths of texts.
        most_tokens: The number of tokens after which the time of a text is extrapolated; None for the usual one.
    """

    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            help=f"The shape of a model with random weights, which is timed in place of named models: "
            f"{' or '.join(SHAPES)}.",
            rich_help_panel=MODELS,
        ),
    ] = None
    prefill: Annotated[
        tuple[int, ...],
        typer.Option(
            "--prefill",
            metavar="COUNT",
            help="The number of tokens in a prompt, repeated for several.",
            rich_help_panel=MODELS,
        ),
    ] = (512,)
    generate: Annotated[
        tuple[int, ...],
        typer.Option(
            "--generate",
            metavar="COUNT",
            help="The number of tokens in a text, repeated for several.",
            rich_help_panel=MODELS,
        ),
    ] = (10, 100, 1000)
    most_tokens: Annotated[
        int | None,
        typer.Option(
            help="The number of tokens that are generated at most, beyond which the time of a text is extrapolated; by "
            f"default {MOST_TOKENS} on a CPU.",
            rich_help_panel=MODELS,
        ),
    ] = None


def label(rule: Rule, keep: float, blocks: int | tuple[int, int] | None) -> str:
    """What the table calls a format with its options."""
    pair = (blocks, blocks) if isinstance(blocks, int) else blocks
    counts = [] if pair is None else [f"{pair[0]}x{pair[1]}"]
    others = [f"{name} {value}" for name, value in rule.options.items()]
    return " ".join([rule.format.name, *counts, f"keep {keep:g}", *others])


def dtype_for(name: str) -> torch.dtype:
    """The dtype of this name, which must be a real one."""
    _checks.one_of(name, models.DTYPES[1:], "--dtypes")
    return models.dtype_named(name)


def read_shape(text: str) -> tuple[int, int]:
    """Read ``4096x11008``.

    Args:
        text: The out features and the in features.

    Returns:
        The out features and the in features.

    Raises:
        ValueError: If it does not read.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if found is None:
        raise ValueError(f"expected --shapes such as 4096x11008, out features x in features, got {text!r}")
    return int(found[1]), int(found[2])
