"""A report as a page: what the record and a benchmark say goes into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from structmat import _checks
from structmat._files import read_json, write_atomically
from structmat.cli.show import say
from structmat.cli.times import seconds
from structmat.inspect.page import Quality, Story, page
from structmat.inspect.reports import Report

HEAD = ("model", "step", "tokens", "time", "tokens/s", "speed-up")
"""The titles of the table of times."""


def write_page(model: Any, found: Report, story: Story, path: Path) -> None:
    """Write a page, atomically.

    Args:
        model: The model with the factors that the pictures need.
        found: The report.
        story: What else is known.
        path: The file.
    """
    text = page(model, found, story)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    say(f"wrote {path}")


def story_of(title: str, record: Mapping[str, Any], bench: Path | None) -> Story:
    """What the record beside a model and a benchmark say.

    Args:
        title: The name of the model.
        record: The record; empty where there is none.
        bench: The ``bench.json`` of ``structmat bench``; None for none.

    Returns:
        The story.
    """
    hardware, speeds = ("", ()) if bench is None else read_speeds(bench)
    versions = record.get("versions") or {}
    return Story(
        title,
        record.get("command", ""),
        record.get("options", {}),
        _checks.values(versions, str, "'versions' of the record"),
        _quality(record),
        speeds,
        hardware,
    )


def _quality(record: Mapping[str, Any]) -> Quality | None:
    """What was measured before and after; None where one of them is missing."""
    fields = {"measured": str, "measured_before": float, "measured_after": float}
    if any(record.get(name) is None for name in fields):
        return None
    known = _checks.fields(dict(record), fields, "the record")
    return Quality(known["measured"], known["measured_before"], known["measured_after"])


def read_speeds(path: Path) -> tuple[str, Sequence[Sequence[str]]]:
    """Read the times of models.

    Args:
        path: The ``bench.json`` of ``structmat bench MODEL...``.

    Returns:
        The machine, and a table: a head, and rows of cells.

    Raises:
        ValueError: If the file holds no times of models.
    """
    found = read_json(path, "the times of structmat bench")
    with _checks.about(str(path)):
        if "models" not in _checks.typed(found, dict, "the times of structmat bench"):
            raise ValueError("expected times of models, got those of layers; run: structmat bench MODEL")
        known = _checks.fields(found, {"hardware": dict, "models": list}, "the times of structmat bench")
        return _machine(known["hardware"]), [HEAD, *map(_cells, known["models"])]


def _machine(hardware: Mapping[str, Any]) -> str:
    """The accelerator, or the processor with the number of its threads."""
    if hardware.get("gpu"):
        return str(hardware["gpu"])
    processor, threads = hardware.get("processor") or "a CPU", hardware.get("threads")
    return f"{processor} with {threads} threads" if threads else str(processor)


def _cells(entry: Any) -> list[str]:
    """The cells of one time."""
    what = "a time of a model"
    numbers = {"model": str, "step": str, "tokens": int, "seconds": dict, "speedup": float, "tokens_per_second": float}
    known = _checks.fields(entry, numbers, what)
    median = _checks.fields(known["seconds"], {"median": float}, f"'seconds' of {what}")["median"]
    return [
        known["model"],
        known["step"],
        str(known["tokens"]),
        seconds(median),
        f"{known['tokens_per_second']:,.1f}",
        f"{known['speedup']:.2f}x",
    ]
