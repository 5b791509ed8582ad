"""Compressions in memory and from file to file, once it is known what is to be done."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from structmat._ranks import current
from structmat.cli import models
from structmat.cli.calibration import CalibrationData
from structmat.cli.plan import weigh
from structmat.cli.results import held_out_of, measured_after, measured_before, results
from structmat.compress.api import compress_
from structmat.export.quantize import quantize_
from structmat.network.surgery import harden_
from structmat.plan import Plan


def held_in_memory(
    model: Any,
    folder: Path,
    made: Plan,
    how: Mapping[str, Any],
    data: CalibrationData | None,
    hardens: bool,
    integers: str | None,
) -> dict[str, Any]:
    """Compress a model in memory, measure it before and after, and write it.

    Args:
        model: The dense model, which becomes the compressed one.
        folder: The folder to write.
        made: The plan.
        how: The further arguments of ``compress_``.
        data: The calibration data; None for none.
        hardens: Whether layers are hardened once they are fitted.
        integers: The kind of integers that weights are stored in; None for floating point.

    Returns:
        What came out, for the record.
    """
    held_out = None if data is None or not current().leads else held_out_of(data, model)
    measured = measured_before(held_out, model)
    fits = compress_(model, made, **how)
    if hardens:
        harden_(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rounded = {} if integers is None else quantize_(model, integers, batches=how["batches"])
    measured |= measured_after(held_out, model)
    if current().leads:
        model.save_pretrained(folder)
    facts = {**results(parameters, made, fits), **measured, "device": str(model.device)}
    return facts if integers is None else {**facts, "integers": integers, "rounding_errors": rounded}


def streamed(model: str, skeleton: Any, folder: Path, made: Plan, how: Mapping[str, Any]) -> dict[str, Any]:
    """Compress a checkpoint from file to file; nothing is measured, since the model may be larger than the memory.

    Args:
        model: A folder, or a name on the Hub.
        skeleton: The model without its weights.
        folder: The folder to write.
        made: The plan.
        how: The further arguments of ``compress_checkpoint``.

    Returns:
        What came out, for the record.
    """
    if current().leads:
        folder.rmdir()
    streaming = importlib.import_module("structmat.integrations.transformers.streaming")
    fits = streaming.compress_checkpoint(models.folder_of(model), folder, made, **how)
    before, after = weigh(made)
    parameters = sum(parameter.numel() for parameter in skeleton.parameters()) - before + after
    return {**results(parameters, made, fits), "device": "cpu"}
