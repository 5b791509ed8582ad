"""``structmat demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from structmat import _checks


def demo(
    keep: Annotated[float, typer.Option(help="Share of the linear layers' parameters to keep, at most.")] = 0.3,
    formats: Annotated[
        list[str] | None, typer.Option("--formats", metavar="NAME ...", help="Structures to compare; all by default.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds to average over.")] = 1,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for pictures and results.")] = Path("structmat-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer epochs and one budget: a look, not a comparison.")
    ] = False,
) -> None:
    """Train a small Vision Transformer on digits and compress it with every structure."""
    from structmat.demo import STRUCTURES, Settings, run_demo  # noqa: PLC0415 - the demo's own dependencies

    names = tuple(dict.fromkeys(formats or STRUCTURES))
    for name in names:
        _checks.one_of(name, STRUCTURES, "--formats")
    checked = _checks.fraction(keep, "--keep")
    run_demo(Settings(checked, names, _checks.positive_int(seeds, "--seeds"), out, quick))
