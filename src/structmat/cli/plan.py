"""``structmat plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from structmat._files import write_atomically
from structmat.cli import models, options
from structmat.cli.selection import PlanOptions, plan_for
from structmat.cli.show import count, say, table
from structmat.inspect.reports import share
from structmat.plan import Plan


def plan(
    model: options.Model,
    format: options.FormatName = "blast",
    keep: options.Keep = 0.5,
    blocks: options.Blocks = "16",
    layers: options.Layers = None,
    exclude: options.Exclude = None,
    rules: options.Rules = None,
    skip_misfits: options.SkipMisfits = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File for the plan as JSON.")] = None,
) -> None:
    """Show which layers would get which format; reads no weights."""
    wanted = PlanOptions(
        format, keep, blocks, tuple(layers or ()), tuple(exclude or ()), tuple(rules or ()), skip_misfits
    )
    made = plan_for(models.skeleton(model), wanted)
    show_plan(made)
    if out is not None:
        text = made.to_json() + "\n"
        write_atomically(out, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        say(f"wrote {out}")


def show_plan(made: Plan) -> None:
    """Print a plan as a table."""
    rows = [
        (name, str(format), count(format.num_parameters()), share(format.num_parameters(), format.M * format.N))
        for name, format in made.items()
    ]
    rows += [(name, f"skipped: {reason}", "", "") for name, reason in made.skipped.items()]
    before, after = weigh(made)
    total = f"{len(made)} layers, {count(before)} parameters dense"
    table(
        ("layer", "format", "parameters", "keep"),
        [*rows, ("", "", "", ""), ("all", total, count(after), share(after, before))],
        right=(2, 3),
    )


def weigh(made: Plan) -> tuple[int, int]:
    """Parameters of the planned layers, dense and structured."""
    formats = made.values()
    return sum(format.M * format.N for format in formats), sum(format.num_parameters() for format in formats)
