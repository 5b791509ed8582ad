"""``structmat demo``."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from structmat import _checks
from structmat.cli.formats import NAMES
from structmat.cli.options import Options


@dataclass(frozen=True)
class DemoOptions(Options):
    """What the demo does.

    Attributes:
        keep: The share of the parameters to keep.
        formats: The structures to compare; none for all.
        seeds: The number of seeds.
        out: The folder for pictures and results.
        quick: Whether to train for fewer epochs with one budget.
    """

    keep: Annotated[float, typer.Option(help="The largest share of the linear layers' parameters to keep.")] = 0.3
    formats: Annotated[
        tuple[str, ...],
        typer.Option(
            "--formats",
            metavar="NAME",
            help=f"A structure to compare, repeated for several: {NAMES}; by default those with a method of their own.",
        ),
    ] = ()
    seeds: Annotated[int, typer.Option(help="The number of seeds to average over.")] = 1
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for pictures and results.")] = Path(
        "structmat-demo"
    )
    quick: Annotated[
        bool, typer.Option("--quick", help="Train for fewer epochs with one budget: a look, not a comparison.")
    ] = False


def demo(options: DemoOptions) -> None:
    """Run ``structmat demo``."""
    module = importlib.import_module("structmat.demo")
    names = tuple(dict.fromkeys(options.formats or module.usual_structures()))
    for name in names:
        _checks.one_of(name, module.structures(), "--formats")
    keep = _checks.fraction(options.keep, "--keep")
    seeds = _checks.positive_int(options.seeds, "--seeds")
    module.run_demo(module.Settings(keep, names, seeds, options.out, options.quick))
