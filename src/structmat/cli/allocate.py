"""``structmat allocate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from structmat import _checks
from structmat._ranks import current
from structmat.bench import Seconds
from structmat.cli import models
from structmat.cli.calibration import CalibrationOptions, batches_of
from structmat.cli.compress import shared_budget
from structmat.cli.formats import HINT, NAMES, read_blocks, read_format
from structmat.cli.launch import joined
from structmat.cli.models import Placement
from structmat.cli.options import Model, Options
from structmat.cli.selection import PANEL, Exclude, Layers, check_any, check_picks, checked_pattern, usual_pattern
from structmat.cli.show import say
from structmat.compress.allocate import UNITS, AllocationSettings
from structmat.compress.efforts import EFFORTS


@dataclass(frozen=True)
class AllocationOptions(Options):
    """The options of an allocation.

    Attributes:
        out: The file for the plan.
        format: What layers may become, with options.
        keep: The share of the cost that is kept.
        blocks: The block counts, ``16`` or ``8x16``.
        layers: Patterns of the layers that share the budget; none for the usual ones.
        exclude: Patterns of the layers to leave alone.
        unit: What the budget counts.
        tokens: The numbers of vectors of the products whose seconds are counted.
        whole: Whether the budget is for all of the model.
        effort: How much is fitted and measured.
        cache: The folder for finished fits; None for none.
        stream: Whether one block at a time is in memory.
    """

    out: Annotated[Path, typer.Option("--out", "-o", help="The file for the plan, as JSON.")] = Path("plan.json")
    format: Annotated[
        tuple[str, ...],
        typer.Option(
            "--format",
            metavar="FORMAT",
            help=f"What layers may become beside dense, repeated for several formats: {NAMES}; {HINT}.",
            rich_help_panel=PANEL,
        ),
    ] = ("blast", "low_rank")
    keep: Annotated[float, typer.Option(help="The share that the layers keep together.", rich_help_panel=PANEL)] = 0.5
    blocks: Annotated[
        str, typer.Option(help="The block counts of formats with blocks: 16, or 8x16.", rich_help_panel=PANEL)
    ] = "16"
    layers: Layers = ()
    exclude: Exclude = ()
    unit: Annotated[
        str,
        typer.Option(
            help=f"What the budget counts: {', '.join(UNITS)}, or seconds, as they are measured here.",
            rich_help_panel=PANEL,
        ),
    ] = "parameters"
    tokens: Annotated[
        tuple[int, ...],
        typer.Option(
            "--tokens",
            help="With --unit seconds, the numbers of tokens of the products, repeated for several: 1 for a step of a "
            "generation, and the length of the prompt.",
            rich_help_panel=PANEL,
        ),
    ] = (1,)
    whole: Annotated[
        bool,
        typer.Option("--whole", help="Let --keep be the share of all parameters of the model.", rich_help_panel=PANEL),
    ] = False
    effort: Annotated[
        str, typer.Option(help=f"How much is fitted and measured: {', '.join(EFFORTS)}.", rich_help_panel=PANEL)
    ] = "default"
    cache: Annotated[
        Path | None,
        typer.Option(
            help="A folder for finished fits, from which another run with another --keep takes them.",
            rich_help_panel=PANEL,
        ),
    ] = None
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Read the model from its files, one block at a time: for models larger than the memory.",
            rich_help_panel=PANEL,
        ),
    ] = False


def allocate_plan(
    model: Model, options: AllocationOptions, calibration: CalibrationOptions, placement: Placement
) -> None:
    """Run ``structmat allocate``."""
    with joined():
        _allocate_plan(model, options, calibration, placement)


def _allocate_plan(
    model: Model, options: AllocationOptions, calibration: CalibrationOptions, placement: Placement
) -> None:
    """Allocate, together with the other processes that a launcher started; the first one writes the plan."""
    if calibration.calibrate is None:
        raise ValueError("expected --calibrate: what a layer does to the output is measured on data")
    _checks.one_of(options.effort, EFFORTS, "--effort")
    _checks.one_of(options.unit, (*UNITS, "seconds"), "--unit")
    if options.tokens != (1,) and options.unit != "seconds":
        raise ValueError(f"expected --unit seconds with --tokens, got --unit {options.unit}")
    keep, blocks = _checks.fraction(options.keep, "--keep"), read_blocks(options.blocks)
    structures = [read_format(text, "--format") for text in options.format]
    layers = [checked_pattern(pattern, "--layers") for pattern in options.layers]
    exclude = [checked_pattern(pattern, "--exclude") for pattern in options.exclude]
    if options.stream and placement != Placement():
        raise ValueError("expected neither --dtype nor --device with --stream, which keeps the files' own and the CPU")
    loaded = models.skeleton(model) if options.stream else models.load(model, placement)
    check_picks(loaded, {"--layers": layers, "--exclude": exclude})
    if not layers:
        layers, exclude = usual_pattern(loaded, exclude), []
    check_any(layers)
    batches = batches_of(calibration, models.processors(model), loaded.config)
    unit, device = options.unit, "cpu" if options.stream else loaded.device
    settings = AllocationSettings(
        keep=keep,
        structures=structures,
        blocks=blocks,
        exclude=exclude,
        unit=Seconds(options.tokens, dtype=loaded.dtype, device=device) if unit == "seconds" else unit,
        whole=options.whole,
        effort=options.effort,
    )
    plan = shared_budget(model, None if options.stream else loaded, batches or [], settings, layers, options.cache)
    if current().leads:
        print(plan.why())
        plan.save(options.out)
    say(f"wrote {options.out}; structmat compress MODEL --plan {options.out} uses it")
