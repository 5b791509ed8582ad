"""What is known of the time that ``structmat compress`` takes before it begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from structmat.cli.calibration import CalibrationData, CalibrationOptions, image_vectors
from structmat.cli.reading import length_for
from structmat.compress.estimate import DataSize
from structmat.compress.flow import measure_flow, unit_count
from structmat.formats import Format


def size_of(data: CalibrationData, model: Any, plan: Mapping[str, Format], device: torch.device) -> DataSize:
    """How much data there is, and how fast it flows through a model.

    Args:
        data: The data.
        model: The model, with its weights or without.
        plan: The format of each layer by name.
        device: The device that computes.

    Returns:
        The size.
    """
    middle = data.batches[len(data.batches) // 2]
    held_out = sum(map(unit_count, data.held_out))
    units = sum(map(unit_count, data.batches))
    flow = measure_flow(model, _planned(plan), middle, device)
    return DataSize(data.vectors(model.config), units, flow, held_out, len(data.batches))


def usual_size(options: CalibrationOptions, model: Any, plan: Mapping[str, Format], device: torch.device) -> DataSize:
    """How much data there is by default, and how fast it flows through a model.

    Args:
        options: The options of calibration, without data.
        model: The model, with its weights or without.
        plan: The format of each layer by name.
        device: The device that computes.

    Returns:
        The size.
    """
    config, rows = model.config, options.rows
    if getattr(model, "main_input_name", "") == "pixel_values":
        tokens, units, batch = rows * image_vectors(config), rows, _images(config, options.batch_size, model.dtype)
    else:
        length = length_for(config, options.length)
        ids = torch.zeros(options.batch_size, length, dtype=torch.long)
        tokens = units = rows * length
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    flow = None if batch is None else measure_flow(model, _planned(plan), batch, device)
    return DataSize(tokens, units, flow, batches=math.ceil(rows / options.batch_size))


def _planned(plan: Mapping[str, Format]) -> dict[str, Format]:
    """The formats of the layers that are fitted."""
    return {name: format for name, format in plan.items() if format.replaces}


def _images(config: Any, count: int, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """A batch of images of the size that a configuration names; None where it names none."""
    size = getattr(config, "image_size", None)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    return {"pixel_values": torch.zeros(count, getattr(config, "num_channels", 3), height, width, dtype=dtype)}
