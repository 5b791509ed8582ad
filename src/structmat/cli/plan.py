"""``structmat plan``."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from structmat._names import alike
from structmat._tables import print_table, share
from structmat.cli import models
from structmat.cli.calibration import CalibrationOptions, told
from structmat.cli.estimates import size_of, usual_size
from structmat.cli.options import Model, Options
from structmat.cli.selection import PlanOptions
from structmat.cli.show import count, say
from structmat.compress.estimate import estimate
from structmat.formats import Format
from structmat.plan import Plan


@dataclass(frozen=True)
class PlanFile(Options):
    """Where the plan is written.

    Attributes:
        out: The file; None for none.
    """

    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file for the plan, as JSON.")] = None


LEAST_SHARED = 0.2
"""The least share of the budget that layers share out; below it, hardly any size is smaller."""


def plan(model: Model, options: PlanOptions, calibration: CalibrationOptions, file: PlanFile) -> None:
    """Run ``structmat plan``."""
    started = time.perf_counter()
    skeleton = models.skeleton(model)
    made = options.plan_for(skeleton)
    show_plan(made, skeleton)
    shared = not options.rules and LEAST_SHARED <= kept(made) < 1
    say_times(model, made, calibration, skeleton, shared=shared, started=started)
    if file.out is not None:
        made.save(file.out)
        say(f"wrote {file.out}")


def say_times(
    model: str, made: Plan, calibration: CalibrationOptions, skeleton: Any, *, shared: bool, started: float
) -> None:
    """Tell the user how long ``structmat compress`` takes, with data and without.

    Args:
        model: A folder, or a name on the Hub.
        made: The plan.
        calibration: The calibration data, or how much of it there would be.
        skeleton: The model without its weights.
        shared: Whether layers share the budget where there is data.
        started: When the command began, which ``compress`` begins alike.
    """
    device = models.device_named("auto")
    beside = time.perf_counter() - started
    say(f"compress without data takes about {replace(estimate(made, device=device), beside=beside)}")
    if calibration.calibrate is not None:
        data = told(calibration, models.processors(model), skeleton.config, max(format.N for format in made.values()))
        what, size = data.size, size_of(data, skeleton, made, device)
        beside = time.perf_counter() - started
    else:
        size = usual_size(calibration, skeleton, made, device)
        what = count(calibration.rows)
        what += " images" if size.units != size.tokens else f" rows of {count(size.units // calibration.rows)} tokens"
    found = replace(estimate(made, data=size, shared=shared, device=device), beside=beside)
    text = f"compress with --calibrate, {what}, takes about {found}"
    say(f"{text}, or {replace(found, sharing=0.0)} with --uniform" if shared else text)


def show_plan(made: Plan, skeleton: Any) -> None:
    """Print a plan as a table, in which layers that are alike are one line, and what it keeps of the whole model."""
    rows = [
        (name, *_cells(len(members), made[members[0]]))
        for name, members in alike((n, f) for n, f in made.items()).items()
    ]
    rows += [
        (name, str(len(members)), f"skipped: {made.skipped[members[0]]}", "", "")
        for name, members in alike(made.skipped.items()).items()
    ]
    rows += [(name, "", f"stays dense: {reason}", "", "") for name, reason in made.stays.items()]
    before, after = weigh(made)
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    rest = total - before
    sums = [
        ("planned", str(len(made)), f"{count(before)} parameters dense", count(after), share(after, before)),
        ("whole model", "", f"{count(total)} parameters dense", count(rest + after), share(rest + after, total)),
    ]
    print_table(("layer", "layers", "format", "parameters", "keep"), [*rows, ("",) * 5, *sums], right=(1, 3, 4))


def _cells(layers: int, format: Format) -> tuple[str, str, str, str]:
    """The cells of layers of one format behind their name."""
    parameters = format.num_parameters()
    return str(layers), str(format), count(layers * parameters), share(parameters, format.M * format.N)


def weigh(made: Plan) -> tuple[int, int]:
    """The numbers of parameters of the planned layers, dense and structured."""
    formats = made.values()
    return sum(format.M * format.N for format in formats), sum(format.num_parameters() for format in formats)


def kept(made: Plan) -> float:
    """The share of the planned layers' parameters that is kept."""
    before, after = weigh(made)
    return after / before if before else 1.0
