"""Calibration data: from what the command line names to batches that a model takes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import typer

from structmat import _checks
from structmat.cli.fingerprints import fingerprint
from structmat.cli.options import Options
from structmat.cli.reading import WHAT, Reading, length_for
from structmat.cli.show import count, say, warn
from structmat.compress.refinement import Refinement
from structmat.data import read_images, token_rows
from structmat.data.sources import Source
from structmat.data.tokens import row_batches

SAMPLES = 512
"""The number of rows or images to use by default."""

SHORTER = 4
"""How many times as many rows are used at most where they are shorter."""

HELD_OUT_IMAGES = 64
HELD_OUT_TOKENS = 8192
"""The most images and tokens that are held out, on which the model is measured before and after."""

IMAGE_VECTORS = 64
"""About how many vectors a layer sees of an image where the model does not say."""

PER_INPUT = 8
"""The number of tokens for each input of a layer, below which there is a warning."""

PARTS = 8
"""The largest number of parts of the batch that a step of a refinement sees."""

PANEL = "Calibration"


@dataclass(frozen=True)
class CalibrationOptions(Reading):
    """The options of calibration.

    Attributes:
        calibrate: The data, as in ``read_texts`` or ``read_images``; None for no calibration.
        samples: The largest number of rows or images to use; None for 512, or more where rows are short.
        length: The largest number of tokens in a row; None for 512, or as many as the model takes.
        batch_size: The number of rows or images in a batch.
        packed: Whether rows are cut from all documents joined together.
        split: The split of the data; None where it has only one.
    """

    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help=f"Data to calibrate on, which makes results far better: {WHAT}; for a model of images, a folder of "
            "images.",
            rich_help_panel=PANEL,
        ),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option(
            help="The largest number of rows or images to use; by default 512, or of rows that are shorter than "
            f"--length, as many as have the same tokens, up to {SHORTER * SAMPLES:,}.",
            rich_help_panel=PANEL,
        ),
    ] = None
    length: Annotated[
        int | None,
        typer.Option(
            help="The largest number of tokens in a row; by default 512, or as many as the model takes.",
            rich_help_panel=PANEL,
        ),
    ] = None
    batch_size: Annotated[int, typer.Option(help="The number of rows or images in a batch.", rich_help_panel=PANEL)] = 8
    packed: Annotated[
        bool,
        typer.Option(
            "--packed",
            help="Cut rows from all documents joined together; by default a row is of one document, and a long "
            "document becomes several rows.",
            rich_help_panel=PANEL,
        ),
    ] = False
    split: Annotated[
        str | None,
        typer.Option(help="The split of the data, where it has several.", rich_help_panel=PANEL),
    ] = None

    def __post_init__(self) -> None:
        if self.samples is not None:
            _checks.positive_int(self.samples, "--samples")
        _checks.positive_int(self.batch_size, "--batch-size")
        if self.length is not None:
            _checks.positive_int(self.length, "--length")
        if self.calibrate is not None:
            Source.parse(self.calibrate)  # a misspelt path fails before anything is loaded

    @property
    def rows(self) -> int:
        """The number of rows or images to use, where rows are full."""
        return SAMPLES if self.samples is None else self.samples

    def record(self) -> dict[str, Any]:
        """What the data depends on, as JSON-compatible data."""
        if self.calibrate is None:
            return {"calibrate": None, "data_files": None}
        return {**super().record(), "data_files": fingerprint(Source.parse(self.calibrate))}


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

    def parts_of(self, calibration: CalibrationOptions) -> CalibrationOptions:
        """The options by which data is read: a step's batch comes in parts, which processes share."""
        if not self.refine:
            return calibration
        return dataclasses.replace(calibration, batch_size=-(-calibration.batch_size // PARTS))

    def settings_for(self, batch_size: int) -> Refinement | None:
        """What ``compress_`` takes, where a step sees a batch of this size in parts; None for no refinement."""
        if not self.refine:
            return None
        part = -(-batch_size // PARTS)
        return Refinement(self.refine_steps, self.refine_rate, batches=-(-batch_size // part))

    def record(self) -> dict[str, Any]:
        """What the refinement depends on, as JSON-compatible data."""
        return super().record() if self.refine else {}


def image_vectors(config: Any) -> int:
    """The number of vectors that layers see of one image: its patches and a class token, where the model says so."""
    sizes = [getattr(config, name, None) for name in ("image_size", "patch_size")]
    image, patch = (max(size) if isinstance(size, (tuple, list)) else size for size in sizes)
    return (image // patch) ** 2 + 1 if isinstance(image, int) and isinstance(patch, int) else IMAGE_VECTORS


@dataclass(frozen=True)
class CalibrationData:
    """Calibration data, and what is held out to measure on.

    Attributes:
        batches: What the fits are made for.
        held_out: What the model is measured on before and after; empty where there is too little data.
        size: How much data that is of how much was asked for, as text.
        rows: The number of rows or images in the batches.
        tokens: The number of tokens in the batches; None for images.
        asked: How much was asked for, as text.
        share: The share of that which there is.
    """

    batches: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    size: str
    rows: int
    tokens: int | None
    asked: str
    share: float

    def vectors(self, config: Any) -> int:
        """About how many vectors the layers of a model of this configuration see."""
        return self.rows * image_vectors(config) if self.tokens is None else self.tokens

    def warnings(self, inputs: int) -> list[str]:
        """What may be wrong with the amount of data.

        Args:
            inputs: The largest number of inputs of a planned layer.

        Returns:
            Sentences; none where there is enough.
        """
        found = []
        if self.share < 0.5:
            found.append(f"the data gives less than half of the {self.asked}")
        if self.tokens is not None and self.tokens < PER_INPUT * inputs:
            found.append(
                f"{count(self.tokens)} tokens are fewer than {PER_INPUT} for each of the {count(inputs)} inputs of a "
                "layer, so that the compressed model may be much better with more data"
            )
        return found


def read_calibration(options: CalibrationOptions, processors: dict[str, Any], config: Any) -> CalibrationData:
    """Read calibration data.

    Args:
        options: Which data, and how much of it.
        processors: The model's tokenizer or image processor, as ``models.processors`` finds them.
        config: The model's configuration.

    Returns:
        The batches, and what is held out: an eighth as many rows, at most of 8,192 tokens or 64 images, of the data
        behind them, or where the data ends before, a tenth of it.

    Raises:
        ValueError: If there is no data, or the model has neither a tokenizer nor an image processor.
    """
    if options.calibrate is None:
        raise ValueError("expected data to calibrate on, got no --calibrate")
    tokenizer, images = processors.get("tokenizer"), processors.get("image processor")
    if tokenizer is not None:
        return _of_texts(options, tokenizer, length_for(config, options.length))
    if images is None:
        raise ValueError("expected a model with a tokenizer or an image processor to calibrate with, found neither")
    return _of_images(options, images)


def held_out_count(found: int, samples: int, wanted: int) -> int:
    """How many of the rows that were found are held out, where at most ``samples`` are for the fits."""
    return wanted if found >= samples + wanted else min(wanted, found // 10)


def wanted_beside(samples: int, most: int) -> int:
    """The number of rows that are read beside those for the fits."""
    return max(1, min(samples // 8, most))


def _of_texts(options: CalibrationOptions, tokenizer: Any, length: int) -> CalibrationData:
    texts = options.texts(str(options.calibrate), split=options.split, tokenizer=tokenizer)
    wanted = wanted_beside(options.rows, HELD_OUT_TOKENS // length)
    most = options.samples or SHORTER * SAMPLES
    budget = options.rows * length
    rows = token_rows(
        tokenizer,
        texts,
        length=length,
        packed=options.packed,
        most=most + wanted,
        tokens=None if options.samples else budget + wanted * length,
    )
    within = sum(total <= budget for total in itertools.accumulate(map(len, rows)))
    samples = min(within, most)
    held = held_out_count(len(rows), samples, wanted)
    chosen = sorted(rows[: len(rows) - held][:samples], key=len)  # little padding
    tokens = sum(map(len, chosen))
    asked = f"{count(options.samples)} rows that --samples asks for" if options.samples else f"{count(budget)} tokens"
    of_rows = f"{count(len(chosen))} of {count(options.samples)}" if options.samples else count(len(chosen))
    return CalibrationData(
        row_batches(tokenizer, chosen, options.batch_size),
        row_batches(tokenizer, rows[len(rows) - held :], options.batch_size),
        f"{of_rows} rows, {count(tokens)} of at most {count(budget)} tokens",
        len(chosen),
        tokens,
        asked if options.samples else f"{asked} that are used by default",
        len(chosen) / options.samples if options.samples else tokens / budget,
    )


def _of_images(options: CalibrationOptions, processor: Any) -> CalibrationData:
    examples = read_images(str(options.calibrate), processor, split=options.split)
    samples = options.rows
    wanted = wanted_beside(samples, HELD_OUT_IMAGES)
    total = min(samples + wanted, len(examples))
    numbers = [k * len(examples) // total for k in range(total)]  # over all classes of a sorted folder
    held = held_out_count(total, samples, wanted)
    apart = {numbers[(2 * k + 1) * total // (2 * held)] for k in range(held)}
    chosen = [k for k in numbers if k not in apart][:samples]
    size = options.batch_size
    batches = [_image_batch(examples, chosen[k : k + size], labels=False) for k in range(0, len(chosen), size)]
    others = sorted(apart)
    held_out = [_image_batch(examples, others[k : k + size], labels=True) for k in range(0, held, size)]
    size_text = f"{count(len(chosen))} of {count(samples)} images"
    asked = f"{count(samples)} images that --samples asks for"
    return CalibrationData(batches, held_out, size_text, len(chosen), None, asked, len(chosen) / samples)


def _image_batch(examples: Any, numbers: Sequence[int], *, labels: bool) -> dict[str, Any]:
    """A batch of these images, with their classes or without."""
    chosen = [examples[k] for k in numbers]
    batch = {"pixel_values": torch.stack([one["pixel_values"] for one in chosen])}
    return {**batch, "labels": torch.tensor([one["labels"] for one in chosen])} if labels else batch


def told(options: CalibrationOptions, processors: dict[str, Any], config: Any, inputs: int) -> CalibrationData:
    """Read calibration data, and tell the user how much it is.

    Args:
        options: Which data, and how much of it.
        processors: The model's tokenizer or image processor.
        config: The model's configuration.
        inputs: The largest number of inputs of a planned layer; 0 where it is not known yet.

    Returns:
        The data.
    """
    data = read_calibration(options, processors, config)
    held = sum(len(next(iter(batch.values()))) for batch in data.held_out)
    say(f"calibrating on {data.size}; {count(held)} more are held out")
    for text in data.warnings(inputs):
        warn(text)
    return data


def batches_of(
    calibration: CalibrationOptions, processors: dict[str, Any], config: Any, inputs: int = 0
) -> list[dict[str, Any]] | None:
    """Read the batches of calibration data, of which the user is told.

    Args:
        calibration: Which data, and how much of it.
        processors: The model's tokenizer or image processor.
        config: The model's configuration.
        inputs: The largest number of inputs of a planned layer; 0 where it is not known.

    Returns:
        The batches; None where there is to be no data.
    """
    return None if calibration.calibrate is None else told(calibration, processors, config, inputs).batches
