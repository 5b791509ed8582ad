"""Calibration data: from what the command line names to batches that a model takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from structmat import _checks
from structmat.data import read_images, read_texts, token_batches

LENGTH = 512
"""Tokens of a row where neither the user nor the model says."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What the command line says about calibration.

    Attributes:
        source: As in ``read_texts`` or ``read_images``.
        samples: Documents, rows or images to use, at most.
        length: Tokens of a row, at most; None for 512, or as many as the model takes.
        batch_size: Rows or images of a batch.
        packed: Whether rows are cut from all documents one after the other.
        split: Of the source.
    """

    source: str
    samples: int = 512
    length: int | None = None
    batch_size: int = 8
    packed: bool = False
    split: str | None = None

    def __post_init__(self) -> None:
        _checks.positive_int(self.samples, "--samples")
        _checks.positive_int(self.batch_size, "--batch-size")
        if self.length is not None:
            _checks.positive_int(self.length, "--length")


def length_for(config: Any, wanted: int | None) -> int:
    """How many tokens a row has, at most.

    Args:
        config: Of the model.
        wanted: What the user says.

    Returns:
        That, or 512, or as many as the model has positions.

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
        options: Which.
        processors: Of the model, as ``models.processors`` finds them.
        config: Of the model.

    Returns:
        The batches.

    Raises:
        ValueError: If the model has neither a tokenizer nor an image processor.
    """
    tokenizer, images = processors.get("tokenizer"), processors.get("image processor")
    if tokenizer is not None:
        texts = read_texts(options.source, split=options.split)
        if not options.packed:
            texts = sorted(texts[: options.samples], key=len)  # little padding
        length = length_for(config, options.length)
        batches = token_batches(tokenizer, texts, length=length, batch_size=options.batch_size, packed=options.packed)
        return batches[: math.ceil(options.samples / options.batch_size)]
    if images is None:
        raise ValueError("expected a model with a tokenizer or an image processor to calibrate with, found neither")
    examples = read_images(options.source, images, split=options.split)
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
