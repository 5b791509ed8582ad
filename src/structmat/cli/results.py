"""What a compression keeps and what came out of it, for the user and for the record."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from structmat._ranks import current
from structmat._tables import share
from structmat.cli import models
from structmat.cli.calibration import CalibrationData
from structmat.cli.plan import weigh
from structmat.cli.show import count, megabytes, root_mean_square, say
from structmat.compress.api import compress_
from structmat.evaluate.held_out import UNITS, HeldOut
from structmat.export.quantize import quantize_
from structmat.fit import Fit
from structmat.network.surgery import harden_
from structmat.plan import Plan


def held_out_of(data: CalibrationData, model: Any) -> HeldOut | None:
    """What the model is measured on before and after; None where nothing is held out."""
    if not data.held_out:
        say("nothing is measured, since there is too little data to hold any out")
        return None
    tasks = importlib.import_module("structmat.integrations.transformers.tasks")
    return HeldOut(data.held_out, causal=tasks.known_task(model) == "causal-lm")


def measured_before(held_out: HeldOut | None, model: Any) -> dict[str, Any]:
    """The measurement of the dense model, for the record; the user is told."""
    if held_out is None:
        return {}
    value = held_out.measure(model)
    if held_out.unit != UNITS[-1]:
        say(f"{held_out.unit} on what is held out, before: {value:.4g}")
    return {"measured": held_out.unit, "measured_before": value}


def measured_after(held_out: HeldOut | None, model: Any) -> dict[str, Any]:
    """The measurement of the compressed model, for the record."""
    return {} if held_out is None else {"measured_after": held_out.measure(model)}


def budget_lines(made: Plan, skeleton: Any, dtype: Any = None) -> list[str]:
    """What the plan keeps, of the planned layers and of the whole model, in parameters and in bytes.

    Args:
        made: The plan.
        skeleton: The model, which may live on the meta device.
        dtype: The dtype of the weights; None for that of the configuration.

    Returns:
        Two lines.
    """
    before, after = weigh(made)
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    dtype = dtype or getattr(skeleton.config, "dtype", None) or torch.float32
    size = torch.empty(0, dtype=dtype).element_size()
    return [
        f"{len(made)} layers of {count(before)} parameters, to keep {count(after)} ({share(after, before)})",
        f"the whole model: {count(total)} parameters before, {count(total - before + after)} after "
        f"({share(total - before + after, total)}); {megabytes(total * size)} before, "
        f"{megabytes((total - before + after) * size)} after in {str(dtype).removeprefix('torch.')}",
    ]


def result_lines(facts: Mapping[str, Any]) -> list[str]:
    """What came out, for the user; the error that was minimised comes first.

    Args:
        facts: The results, with the measurements where something was held out.

    Returns:
        The lines.
    """
    weight = f"weight error {facts['error']:.4f}"
    output = None if facts["output_error"] is None else f"output error {facts['output_error']:.4f}"
    first = f"{weight}, which was minimised" if output is None else f"{output}, which was minimised; {weight}"
    lines = [
        f"relative errors of the layers, root mean square: {first}",
        f"{count(facts['parameters'])} parameters in all, {share(facts['parameters'], facts['dense_parameters'])} of "
        "the dense model's",
    ]
    if facts.get("rounding_errors"):
        worst = max(facts["rounding_errors"].values())
        lines.append(f"weights are in {facts['integers']}, which changed their matrices by {worst:.1e} at most")
    if facts.get("measured") == UNITS[-1]:
        lines.append(f"{UNITS[-1]} of the whole model on what is held out: {facts['measured_after']:.4f}")
    elif "measured" in facts:
        before, after = facts["measured_before"], facts["measured_after"]
        change = f" ({after / before - 1:+.1%})" if before else ""
        lines.append(f"{facts['measured']} on what is held out: {before:.4g} before, {after:.4g} after{change}")
    return lines


def results(parameters: int, made: Plan, fits: Mapping[str, Fit]) -> dict[str, Any]:
    """What came out, for the record.

    Args:
        parameters: The number of parameters of the compressed model.
        made: The plan.
        fits: The fits by layer.

    Returns:
        JSON-compatible data.
    """
    before, after = weigh(made)
    layers = {
        name: {
            "format": fit.format.to_json(),
            "keep": fit.format.keep,
            "error": fit.error,
            "output_error": fit.output_error,
            "seconds": fit.seconds,
        }
        for name, fit in fits.items()
    }
    outputs = [fit.output_error for fit in fits.values() if fit.output_error is not None]
    return {
        "error": root_mean_square([fit.error for fit in fits.values()]),
        "output_error": root_mean_square(outputs) if outputs else None,
        "keep": after / before if before else 1.0,
        "parameters": parameters,
        "dense_parameters": parameters + before - after,
        "skipped": dict(made.skipped),
        "layers": layers,
    }


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
