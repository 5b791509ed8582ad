"""Times of ``structmat bench``: as tables, as JSON and as pictures."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from structmat._files import write_atomically
from structmat._tables import print_table
from structmat.bench import LayerBench
from structmat.bench.models import GenerationBench, ModelTime
from structmat.bench.plots import layer_speeds, model_speeds
from structmat.bench.results import LayerTime
from structmat.cli.output import write_json
from structmat.cli.show import say


def show_layers(found: LayerBench) -> None:
    """Print times of layers as a table."""
    columns: dict[str, Callable[[LayerTime], str]] = {
        "shape": lambda time: f"{time.shape[0]} x {time.shape[1]}",
        "dtype": lambda time: time.dtype,
        "step": lambda time: time.step,
        "tokens": lambda time: str(time.tokens),
        "format": lambda time: time.format,
        "algorithm": lambda time: time.algorithm,
        "time": lambda time: seconds(time.seconds.median),
        "spread": lambda time: f"{time.seconds.spread:.0%}",
        "speed-up": lambda time: f"{time.speedup:.2f}x",
        "of peak flops": lambda time: f"{time.flop_share:.2f}",
        "of peak bytes": lambda time: f"{time.byte_share:.2f}",
        "of limit": lambda time: f"{time.limit_share:.2f}",
        "dense of limit": lambda time: f"{time.dense_limit_share:.2f}",
    }
    rows = [[cell(time) for cell in columns.values()] for time in found.times]
    print_table(list(columns), rows, right=range(6, 13))
    for dtype, peak in found.peaks.items():
        say(f"measured peaks, {dtype}: {peak.flops / 1e9:,.0f} GFLOP/s, {peak.bytes / 1e9:,.1f} GB/s")


def show_models(found: GenerationBench) -> None:
    """Print times of models as a table."""
    columns: dict[str, Callable[[ModelTime], str]] = {
        "model": lambda time: time.model,
        "step": lambda time: time.step,
        "tokens": lambda time: str(time.tokens),
        "time": lambda time: seconds(time.seconds.median),
        "spread": lambda time: f"{time.seconds.spread:.0%}",
        "tokens/s": lambda time: f"{time.tokens_per_second:,.1f}",
        "speed-up": lambda time: f"{time.speedup:.2f}x",
        "": lambda time: "extrapolated" if time.extrapolated else "",
    }
    rows = [[cell(time) for cell in columns.values()] for time in found.times]
    print_table(list(columns), rows, right=(2, 3, 4, 5, 6))
    for name, size in found.sizes.items():
        peak = "" if size.peak_bytes is None else f", peak {size.peak_bytes / 2**30:.2f} GiB"
        say(f"{name}: {size.parameters / 1e6:,.1f} M parameters, {size.bytes / 2**30:.2f} GiB{peak}")
    if any(size.peak_bytes is None for size in found.sizes.values()):
        say("the peak memory is measured on a GPU alone; on a CPU, the weights are what is known")


def seconds(value: float) -> str:
    """A time in a unit that suits it."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def write(found: LayerBench | GenerationBench, folder: Path) -> None:
    """Write everything as JSON, and a picture."""
    write_json(folder / "bench.json", found.to_dict())
    say(f"wrote {folder / 'bench.json'}")
    if importlib.util.find_spec("matplotlib") is None:
        say("no bench.png, which needs matplotlib: pip install 'structmat[plot]'")
        return
    figure = layer_speeds(found) if isinstance(found, LayerBench) else model_speeds(found)
    write_atomically(folder / "bench.png", lambda temporary: figure.savefig(temporary, format="png"))
    say(f"wrote {folder / 'bench.png'}")
