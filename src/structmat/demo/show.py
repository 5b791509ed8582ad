"""What the demo prints and draws."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from structmat._files import write_atomically
from structmat._tables import print_table, share
from structmat.demo.accuracy import Accuracies, Result
from structmat.demo.settings import Settings
from structmat.demo.speed import SIZE, TOKENS, Speed
from structmat.formats import FORMATS
from structmat.inspect.plots import couplings, structure_maps, trade_off
from structmat.nn import StructuredModule

DRAWN_LAYER = "blocks.0.qkv"
"""The layer whose couplings are drawn."""


def print_accuracies(found: Accuracies, settings: Settings, images: int) -> None:
    """Print the first table: the dense network, and every structure at the budget of the table."""
    seeds = "one seed" if settings.seeds == 1 else f"{settings.seeds} seeds, mean ± standard deviation"
    print(
        f"\nAccuracy of a small Vision Transformer on {images} test images of handwritten digits ({seeds}; one image "
        f"is {1 / images:.1%}),\nwith at most {settings.keep:g} of the parameters in its linear layers: compressed "
        "without data, then retrained; and trained from scratch.\n"
    )
    rows = [_row(result) for result in (found.dense, *found.results.values()) if result.keep in (1.0, settings.keep)]
    head = ("structure", "keep", "parameters", "mult./image", "of dense")
    results = ("weight error", "compressed", "retrained", "from scratch")
    print_table((*head, *results), rows, right=range(1, 9))


def _row(result: Result) -> tuple[str, ...]:
    facts = (
        label(result.name),
        f"{result.real_keep:.3f}",
        f"{result.parameters:,}",
        f"{result.multiplications:,}",
        share(result.relative_multiplications, 1),
    )
    if result.name == "dense":
        return (*facts, "", "", "", spread(result.before))
    error = spread(result.weight_error, "{:.3f}")
    return (*facts, error, spread(result.before), spread(result.after), spread(result.scratch))


def print_speeds(speeds: Sequence[Speed], settings: Settings, threads: int) -> None:
    """Print the second table: how many times as fast as dense a layer of a real size is."""
    print(
        f"\nSpeed of one layer of {SIZE} x {SIZE} with at most {settings.keep:g} of the parameters, in float32 on "
        f"{threads} thread{'s' if threads > 1 else ''}: how many times as fast\nas the dense layer (nn.Linear) it "
        f"multiplies {', '.join(map(str, TOKENS[:-1]))} or {TOKENS[-1]} tokens at once. The first row is the time of "
        "a dense call.\n"
    )
    rows = [("dense", "1.000", *(_dense_time(speeds, tokens) for tokens in TOKENS))]
    for name in dict.fromkeys(speed.name for speed in speeds):
        here = {speed.tokens: speed for speed in speeds if speed.name == name}
        rows.append((label(name), f"{here[TOKENS[0]].keep:.3f}", *(f"{here[tokens].speedup:.2f}" for tokens in TOKENS)))
    head = ("structure", "keep", *(f"{tokens} token{'s' if tokens > 1 else ''}" for tokens in TOKENS))
    print_table(head, rows, right=range(1, 5))


def _dense_time(speeds: Sequence[Speed], tokens: int) -> str:
    """The median over the structures, with each of which the dense layer was timed anew."""
    seconds = statistics.median(speed.dense_seconds for speed in speeds if speed.tokens == tokens)
    return f"{seconds * 1e3:.2f} ms"


def label(name: str) -> str:
    """The label of a structure in tables and pictures."""
    return name if name == "dense" else FORMATS[name].label


def spread(values: Sequence[float], form: str = "{:.1%}") -> str:
    """The mean, and over several seeds the standard deviation."""
    text = form.format(statistics.mean(values))
    return text if len(values) == 1 else f"{text} ± {form.format(statistics.stdev(values))}"


def draw(found: Accuracies, settings: Settings) -> list[Path]:
    """Draw the trade-off curves, and for formats that have them the couplings and the structure.

    Args:
        found: The first part of the demo.
        settings: The folder, and the number of epochs.

    Returns:
        The files.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for result in found.results.values():
        point = (result.relative_multiplications, statistics.mean(result.after))
        curves.setdefault(label(result.name), []).append(point)
    title = f"ViT on digits, compressed and retrained for {settings.epochs[1]} epochs"
    reference = (1.0, statistics.mean(found.dense.before))
    files = [_save(settings.out / "trade_off.png", trade_off(curves, reference=reference, title=title))]
    drawings: dict[str, Callable[[str, Mapping[str, StructuredModule]], Figure | None]] = {
        "couplings": _couplings,
        "structure": _structure,
    }
    for stem, drawing in drawings.items():
        figures = {name: drawing(name, layers) for name, layers in found.layers.items()}
        drawn = {name: figure for name, figure in figures.items() if figure is not None}
        for name, figure in drawn.items():
            files.append(_save(settings.out / (f"{stem}.png" if len(drawn) == 1 else f"{stem}-{name}.png"), figure))
    return files


def _couplings(name: str, layers: Mapping[str, StructuredModule]) -> Figure | None:
    layer = layers.get(DRAWN_LAYER)
    if layer is None or not layer.format.has_couplings:
        return None
    I, J, R = layer.format.couplings(layer.factors).shape
    return couplings(layer, title=f"{DRAWN_LAYER} as {label(name)}, {I} x {J} blocks, {R} components")


def _structure(name: str, layers: Mapping[str, StructuredModule]) -> Figure | None:
    if not all(layer.format.has_overlap for layer in layers.values()):
        return None
    return structure_maps(layers, title=f"components over each matrix, {label(name)} after retraining")


def _save(path: Path, figure: Figure) -> Path:
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path
