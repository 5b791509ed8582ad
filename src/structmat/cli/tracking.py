"""The trackers that a command reports to."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from structmat import _checks
from structmat.cli.options import Options

TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}
"""The packages of each tracker, of which it needs one."""

RUNS = "runs"
"""The folder of TensorBoard's files."""


@dataclass(frozen=True)
class TrackingOptions(Options):
    """Where figures are reported to while a command works.

    Attributes:
        report_to: The names of trackers, several with commas between them.
    """

    report_to: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="TRACKER",
            help=f"Report progress, errors and measurements to {', '.join(TRACKERS)}, or several of them with commas "
            "between them; TensorBoard's files are in the folder runs of the result.",
        ),
    ] = ()

    def __post_init__(self) -> None:
        for name in self.names:
            _checks.one_of(name, TRACKERS, "--report-to")

    @property
    def names(self) -> list[str]:
        """The names of the trackers, each once."""
        return list(dict.fromkeys(name.strip() for text in self.report_to for name in text.split(",")))

    def check(self) -> None:
        """Check before the work begins that the packages are there.

        Raises:
            ImportError: If one is missing.
        """
        for name in self.names:
            if all(importlib.util.find_spec(package) is None for package in TRACKERS[name]):
                raise ImportError(f"--report-to {name} needs the package {name}: pip install {name}")

    @contextmanager
    def tracker(self, folder: Path, model: Any, name: str) -> Iterator[Any]:
        """Report while the context is entered.

        Args:
            folder: The folder for the files of trackers that write files.
            model: The model.
            name: The name of the run.

        Yields:
            A ``Tracker``; None where nothing is reported.
        """
        if not self.names:
            yield None
            return
        tracking = importlib.import_module("structmat.integrations.transformers.tracking")
        with tracking.Tracker(self.names, folder, model, name) as tracker:
            yield tracker


def move_runs(before: Path, folder: Path) -> None:
    """Move the files of TensorBoard into the folder of the model, if there are any."""
    if (before / RUNS).is_dir():
        shutil.move(before / RUNS, folder / RUNS)


def figures_of(facts: Mapping[str, Any]) -> Iterator[dict[str, float]]:
    """The figures of a compression for a tracker, one after the other.

    Args:
        facts: The results, as they are recorded.

    Yields:
        What was measured before; the errors of each layer; those of all of them; and what was measured after.
    """
    measured = f"eval_{facts['measured'].replace(' ', '_')}" if "measured" in facts else None
    if measured is not None:
        yield {measured: facts["measured_before"]}
    for name, layer in facts["layers"].items():
        errors = {"output_error": layer["output_error"], "weight_error": layer["error"]}
        yield {f"{kind}/{name}": error for kind, error in errors.items() if error is not None}
    whole = {"weight_error": facts["error"], "output_error": facts["output_error"], "keep": facts["keep"]}
    yield {name: value for name, value in whole.items() if value is not None}
    if measured is not None:
        yield {measured: facts["measured_after"]}
