"""``structmat report``: what a model is and costs, as a table or JSON, and pictures of what it has learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from structmat import _checks
from structmat._files import opened_tensors, read_json, write_atomically
from structmat._tables import print_table
from structmat.cli import models
from structmat.cli.options import Model, Options
from structmat.cli.output import RECORD, STATE_SCALE, read_record
from structmat.cli.show import say
from structmat.cli.webpage import story_of, write_page
from structmat.formats import Format
from structmat.inspect.plots import budget_shares, couplings, structure_maps
from structmat.inspect.reports import NUMBERS, Report
from structmat.inspect.reports import report as report_on
from structmat.network import structured_layers

Wanted = Callable[[Format], tuple[str, ...]]
"""Says which factors of a format are read."""

CALLBACK = "StructureCallback"
"""The name under which a trainer's state holds the history of learning."""


@dataclass(frozen=True)
class ReportOptions(Options):
    """What is shown.

    Attributes:
        as_json: Whether to print JSON.
        plot: The folder for pictures; None for none.
        html: The file for the page; None for none.
        bench: The file with times for the page; None for none.
    """

    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FOLDER",
            help="The folder for pictures of what was learned: structure.png and, after a training, budget.png for "
            "layers whose structure is learned, and the couplings of each BLAST layer.",
        ),
    ] = None
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="The file for the report as a page with pictures, which any browser shows without a network.",
        ),
    ] = None
    bench: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The bench.json of structmat bench MODEL, whose times the page shows."),
    ] = None


def report(model: Model, options: ReportOptions) -> None:
    """Run ``structmat report``, which reads no weights but those that the counts and the pictures need.

    Args:
        model: A folder, or a name on the Hub.
        options: What is shown.

    Raises:
        ValueError: If there are times but no page that could show them.
    """
    if options.bench is not None and options.html is None:
        raise ValueError("expected --html with --bench: the page alone shows the times")
    filled = with_factors(model, counted if options.plot is None and options.html is None else drawn)
    found = report_on(filled)
    record = (read_record(Path(model)) if Path(model).is_dir() else None) or {}
    errors = errors_of(record, Path(model)) if record.get("command") == "compress" else {}
    rows = (dataclasses.replace(row, **errors.get(row.name, {})) for row in found.rows)
    found = dataclasses.replace(found, rows=tuple(rows))
    if options.plot is not None:
        draw(model, filled, options.plot)
    if options.html is not None:
        for module in structured_layers(filled).values():
            if module.format.has_overlap:
                hollow_(module)
        story = story_of(Path(model).name or model, record, options.bench)
        write_page(filled, found, story, options.html)
    if options.as_json:
        print(found.to_json())
    else:
        show_report(found)


def errors_of(record: dict[str, Any], folder: Path) -> dict[str, dict[str, float | None]]:
    """The errors of each layer in the record of a compression; those of early versions have no errors of outputs."""
    with _checks.about(str(folder / RECORD)):
        layers = _checks.fields(record, {"layers": dict}, "the record of a compression")["layers"]
        found: dict[str, dict[str, float | None]] = {}
        for name, facts in layers.items():
            what = f"the record of layer {name!r}"
            found[name] = {"error": _checks.fields(facts, {"error": float}, what)["error"]}
            if facts.get("output_error") is not None:
                found[name] |= {
                    "output_error": _checks.typed(facts["output_error"], float, f"'output_error' of {what}")
                }
        return found


def counted(format: Format) -> tuple[str, ...]:
    """The factors without which the number of parameters is not known."""
    return format.counted_by


def drawn(format: Format) -> tuple[str, ...]:
    """The factors that the counts and a picture need."""
    return tuple(dict.fromkeys((*format.counted_by, *format.drawn_by)))


def show_report(found: Report) -> None:
    """Print a report as a table."""
    head, rows = found.cells()
    print_table(head, [*rows[:-1], ("",) * len(head), rows[-1]], right=NUMBERS)
    for name, what in found.unseen.items():
        say(f"not in any row: {name} ({what})")


def with_factors(model: str, wanted: Wanted) -> Any:
    """Load a model without its weights but for some factors.

    Args:
        model: A folder, or a name on the Hub, whose files are fetched if there is such a factor.
        wanted: The factors to read, by the format.

    Returns:
        The model, everything else on the meta device; the whole one where the files have other names for the factors.
    """
    empty = models.skeleton(model)
    layers = structured_layers(empty)
    names = [f"{layer}.{factor}" for layer, module in layers.items() for factor in wanted(module.format)]
    tensors = read_some(models.folder_of(model), names) if names else {}
    if len(tensors) < len(names):
        return models.load(model, models.Placement(device="cpu"))
    empty.load_state_dict(tensors, strict=False, assign=True)
    return empty


def read_some(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of these names that the safetensors files of a folder have."""
    missing, found = set(names), dict[str, Tensor]()
    for path in sorted(folder.glob("*.safetensors")):
        with opened_tensors(path) as file:
            here = missing & set(file.keys())
            found |= {name: file.get_tensor(name) for name in here}
        missing -= here
    return found


def draw(model: str, filled: Any, folder: Path) -> None:
    """Draw the structures of a model.

    Args:
        model: A folder, or a name on the Hub.
        filled: The model with the factors that the pictures need.
        folder: The folder for the pictures.

    Raises:
        ValueError: If no layer has a structure with a picture.
    """
    layers = {name: module for name, module in structured_layers(filled).items() if module.format.drawn_by}
    if not layers:
        raise ValueError(f"expected GBLR, Gaudi-GBLR or BLAST layers to draw, got none in {model!r}")
    coupled = {name: layer for name, layer in layers.items() if layer.format.has_couplings}
    learned = {name: layer for name, layer in layers.items() if layer.format.has_overlap}
    if learned:
        for module in learned.values():
            hollow_(module)
        save(structure_maps(learned, title="components over each matrix"), folder / "structure.png")
        history = read_history(Path(model))
        if len(history) > 1:
            save(budget_shares(history, title="the budget while the structure was learned"), folder / "budget.png")
        elif any(module.format.learns for module in learned.values()):
            say("no budget.png: there is no trainer_state.json with two entries or more of a structure's learning")
    for name, layer in coupled.items():
        save(couplings(layer, title=name), folder / f"couplings-{name}.png")


def hollow_(module: Any) -> None:
    """Give contents without values zeros that take no memory, in place; pictures show the segments alone."""
    zeros = {name: torch.zeros(()).expand(factor.shape) for name, factor in module.factors.items() if factor.is_meta}
    module.load_state_dict(zeros, strict=False, assign=True)


def save(figure: Any, path: Path) -> None:
    """Write a figure, atomically."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    say(f"wrote {path}")


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Read how the structure was learned, from the state of the trainer that wrote a model or checkpoints beside it.

    Args:
        folder: The folder of a model, a checkpoint, or a run with checkpoints.

    Returns:
        The entries of ``StructureCallback.history``; none where there is no such state.
    """
    states = [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]
    found: list[list[dict[str, Any]]] = [[]]
    for path in states:
        if path.is_file():
            found.append(history_in(path))
    return max(found, key=len)


def history_in(path: Path) -> list[dict[str, Any]]:
    """The history of learning in the state of a trainer; empty where it has none."""
    state = read_json(path, "the state of a trainer", scale=STATE_SCALE)
    with _checks.about(str(path)):
        callbacks = _checks.typed(state, dict, "the state of a trainer").get("stateful_callbacks") or {}
        if CALLBACK not in _checks.typed(callbacks, dict, "'stateful_callbacks'"):
            return []
        attributes = _checks.fields(callbacks[CALLBACK], {"attributes": dict}, f"the state of {CALLBACK}")["attributes"]
        history = _checks.fields(attributes, {"history": list}, f"'attributes' of {CALLBACK}")["history"]
        return [_checked_entry(entry) for entry in history]


def _checked_entry(entry: Any) -> dict[str, Any]:
    """An entry of the history of learning, with the fields that a picture needs."""
    found = _checks.fields(entry, {"step": int, "structure_share": float, "costs": dict}, "an entry of the history")
    _checks.values(found["costs"], float, "'costs' of an entry of the history")
    return entry
