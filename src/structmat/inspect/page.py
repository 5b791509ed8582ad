"""A report as one HTML page that needs neither a network nor JavaScript (needs the extra ``report``)."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from structmat import _checks
from structmat._tables import share
from structmat._version import __version__
from structmat.inspect import maps
from structmat.inspect.charts import Panel, error_panel, keep_panel, rounded_up, share_bars
from structmat.inspect.kinds import OTHERS, kinds
from structmat.inspect.reports import NUMBERS, Report, Row
from structmat.network.sites import DENSE_KINDS, dense_weight
from structmat.nn import StructuredModule

KINDS = 12
"""The largest number of kinds of layers that have a panel; the rest share one line."""

SHOWN = 4
"""The largest number of layers whose maps are shown at once; the others are folded."""

COLORS = 6
"""The number of colours for formats in the style sheet."""

PIXELS, SMALL = 128, 64
"""The largest size of a map that is shown at once, and of one that is folded."""


@dataclass(frozen=True)
class Quality:
    """What a network was measured to be before and after a change of it.

    Attributes:
        unit: What was measured, such as ``"perplexity"``.
        before: The value before.
        after: The value after.
    """

    unit: str
    before: float
    after: float

    @property
    def change(self) -> str:
        """The change relative to the value before, as text; empty where that is 0."""
        return f"{self.after / self.before - 1:+.1%}".replace("%", " %") if self.before else ""


@dataclass(frozen=True)
class Story:
    """What is known of a model beside what is in it.

    Attributes:
        title: The name of the model.
        command: The command that made it; empty where that is not known.
        options: The options of that command.
        versions: The versions of the libraries that made it.
        quality: What was measured; None where nothing was.
        speeds: The times that were measured: a head and rows of cells; empty where there are none.
        hardware: The machine on which the times were measured.
    """

    title: str
    command: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    quality: Quality | None = None
    speeds: Sequence[Sequence[str]] = ()
    hardware: str = ""


@dataclass(frozen=True)
class Picture:
    """The maps of one layer.

    Attributes:
        name: The layer.
        caption: What the layer is.
        images: Each image with its description, and whether it is wide.
    """

    name: str
    caption: str
    images: tuple[tuple[str, str, bool], ...]


def page(model: nn.Module, found: Report, story: Story) -> str:
    """Write a report as a page.

    Args:
        model: The network of the report; weights that no picture needs may be on the meta device.
        found: The report, with the errors where they are known.
        story: What else is known.

    Returns:
        The page, which holds its pictures and its style.

    Raises:
        ImportError: If jinja2 is missing.
    """
    try:
        import jinja2  # noqa: PLC0415 - an optional dependency at its one door
    except ImportError as error:
        raise ImportError("pages need jinja2: pip install 'structmat[report]'") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("structmat.inspect"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"short": short, "bytes": bytes_text, "number": "{:,}".format}
    return environment.get_template("report.html").render(_context(model, found, story))


def _context(model: nn.Module, found: Report, story: Story) -> dict[str, Any]:
    """Everything that the template shows."""
    sizes = {row.name: _sizes(model.get_submodule(row.name), row) for row in found.rows}
    grouped = _grouped(found.rows)
    total = stored_bytes(model)
    pictures = _pictures(model, grouped)
    head, cells = found.cells()
    formats = _formats(found.rows)
    classes = {name: facts["class"] for name, facts in formats.items()}
    return {
        "report": found,
        "story": story,
        "version": __version__,
        "bytes_after": total,
        "bytes_before": total + sum(dense - stored for stored, dense in sizes.values()),
        "formats": formats,
        "structured": _joint([row for row in found.rows if row.format != "dense"]),
        "shares": share_bars(grouped, sizes, classes),
        "keeps": _keeps(grouped, classes),
        "errors": _errors(grouped),
        "shown": pictures[:SHOWN],
        "folded": pictures[SHOWN:],
        "head": head,
        "cells": cells,
        "right": NUMBERS,
        "recipe": {name: _text(value) for name, value in story.options.items() if value not in (None, [], {}, False)},
    }


def _text(value: Any) -> str:
    """The value of an option, as text."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def stored_bytes(model: nn.Module) -> int:
    """Count the bytes of the parameters and buffers that a network saves; what is shared counts once.

    Args:
        model: The network, which may be on the meta device.

    Returns:
        The bytes.
    """
    saved = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(_bytes(tensor) for tensor in saved.values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _sizes(module: nn.Module, row: Row) -> tuple[int, int]:
    """The bytes of a layer's weight, and those of the dense weight; both 0 where an earlier row has it."""
    if not row.dense_parameters:
        return 0, 0
    if isinstance(module, StructuredModule):
        factors = list(module.factors.values())
    else:
        factors = [dense_weight(module)] if isinstance(module, tuple(DENSE_KINDS)) else []
    width = max((factor.element_size() for factor in factors if factor.is_floating_point()), default=4)
    return sum(map(_bytes, factors)), row.dense_parameters * width


def _grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each kind, in order."""
    by_name = {row.name: row for row in rows}
    found = kinds(list(by_name), {row.name: float(row.dense_parameters) for row in rows}, KINDS)
    return {label: [by_name[name] for name in names] for label, names in found.items()}


def _formats(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The formats in the order in which they come first, each with its class in the style sheet and its layers."""
    names = sorted({row.format for row in rows}, key=lambda name: (name == "dense", name))
    classes = {name: "dense" if name == "dense" else f"f{k % COLORS}" for k, name in enumerate(names)}
    return {
        name: {"class": classes[name], "count": sum(row.format == name for row in rows)}
        | _joint([row for row in rows if row.format == name])
        for name in names
    }


def _joint(rows: Sequence[Row]) -> dict[str, Any]:
    """The parameters of rows together, and the share that they keep."""
    kept, dense = sum(row.parameters for row in rows), sum(row.dense_parameters for row in rows)
    return {"kept": kept, "full": dense, "keep": share(kept, dense), "layers": len(rows)}


def _caption(rows: Sequence[Row]) -> str:
    """The shapes of the layers of a kind, and what they keep in all."""
    shapes = {f"{row.shape[0]} x {row.shape[1]}" for row in rows}
    return f"{shapes.pop() if len(shapes) == 1 else f'{len(shapes)} shapes'}, keep {_joint(rows)['keep'] or '-'}"


def _keeps(grouped: Mapping[str, Sequence[Row]], classes: Mapping[str, str]) -> list[Panel]:
    """A panel for each kind of which some layer is structured and that comes more than once."""
    return [
        keep_panel(label, rows, _caption(rows), classes)
        for label, rows in grouped.items()
        if len(rows) > 1 and label != OTHERS and any(row.format != "dense" for row in rows)
    ]


def _errors(grouped: Mapping[str, Sequence[Row]]) -> list[Panel]:
    """A panel for each kind with a layer whose error is known, all on one scale."""
    known = {label: rows for label, rows in grouped.items() if any(row.error is not None for row in rows)}
    values = [v for rows in known.values() for row in rows for v in (row.error, row.output_error) if v is not None]
    most = rounded_up(values)
    return [error_panel(label, rows, _error_caption(rows), most) for label, rows in known.items()]


def _error_caption(rows: Sequence[Row]) -> str:
    """The middle of the errors of a kind, those of outputs if they are known."""
    for what, found in (
        ("output", [row.output_error for row in rows if row.output_error is not None]),
        ("weight", [row.error for row in rows if row.error is not None]),
    ):
        if found:
            return f"median error of the {what} {statistics.median(found):.3f}"
    return ""


def _has_map(module: nn.Module) -> bool:
    """Whether there is a map of a layer."""
    return isinstance(module, StructuredModule) and (module.format.has_overlap or module.format.has_couplings)


def _pictures(model: nn.Module, grouped: Mapping[str, Sequence[Row]]) -> list[Picture]:
    """The maps of all layers that have some; first one from the middle of each kind, and then the others in order."""
    drawn = {label: [row for row in rows if _has_map(model.get_submodule(row.name))] for label, rows in grouped.items()}
    first = {rows[len(rows) // 2].name for rows in drawn.values() if rows}
    every = list(itertools.chain.from_iterable(drawn.values()))
    ordered = [row for row in every if row.name in first] + [row for row in every if row.name not in first]
    return [_picture(model.get_submodule(row.name), row, large=k < SHOWN) for k, row in enumerate(ordered)]


def _picture(module: nn.Module, row: Row, *, large: bool) -> Picture:
    """The maps of one layer; one that is not large has no single couplings."""
    layer = _checks.typed(module, StructuredModule, f"layer {row.name!r}")
    images: list[tuple[str, str, bool]] = []
    if layer.format.has_overlap:
        counts = maps.overlap_map(layer, PIXELS if large else SMALL)
        most = float(counts.max())
        text = f"components over each entry of the matrix, from {float(counts.min()):.0f} to {most:.0f}"
        images.append((maps.image_of(counts, most), text, False))
    if layer.format.has_couplings:
        strength = maps.strength_map(layer)
        most = float(strength.max())
        text = f"strength of each block, from {float(strength.min()):.2g} to {most:.2g}"
        images.append((maps.image_of(strength, most), text, False))
        if large:
            single = maps.coupling_map(layer)
            limit = float(single.abs().flatten()[:: max(1, single.numel() // 100_000)].quantile(0.99))
            images.append((maps.signed_image_of(single, limit), "coupling of each component with each block", True))
    caption = f"{row.format} {row.settings}, {row.shape[0]} x {row.shape[1]}, keep {_joint([row])['keep'] or '-'}"
    return Picture(row.name, caption, tuple(images))


def short(value: float) -> str:
    """Shorten a number, such as ``"2.64 M"``.

    Args:
        value: The number.

    Returns:
        The text.
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def bytes_text(value: float) -> str:
    """Write a number of bytes, such as ``"10.6 MB"``.

    Args:
        value: The number of bytes.

    Returns:
        The text.
    """
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"
