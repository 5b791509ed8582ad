"""``structmat.inspect.reports``: what a model is and costs, as a table or JSON, and pictures of what it has learned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import safe_open
from torch import Tensor

from structmat._files import write_atomically
from structmat._tables import print_table, share
from structmat.cli import models, options
from structmat.cli.output import read_record
from structmat.cli.show import count, say
from structmat.formats import Blast, Format, GaudiGblr, Gblr
from structmat.inspect.reports import Report
from structmat.inspect.reports import report as report_on
from structmat.nn import StructuredModule

COUNTED: dict[type[Format], tuple[str, ...]] = {GaudiGblr: ("location", "width", "sigma")}
"""Factors without which a format's parameters are not known."""

DRAWN: dict[type[Format], tuple[str, ...]] = {
    **COUNTED,
    Gblr: ("start", "width", "order"),
    Blast: ("left", "diag", "right"),
}
"""Factors that a picture needs."""

CALLBACK = "StructureCallback"
"""Under which name a trainer's state holds the history of learning."""


def report(
    model: options.Model,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FOLDER",
            help="Draw what was learned: structure.png and, after a training, budget.png for GBLR and Gaudi-GBLR; the "
            "couplings of each BLAST layer.",
        ),
    ] = None,
) -> None:
    """Show what each layer of a model is and costs, and its error if compress made it.

    Of the weights it reads the widths of Gaudi-GBLR layers alone, and what the pictures need.
    """
    filled = with_factors(model, COUNTED if plot is None else DRAWN)
    found = report_on(filled)
    record = (read_record(Path(model)) if Path(model).is_dir() else None) or {}
    fitted = record["layers"] if record.get("command") == "compress" else {}
    errors = {name: facts["error"] for name, facts in fitted.items()}
    found = dataclasses.replace(
        found, rows=tuple(dataclasses.replace(row, error=errors.get(row.name)) for row in found.rows)
    )
    if plot is not None:
        draw(model, filled, plot)
    if as_json:
        print(found.to_json())
    else:
        show_report(found)


def show_report(found: Report) -> None:
    """Print a report as a table."""
    rows = [
        (
            row.name,
            f"{row.format} {row.settings}".strip(),
            f"{row.shape[0]} x {row.shape[1]}",
            count(row.parameters),
            share(row.parameters, row.dense_parameters),
            count(row.multiplications),
            "" if row.error is None else f"{row.error:.4f}",
            row.note,
        )
        for row in found.rows
    ]
    total = (
        "whole model", "", "", count(found.parameters), share(found.parameters, found.dense_parameters),
        count(found.multiplications), "", f"{share(found.multiplications, found.dense_multiplications)} of dense",
    )  # fmt: skip
    head = ("layer", "format", "shape", "parameters", "keep", "mult. per token", "error", "")
    print_table(head, [*rows, ("",) * len(head), total], right=(3, 4, 5, 6))
    for name, what in found.unseen.items():
        say(f"not in any row: {name} ({what})")


def with_factors(model: str, wanted: Mapping[type[Format], tuple[str, ...]]) -> Any:
    """A model without its weights but for some factors of the layers of some formats.

    Args:
        model: Folder, or name on the Hub, whose files are fetched if there is such a layer.
        wanted: Names of the factors by format.

    Returns:
        The model, everything else on the meta device; the whole one where the files have other names for the factors.
    """
    empty = models.skeleton(model)
    names = [
        f"{layer}.{factor}"
        for layer, module in structured(empty, *wanted).items()
        for factor in wanted[type(module.format)]
    ]
    tensors = read_some(models.folder_of(model), names) if names else {}
    if len(tensors) < len(names):
        return models.load(model, device="cpu")
    empty.load_state_dict(tensors, strict=False, assign=True)
    return empty


def structured(model: Any, *formats: type[Format]) -> dict[str, StructuredModule]:
    """The layers of some formats by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, StructuredModule) and isinstance(module.format, formats)
    }


def read_some(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of the tensors that the safetensors files of a folder have, by name."""
    missing, found = set(names), dict[str, Tensor]()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            here = missing & set(file.keys())
            found |= {name: file.get_tensor(name) for name in here}
        missing -= here
    return found


def draw(model: str, filled: Any, folder: Path) -> None:
    """Draw what there is to see in the structures of a model.

    Args:
        model: Folder, or name on the Hub.
        filled: The model, with the segments of its layers.
        folder: Of the pictures.

    Raises:
        ValueError: If no layer has a structure with a picture.
    """
    from structmat.inspect.plots import budget_shares, couplings, structure_maps  # noqa: PLC0415 - the extra ``plot``

    learned, blast = structured(filled, GaudiGblr, Gblr), structured(filled, Blast)
    if not learned and not blast:
        raise ValueError(f"expected GBLR, Gaudi-GBLR or BLAST layers to draw, got none in {model!r}")
    if learned:
        for module in learned.values():
            hollow_(module)
        save(structure_maps(learned, title="components over each matrix"), folder / "structure.png")
        history = read_history(Path(model))
        if len(history) > 1:
            save(budget_shares(history, title="the budget while the structure was learned"), folder / "budget.png")
        elif structured(filled, GaudiGblr):
            say("no budget.png: there is no trainer_state.json with two entries or more of a structure's learning")
    for name, layer in blast.items():
        save(couplings(layer, title=name), folder / f"couplings-{name}.png")


def hollow_(module: StructuredModule) -> None:
    """Give contents without values zeros that take no memory, in place: where the blocks are is all that is drawn."""
    zeros = {name: torch.zeros(()).expand(factor.shape) for name, factor in module.factors.items() if factor.is_meta}
    module.load_state_dict(zeros, strict=False, assign=True)


def save(figure: Any, path: Path) -> None:
    """Write a figure, atomically."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    say(f"wrote {path}")


def read_history(folder: Path) -> list[dict[str, Any]]:
    """How the structure was learned, from the state of the trainer that wrote a model or checkpoints beside it.

    Args:
        folder: Of the model, a checkpoint, or a run with checkpoints.

    Returns:
        The entries of ``StructureCallback.history``; none where there is no such state.
    """
    states = [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]
    found: list[list[dict[str, Any]]] = [[]]
    for path in states:
        if path.is_file():
            callbacks = json.loads(path.read_text(encoding="utf-8")).get("stateful_callbacks") or {}
            if CALLBACK in callbacks:
                found.append(callbacks[CALLBACK]["attributes"]["history"])
    return max(found, key=len)
