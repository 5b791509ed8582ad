"""Pictures of times (needs the extra ``plot``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from structmat.bench.models import GenerationBench
from structmat.bench.results import LayerBench, LayerTime
from structmat.inspect.plots import COLORS, MARKERS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def layer_speeds(found: LayerBench) -> Figure:
    """Draw how many times faster than dense each format is over the number of tokens.

    Args:
        found: The result of ``bench_layers``.

    Returns:
        A panel for each shape, dtype and step, all with one scale; the shaded bands span the quartiles of the times,
        and a dashed line is what was chosen for this machine.

    Raises:
        ImportError: If matplotlib is missing.
    """
    columns = list(dict.fromkeys(time.shape for time in found.times))
    rows = list(dict.fromkeys((time.dtype, time.step) for time in found.times))
    size = 3.6 * len(columns) + 1, 2.6 * len(rows) + 0.6
    figure, grid = new_figure(*size, nrows=len(rows), ncols=len(columns), squeeze=False, sharex=True, sharey=True)
    formats = list(dict.fromkeys(time.format for time in found.times))
    for (dtype, step), line in zip(rows, grid, strict=True):
        for shape, axes in zip(columns, line, strict=True):
            here = [time for time in found.times if (time.dtype, time.step, time.shape) == (dtype, step, shape)]
            for k, name in enumerate(formats):
                _draw_format(axes, [time for time in here if time.format == name], COLORS[k % 6], MARKERS[k % 6])
            axes.axhline(1, color="0.6", linewidth=1, zorder=0)
            axes.set_xscale("log", base=2)
            axes.set_title(f"{shape[0]} x {shape[1]}, {dtype}, {step}", size=8)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("tokens", size=9)
    figure.supylabel("times faster than dense", size=9)
    grid[0][0].legend(frameon=False, fontsize=7)
    return figure


def _draw_format(axes: Any, times: Sequence[LayerTime], color: str, marker: str) -> None:
    """Draw one format: the automatic algorithm with its quartiles, and what was chosen where that is another."""
    plain = sorted((time for time in times if time.algorithm == "automatic"), key=lambda time: time.tokens)
    tokens, name = [time.tokens for time in plain], times[0].format
    axes.plot(tokens, [time.speedup for time in plain], color=color, marker=marker, markersize=4, label=name)
    low = [time.dense_seconds.low / time.seconds.high for time in plain]
    high = [time.dense_seconds.high / time.seconds.low for time in plain]
    axes.fill_between(tokens, low, high, color=color, alpha=0.15, linewidth=0)
    chosen = {time.tokens: time.speedup for time in times if time.algorithm != "automatic"}
    if chosen:
        speeds = [chosen.get(time.tokens, time.speedup) for time in plain]
        axes.plot(tokens, speeds, color=color, linestyle="--", label=f"{name}, chosen")


def model_speeds(found: GenerationBench) -> Figure:
    """Draw how many times faster than the reference each model is at each thing that it does.

    Args:
        found: The result of ``bench_generation``.

    Returns:
        The bars, grouped by what is done.

    Raises:
        ImportError: If matplotlib is missing.
    """
    steps = list(dict.fromkeys((time.step, time.tokens) for time in found.times))
    models = list(dict.fromkeys(time.model for time in found.times))
    figure, axes = new_figure(max(6.4, 0.5 * len(steps) * len(models)), 3.8)
    width = 0.8 / len(models)
    for k, name in enumerate(models):
        speeds = {(time.step, time.tokens): time.speedup for time in found.times if time.model == name}
        places = [place + (k - (len(models) - 1) / 2) * width for place in range(len(steps))]
        axes.bar(places, [speeds[step] for step in steps], width, color=COLORS[k % 6], label=name)
    axes.axhline(1, color="0.6", linewidth=1, zorder=0)
    axes.set_xticks(range(len(steps)), [f"{step}\n{tokens}" for step, tokens in steps], fontsize=8)
    axes.set_ylabel(f"times faster than {models[0]}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return figure
