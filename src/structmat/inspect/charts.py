"""The geometry of the charts of a page; the template draws them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from structmat.inspect.kinds import depths
from structmat.inspect.reports import Row

WIDTH, HEIGHT = 300.0, 110.0
"""The size of a panel in units of its own."""

LEFT, RIGHT, TOP, BOTTOM = 34.0, 296.0, 8.0, 90.0
"""The edges of the plot in a panel."""


@dataclass(frozen=True)
class Mark:
    """A bar or a dot.

    Attributes:
        x: The left edge of a bar, or the middle of a dot.
        y: The upper edge of a bar, or the middle of a dot.
        width: The width of a bar; 0 for a dot.
        height: The height of a bar; 0 for a dot.
        kind: The name of the class in the style sheet.
        text: What the mark says.
    """

    x: float
    y: float
    width: float
    height: float
    kind: str
    text: str


@dataclass(frozen=True)
class Share:
    """What the layers of one kind cost together, as one bar.

    Attributes:
        label: The kind.
        formats: The formats of the layers, each with its number of layers.
        kept: The number of parameters.
        dense: The number of parameters if dense.
        kept_bytes: The bytes that are stored.
        dense_bytes: The bytes if dense.
        track: The length of the bar if dense, in percent.
        segments: The part of each format that remains: its class in the style sheet, where it begins, and its length.
    """

    label: str
    formats: str
    kept: int
    dense: int
    kept_bytes: int
    dense_bytes: int
    track: float
    segments: tuple[tuple[str, float, float], ...]


def share_bars(
    grouped: Mapping[str, Sequence[Row]], sizes: Mapping[str, tuple[int, int]], classes: Mapping[str, str]
) -> list[Share]:
    """Draw what each kind of layers costs, the largest first.

    Args:
        grouped: The layers of each kind.
        sizes: The bytes of each layer, as they are and if dense.
        classes: The class in the style sheet for each format.

    Returns:
        A bar for each kind.
    """
    most = max((sum(row.dense_parameters for row in rows) for rows in grouped.values()), default=0) or 1
    found = [_share(label, rows, sizes, classes, 100 / most) for label, rows in grouped.items()]
    return sorted(found, key=lambda one: -one.dense)


def _share(
    label: str, rows: Sequence[Row], sizes: Mapping[str, tuple[int, int]], classes: Mapping[str, str], scale: float
) -> Share:
    """What the layers of one kind cost together."""
    counts = Counter(row.format for row in rows)
    segments: list[tuple[str, float, float]] = []
    begin = 0.0
    for name in counts:
        length = scale * sum(row.parameters for row in rows if row.format == name)
        segments.append((classes[name], begin, length))
        begin += length
    return Share(
        label,
        ", ".join(f"{number} x {name}" for name, number in counts.items()),
        sum(row.parameters for row in rows),
        sum(row.dense_parameters for row in rows),
        sum(sizes[row.name][0] for row in rows),
        sum(sizes[row.name][1] for row in rows),
        scale * sum(row.dense_parameters for row in rows),
        tuple(segments),
    )


@dataclass(frozen=True)
class Panel:
    """The layers of one kind over the depth.

    Attributes:
        title: The kind.
        caption: What is below the title.
        description: What the panel shows, in a sentence.
        tracks: The bars behind the others, for what a dense layer has.
        marks: The bars or dots.
        x_ticks: The positions and texts along the depth.
        y_ticks: The positions and texts along the values.
    """

    title: str
    caption: str
    description: str
    tracks: tuple[Mark, ...]
    marks: tuple[Mark, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


def keep_panel(title: str, rows: Sequence[Row], caption: str, classes: Mapping[str, str]) -> Panel:
    """Draw the share of its parameters that each layer of a kind keeps.

    Args:
        title: The kind.
        rows: The layers, in order.
        caption: What is below the title.
        classes: The class in the style sheet for each format.

    Returns:
        The panel.
    """
    at, slot, x_ticks = _axis(rows)
    bar = max(slot * 0.8, min(slot, 1.0))
    tracks, marks = [], []
    for x, row in zip(at, rows, strict=True):
        share = row.parameters / row.dense_parameters if row.dense_parameters else 0.0
        height = (BOTTOM - TOP) * min(share, 1.0)
        text = f"{row.name}: {row.format}, keep {share:.3f}"
        tracks.append(Mark(x - bar / 2, TOP, bar, BOTTOM - TOP, "track", ""))
        marks.append(Mark(x - bar / 2, BOTTOM - height, bar, height, classes[row.format], text))
    shares = [row.parameters / row.dense_parameters for row in rows if row.dense_parameters]
    span = f"from {min(shares):.2f} to {max(shares):.2f}" if shares else "with nothing"
    description = f"The share of its parameters that each of the {len(rows)} layers {title} keeps, {span}."
    return Panel(title, caption, description, tuple(tracks), tuple(marks), x_ticks, _y_ticks(1.0))


def error_panel(title: str, rows: Sequence[Row], caption: str, most: float) -> Panel:
    """Draw the errors of the layers of a kind: dots for outputs and rings for weights.

    Args:
        title: The kind.
        rows: The layers, in order, some with errors.
        caption: What is below the title.
        most: The value at the upper edge.

    Returns:
        The panel.
    """
    at, _, x_ticks = _axis(rows)
    marks: list[Mark] = []
    series: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
        ("weight", "error of the weight", lambda row: row.error),
        ("output", "error of the output", lambda row: row.output_error),
    )
    for kind, what, value_of in series:
        for x, row in zip(at, rows, strict=True):
            value = value_of(row)
            if value is not None:
                y = BOTTOM - (BOTTOM - TOP) * min(value / most, 1.0)
                marks.append(Mark(x, y, 0, 0, kind, f"{row.name}: {what} {value:.3f}"))
    description = f"The relative errors of the layers {title}, by depth."
    return Panel(title, caption, description, (), tuple(marks), x_ticks, _y_ticks(most))


def rounded_up(values: Iterable[float]) -> float:
    """Find the end of an axis: a round number up to 1 that no value exceeds; the largest value where it is above 1."""
    most = max(values, default=1.0)
    return next((end for end in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0) if most <= end), most)


def _axis(rows: Sequence[Row]) -> tuple[list[float], float, tuple[tuple[float, str], ...]]:
    """The middle of each layer along the depth, the width of one layer, and the texts below."""
    found = depths([row.name for row in rows])
    first, last = min(found), max(found)
    slot = (RIGHT - LEFT) / (last - first + 1)
    at = [LEFT + slot * (depth - first + 0.5) for depth in found]
    ends = {first, (first + last) // 2, last} if last - first > 5 else set(range(first, last + 1))
    return at, slot, tuple((LEFT + slot * (depth - first + 0.5), str(depth)) for depth in sorted(ends))


def _y_ticks(most: float) -> tuple[tuple[float, str], ...]:
    return tuple((BOTTOM - (BOTTOM - TOP) * share, f"{most * share:.3g}") for share in (0.0, 0.5, 1.0))
