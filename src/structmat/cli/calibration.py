"""Calibration data: from what the command line names to batches that a model takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer

from structmat import _checks
from structmat.cli.options import Options
from structmat.cli.output import fingerprint
from structmat.compress.refinement import Refinement
from structmat.data import read_images, read_texts, token_batches
from structmat.data.sources import Source

LENGTH = 512
"""The number of tokens in a row where neither the user nor the model says."""

PANEL = "Calibration"


@dataclass(frozen=True)
class CalibrationOptions(Options):
    """The options of calibration.

    Attributes:
        calibrate: The data, as in ``read_texts`` or ``read_images``; None for no calibration.
        samples: The largest number of documents, rows or images to use.
        length: The largest number of tokens in a row; None for 512, or as many as the model takes.
        batch_size: The number of rows or images in a batch.
        packed: Whether rows are cut from all documents joined together.
        split: The split of the data; None where it has only one.
    """

    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Data to calibrate on, which makes results far better: a text file such as stories.txt.xz[:1500], a "
            "table, a folder (with images, for a model of images), or a data set on the Hub.",
            rich_help_panel=PANEL,
        ),
    ] = None
    samples: Annotated[
        int, typer.Option(help="The largest number of documents, rows or images to use.", rich_help_panel=PANEL)
    ] = 512
    length: Annotated[
        int | None,
        typer.Option(
            help="The largest number of tokens in a row; by default 512, or as many as the model takes.",
            rich_help_panel=PANEL,
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(help="The number of rows or images in a batch.", rich_help_panel=PANEL)] = 8
    packed: Annotated[
        bool, typer.Option("--packed", help="Cut rows from all documents joined together.", rich_help_panel=PANEL)
    ] = False
    split: Annotated[
        str | None,
        typer.Option(help="The split of the data, where it has several.", rich_help_panel=PANEL),
    ] = None

    def __post_init__(self) -> None:
        _checks.positive_int(self.samples, "--samples")
        _checks.positive_int(self.batch_size, "--batch-size")
        if self.length is not None:
            _checks.positive_int(self.length, "--length")

    def record(self) -> dict[str, Any]:
        """What the data depends on, as JSON-compatible data."""
        if self.calibrate is None:
            return {"calibrate": None, "data_files": None}
        return {**super().record(), "data_files": fingerprint(Source.parse(self.calibrate).name)}


@dataclass(frozen=True)
class RefinementOptions(Options):
    """The options of refinement.

    Attributes:
        refine: Whether to tune the factors of each block together.
        refine_steps: The number of steps for each block.
        refine_rate: The learning rate at the start.
    """

    refine: Annotated[
        bool,
        typer.Option("--refine", help="Tune the factors of each block together on the data.", rich_help_panel=PANEL),
    ] = False
    refine_steps: Annotated[
        int, typer.Option(help="The number of steps that --refine takes for each block.", rich_help_panel=PANEL)
    ] = Refinement.steps
    refine_rate: Annotated[
        float, typer.Option(help="The learning rate at the start of --refine.", rich_help_panel=PANEL)
    ] = Refinement.learning_rate

    def __post_init__(self) -> None:
        _checks.positive_int(self.refine_steps, "--refine-steps")
        if not self.refine_rate > 0:
            raise ValueError(f"expected --refine-rate to be positive, got {self.refine_rate}")

    @property
    def settings(self) -> Refinement | None:
        """What ``compress_`` takes; None for no refinement."""
        return Refinement(self.refine_steps, self.refine_rate) if self.refine else None

    def record(self) -> dict[str, Any]:
        """What the refinement depends on, as JSON-compatible data."""
        return super().record() if self.refine else {}


def length_for(config: Any, wanted: int | None) -> int:
    """Find the largest number of tokens in a row.

    Args:
        config: The model's configuration.
        wanted: The number that the user wants; None for the usual.

    Returns:
        The wanted number, or 512, or the number of the model's positions if that is less.

    Raises:
        ValueError: If the user wants more than the model has positions.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        return min(LENGTH, positions) if isinstance(positions, int) else LENGTH
    if isinstance(positions, int) and wanted > positions:
        raise ValueError(f"expected --length of at most the model's {positions} positions, got {wanted}")
    return wanted


def calibration_batches(options: CalibrationOptions, processors: dict[str, Any], config: Any) -> list[dict[str, Any]]:
    """Read calibration data.

    Args:
        options: Which data, and how much of it.
        processors: The model's tokenizer or image processor, as ``models.processors`` finds them.
        config: The model's configuration.

    Returns:
        The batches.

    Raises:
        ValueError: If there is no data, or the model has neither a tokenizer nor an image processor.
    """
    if options.calibrate is None:
        raise ValueError("expected data to calibrate on, got no --calibrate")
    tokenizer, images = processors.get("tokenizer"), processors.get("image processor")
    if tokenizer is not None:
        texts = read_texts(options.calibrate, split=options.split)
        if not options.packed:
            texts = sorted(texts[: options.samples], key=len)  # little padding
        length = length_for(config, options.length)
        batches = token_batches(tokenizer, texts, length=length, batch_size=options.batch_size, packed=options.packed)
        return batches[: math.ceil(options.samples / options.batch_size)]
    if images is None:
        raise ValueError("expected a model with a tokenizer or an image processor to calibrate with, found neither")
    examples = read_images(options.calibrate, images, split=options.split)
    count = min(options.samples, len(examples))
    chosen = [k * len(examples) // count for k in range(count)]  # over all classes of a sorted folder
    pixels = [examples[k]["pixel_values"] for k in chosen]
    size = options.batch_size
    return [{"pixel_values": torch.stack(pixels[k : k + size])} for k in range(0, count, size)]


def described(batches: list[dict[str, Any]]) -> str:
    """How much data that is, as text."""
    examples = sum(len(next(iter(batch.values()))) for batch in batches)
    if "attention_mask" in batches[0]:
        tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
        return f"{examples:,} rows, {tokens:,} tokens"
    return f"{examples:,} images"
