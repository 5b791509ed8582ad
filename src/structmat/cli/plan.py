"""``structmat plan``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from structmat._tables import print_table, share
from structmat.cli import models
from structmat.cli.options import Model, Options
from structmat.cli.selection import PlanOptions
from structmat.cli.show import count, say
from structmat.plan import Plan


@dataclass(frozen=True)
class PlanFile(Options):
    """Where the plan is written.

    Attributes:
        out: The file; None for none.
    """

    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file for the plan, as JSON.")] = None


def plan(model: Model, options: PlanOptions, file: PlanFile) -> None:
    """Run ``structmat plan``."""
    made = options.plan_for(models.skeleton(model))
    show_plan(made)
    if file.out is not None:
        made.save(file.out)
        say(f"wrote {file.out}")


def show_plan(made: Plan) -> None:
    """Print a plan as a table."""
    rows = [
        (name, str(format), count(format.num_parameters()), share(format.num_parameters(), format.M * format.N))
        for name, format in made.items()
    ]
    rows += [(name, f"skipped: {reason}", "", "") for name, reason in made.skipped.items()]
    before, after = weigh(made)
    total = ("all", f"{len(made)} layers, {count(before)} parameters dense", count(after), share(after, before))
    print_table(("layer", "format", "parameters", "keep"), [*rows, ("", "", "", ""), total], right=(2, 3))


def weigh(made: Plan) -> tuple[int, int]:
    """The numbers of parameters of the planned layers, dense and structured."""
    formats = made.values()
    return sum(format.M * format.N for format in formats), sum(format.num_parameters() for format in formats)
