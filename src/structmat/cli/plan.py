"""``structmat plan``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from structmat._names import alike
from structmat._tables import print_table, share
from structmat.cli import models
from structmat.cli.calibration import CalibrationOptions, image_vectors, told
from structmat.cli.options import Model, Options
from structmat.cli.reading import length_for
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


def plan(model: Model, options: PlanOptions, calibration: CalibrationOptions, file: PlanFile) -> None:
    """Run ``structmat plan``."""
    skeleton = models.skeleton(model)
    made = options.plan_for(skeleton)
    show_plan(made, skeleton)
    say_times(model, made, calibration, skeleton)
    if file.out is not None:
        made.save(file.out)
        say(f"wrote {file.out}")


def say_times(model: str, made: Plan, calibration: CalibrationOptions, skeleton: Any) -> None:
    """Tell the user how long ``structmat compress`` takes, with data and without."""
    device = models.device_named("auto")
    say(f"compress without data takes about {estimate(made, device=device)}")
    if calibration.calibrate is not None:
        data = told(calibration, models.processors(model), skeleton.config, max(format.N for format in made.values()))
        tokens, what = data.vectors(skeleton.config), data.size
    elif getattr(skeleton, "main_input_name", "") == "pixel_values":
        tokens, what = calibration.samples * image_vectors(skeleton.config), f"{count(calibration.samples)} images"
    else:
        length = length_for(skeleton.config, calibration.length)
        tokens, what = calibration.samples * length, f"{count(calibration.samples)} rows of {count(length)} tokens"
    say(f"compress with --calibrate, {what}, takes about {estimate(made, tokens=tokens, device=device)}")


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
