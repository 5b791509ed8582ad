"""Pictures: trade-off curves, couplings, and what a structure has learned (needs the extra ``plot``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from structmat.inspect.kinds import kinds
from structmat.inspect.maps import overlap_map
from structmat.nn import StructuredModule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""The palette of Okabe and Ito, which colour-blind people can tell apart."""

MARKERS = ("o", "s", "^", "D", "v", "P")
"""The markers of the curves."""

KINDS = 8
"""The largest number of kinds of layers that have a colour of their own in ``budget_shares``; the rest share one."""

PIXELS = 256
"""The largest number of pixels of a structure map along each axis; a larger matrix is averaged over patches."""


def new_figure(width: float, height: float, **grid: Any) -> tuple[Figure, Any]:
    """Make a figure with panels.

    Args:
        width: The width in inches.
        height: The height in inches.
        **grid: The arguments of ``Figure.subplots``.

    Returns:
        The figure and its panels.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - an optional dependency at its one door
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'structmat[plot]'") from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    return figure, figure.subplots(**grid)


def trade_off(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    *,
    reference: tuple[float, float],
    x_label: str = "multiplications, share of dense",
    y_label: str = "test accuracy",
    title: str = "",
) -> Figure:
    """Draw the quality that each structure reaches at each cost.

    Args:
        curves: The points ``(cost, quality)`` of each structure by name.
        reference: The dense network's point.
        x_label: The label of the cost.
        y_label: The label of the quality.
        title: The title of the figure.

    Returns:
        The figure; ``figure.savefig(path)`` writes it.

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure, axes = new_figure(6.4, 4.2)
    axes.axhline(reference[1], color="0.6", linewidth=1, linestyle="--", zorder=0)
    axes.plot(*reference, "*", color="black", markersize=11, linestyle="none", label="dense")
    for k, (name, points) in enumerate(curves.items()):
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, color=COLORS[k % 6], marker=MARKERS[k % 6], markersize=5, linewidth=1.5, label=name)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def couplings(layer: StructuredModule, *, title: str = "") -> Figure:
    """Draw the couplings of a layer, such as a BLAST one: how much of each shared component every block uses.

    On the left, the root mean square of ``diag_ij`` over the components, as the ``I x J`` grid of blocks. On the
    right, ``diag_ij`` of every component, the components ordered by how unevenly the blocks use them; a low-rank
    matrix would show the same value in all of a column.

    Args:
        layer: A layer whose format has couplings, such as ``Blast``.
        title: The title of the figure.

    Returns:
        The figure; ``figure.savefig(path)`` writes it.

    Raises:
        TypeError: If the format of the layer has no couplings.
        ImportError: If matplotlib is missing.
    """
    diag = layer.format.couplings(layer.factors).cpu()  # (I, J, R)
    I, J, _ = diag.shape
    spread = diag.abs().std((0, 1), correction=0) / diag.abs().mean((0, 1)).clamp_min(1e-12)
    ordered = diag.view(I * J, -1)[:, spread.argsort(descending=True)]

    figure, (grid, lines) = new_figure(9.2, 3.8, ncols=2, width_ratios=(1, 2))
    image = grid.imshow(diag.square().mean(-1).sqrt().numpy(), cmap="viridis", vmin=0)
    grid.set(xlabel="block column j", ylabel="block row i", title="strength of each block")
    grid.set_xticks(range(J))
    grid.set_yticks(range(I))
    figure.colorbar(image, ax=grid, shrink=0.8)
    limit = float(ordered.abs().quantile(0.99))
    image = lines.imshow(
        ordered.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
    )
    lines.set(xlabel="component r, most uneven first", ylabel="block (i, j)", title="couplings s_ij,r")
    step = max(1, I * J // 8)
    lines.set_yticks(range(0, I * J, step), [f"({b // J}, {b % J})" for b in range(0, I * J, step)])
    figure.colorbar(image, ax=lines, shrink=0.8)
    figure.suptitle(title)
    return figure


def structure_maps(layers: Mapping[str, StructuredModule], *, columns: int | None = None, title: str = "") -> Figure:
    """Draw how many components lie over each entry of GBLR and Gaudi-GBLR matrices (Gaudi-GBLR, figure 1).

    Args:
        layers: The layers by name.
        columns: The largest number of panels in a row; None for 4, or about as many as rows where there are many
            layers.
        title: The title of the figure.

    Returns:
        The figure; ``figure.savefig(path)`` writes it. All panels share one scale of brightness; matrices of more than
        ``PIXELS`` rows or columns are averaged over patches.

    Raises:
        ValueError: If there is no layer.
        TypeError: If the format of a layer has no segments.
        ImportError: If matplotlib is missing.
    """
    if not layers:
        raise ValueError("expected at least one GBLR or Gaudi-GBLR layer to draw, got none")
    maps = {name: overlap_map(layer, PIXELS) for name, layer in layers.items()}
    columns = min(max(4, math.isqrt(len(maps))) if columns is None else columns, len(maps))
    rows = -(-len(maps) // columns)
    figure, grid = new_figure(2.2 * columns + 0.8, 2.2 * rows + 0.4, nrows=rows, ncols=columns, squeeze=False)
    most = max(float(counts.max()) for counts in maps.values())
    for k, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if k < len(maps):
            name, counts = list(maps.items())[k]
            image = axes.imshow(
                counts.cpu().numpy(), cmap="magma", vmin=0, vmax=max(most, 1), aspect="auto", interpolation="nearest"
            )
            M, N = layers[name].format.shape
            share = layers[name].format.num_parameters(layers[name].factors) / (M * N)
            axes.set_title(f"{_short(name)}\n{M} x {N}, keep {share:.2f}", size=6)
            if k == 0:
                figure.colorbar(image, ax=list(grid.flat), shrink=0.6, fraction=0.04, label="components")
    figure.suptitle(title)
    return figure


def _short(name: str, longest: int = 36) -> str:
    """The end of a name, which tells it from others best."""
    return name if len(name) <= longest else f"…{name[-longest + 1 :]}"


def budget_shares(history: Sequence[Mapping[str, Any]], *, title: str = "") -> Figure:
    """Draw how one budget is shared among layers while their structure is learned.

    Above, the share that each layer has of the cost of all, one area for each layer: layers whose names differ in
    numbers alone have one colour, the first of them the darkest. Below, the cost of all, relative to dense.

    Args:
        history: The entries that ``StructureCallback`` of the integration of transformers keeps, each with ``"step"``,
            ``"structure_share"`` (cost of all layers, relative to dense) and ``"costs"`` (share of each layer in it).
        title: The title of the figure.

    Returns:
        The figure; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: If there are fewer than two entries.
        ImportError: If matplotlib is missing.
    """
    if len(history) < 2:
        raise ValueError(f"expected a history of at least two entries to draw, got {len(history)}; log more often")
    steps = [entry["step"] for entry in history]
    figure, (axes, total) = new_figure(7.6, 5.0, nrows=2, height_ratios=(4, 1), sharex=True)
    floor = torch.zeros(len(steps))
    for k, (label, names) in enumerate(kinds(list(history[-1]["costs"]), history[-1]["costs"], KINDS).items()):
        bottom, ceilings = floor, []
        for name in names:
            floor = floor + torch.tensor([entry["costs"].get(name, 0.0) for entry in history])
            ceilings.append(floor)
        for depth in reversed(range(len(names))):  # each over the ones above it: no gaps between them
            color = _lighter(_KIND_COLORS[k], 0.65 * depth / max(1, len(names) - 1))
            axes.fill_between(steps, bottom.numpy(), ceilings[depth].numpy(), color=color, linewidth=0)
        axes.plot(steps, floor.numpy(), color="white", linewidth=1)
        last = float(floor[-1] - bottom[-1])
        text = f"{label}, {len(names)} x: {last:.0%}" if len(names) > 1 else f"{label}: {last:.0%}"
        axes.fill_between([], [], color=_KIND_COLORS[k], label=text)
    axes.set(ylabel="share of the budget", ylim=(0, 1), xlim=(steps[0], steps[-1]), title=title)
    legend = {"title": "layers, dark to light: first\nto last; share at the end", "title_fontsize": 8}
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "alignment": "left"}
    axes.legend(frameon=False, reverse=True, fontsize=8, **legend, **place)
    shares = [entry["structure_share"] for entry in history]
    total.plot(steps, shares, color="black", linewidth=1.5)
    total.set(xlabel="step", ylabel="cost / dense", ylim=(0, 1.15 * max(shares) or 1))
    total.grid(alpha=0.25)
    total.spines[["top", "right"]].set_visible(False)
    return figure


_KIND_COLORS = (*COLORS, "#B8A800", "#666666")


def _lighter(color: str, share: float) -> tuple[float, ...]:
    """A colour mixed with this share of white."""
    return tuple(int(color[k : k + 2], 16) / 255 * (1 - share) + share for k in (1, 3, 5))


def heat_map(rows: Mapping[str, Sequence[float]], columns: Sequence[str], *, title: str = "") -> Figure:
    """Draw a table of numbers, each written into its cell.

    Args:
        rows: The numbers of each row by its name.
        columns: The names of the columns.
        title: The title of the figure.

    Returns:
        The figure; ``figure.savefig(path)`` writes it.

    Raises:
        ImportError: If matplotlib is missing.
    """
    values = torch.tensor(list(rows.values()))
    figure, axes = new_figure(2.8 + 0.85 * len(columns), 1.4 + 0.42 * len(rows))
    image = axes.imshow(values.numpy(), cmap="viridis_r", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), list(rows))
    middle = float(values.min() + values.max()) / 2
    for i, row in enumerate(values.tolist()):
        for j, value in enumerate(row):
            axes.text(
                j, i, f"{value:.2f}", ha="center", va="center", size=8, color="white" if value > middle else "black"
            )
    axes.set_title(title)
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure
