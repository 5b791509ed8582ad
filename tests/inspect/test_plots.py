"""Pictures: they are drawn from the numbers given, and written."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from structmat import Blast, GaudiGblr, LowRank, StructuredLinear
from structmat.formats import harden
from structmat.inspect.plots import (
    COLORS,
    KINDS,
    MARKERS,
    budget_shares,
    couplings,
    heat_map,
    structure_maps,
    trade_off,
)

PNG = b"\x89PNG\r\n\x1a\n"
CURVES = {"BLAST": [(0.6, 0.9), (0.3, 0.8)], "low-rank": [(0.5, 0.7)]}


def blast(I: int = 2, J: int = 3, rank: int = 5) -> StructuredLinear:
    return StructuredLinear(Blast(4 * I, 5 * J, (I, J), rank), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("draw", [lambda: trade_off(CURVES, reference=(1, 0.95)), lambda: couplings(blast())])
def test_figures_are_written(draw: Callable[[], object], tmp_path: Path) -> None:
    draw().savefig(tmp_path / "figure.png")  # pyright: ignore
    content = (tmp_path / "figure.png").read_bytes()
    assert content.startswith(PNG)
    assert len(content) > 10_000


def test_trade_off_shows_every_curve_in_order_of_cost() -> None:
    figure = trade_off(CURVES, reference=(1, 0.95), x_label="cost", y_label="quality", title="what pays")
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("cost", "quality", "what pays")
    lines = {line.get_label(): line for line in axes.lines}
    assert {"dense", "BLAST", "low-rank"} <= set(lines)
    assert lines["BLAST"].get_xydata().tolist() == [[0.3, 0.8], [0.6, 0.9]]
    assert lines["dense"].get_xydata().tolist() == [[1, 0.95]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["dense", "BLAST", "low-rank"]


def test_more_curves_than_colours() -> None:
    curves = {str(k): [(k, k)] for k in range(len(COLORS) + 1)}
    lines = trade_off(curves, reference=(1, 1)).axes[0].lines
    assert len(lines) == len(curves) + 2
    assert len(COLORS) == len(MARKERS)


def test_couplings_show_every_block_and_component() -> None:
    layer = blast()
    with torch.no_grad():
        layer.diag[1] = 0  # block (0, 1)
        layer.diag[:, 0] = 1  # a component that all blocks share, but for that one
    figure = couplings(layer, title="a layer")
    grid, lines = figure.axes[:2]
    strength, ordered = (axes.images[0].get_array() for axes in (grid, lines))
    assert (strength.shape, ordered.shape) == ((2, 3), (6, 5))
    assert [lines.get_yticklabels()[k].get_text() for k in (0, 1, 3)] == ["(0, 0)", "(0, 1)", "(1, 0)"]
    assert figure.get_suptitle() == "a layer"
    assert strength[0, 0] > strength[0, 1] > 0


def test_couplings_order_components_by_how_unevenly_they_are_used() -> None:
    layer = blast()
    with torch.no_grad():
        layer.diag.fill_(1)
        layer.diag[0, 2] = 30
    ordered = couplings(layer).axes[1].images[0].get_array()
    assert ordered[0, 0] == ordered.max()
    assert ordered[1:, 1:].std(0).max() < 1e-5


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 4, 1), (8, 8, 2)])
def test_couplings_of_any_grid(shape: tuple[int, int, int]) -> None:
    I, J, R = shape
    figure = couplings(blast(I, J, R))
    assert figure.axes[0].images[0].get_array().shape == (I, J)
    figure.canvas.draw()


def test_couplings_of_a_zero_layer() -> None:
    layer = blast()
    with torch.no_grad():
        layer.diag.zero_()
    assert not couplings(layer).axes[1].images[0].get_array().any()


def test_couplings_need_a_blast_layer() -> None:
    with pytest.raises(TypeError, match="expected a format with couplings, such as Blast, got LowRank"):
        couplings(StructuredLinear(LowRank(4, 4, 1)))


@pytest.mark.parametrize("draw", [lambda: trade_off(CURVES, reference=(1, 1)), lambda: couplings(blast())])
def test_missing_matplotlib_is_named(draw: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib: pip install 'structmat\[plot\]'"):
        draw()


def gaudi(seed: int = 0) -> StructuredLinear:
    return StructuredLinear(GaudiGblr(12, 20, 5, 0.4), generator=torch.Generator().manual_seed(seed))


def test_structure_maps_count_the_components_over_each_entry() -> None:
    soft = gaudi()
    format, factors = harden(soft.format, soft.factors)
    hard = StructuredLinear(format, factors=factors)
    figure = structure_maps({"soft": soft, "hard": hard, "other": gaudi(1)}, columns=2, title="maps")
    panels = [axes for axes in figure.axes if axes.images and axes.get_title()]
    assert [axes.get_title().split()[0] for axes in panels] == ["soft", "hard", "other"]
    assert (
        panels[0].get_title().splitlines()[1] == f"12 x 20, keep {soft.format.num_parameters(soft.factors) / 240:.2f}"
    )
    start, width = (t.tolist() for t in soft.format.segments(soft.factors))
    counts = torch.zeros(12, 20)
    for k in range(5):
        for i in range(width[0][k]):
            for j in range(width[1][k]):
                counts[(start[0][k] + i) % 12, (start[1][k] + j) % 20] += 1
    for axes in panels[:2]:
        assert axes.images[0].get_array().tolist() == counts.tolist()
    limits = {axes.images[0].get_clim() for axes in panels}
    assert len(limits) == 1


def test_only_sums_of_blocks_have_structure_maps() -> None:
    with pytest.raises(ValueError, match="expected at least one GBLR or Gaudi-GBLR layer to draw, got none"):
        structure_maps({})
    with pytest.raises(TypeError, match="expected a format with segments, such as Gblr or GaudiGblr, got LowRank"):
        structure_maps({"a": StructuredLinear(LowRank(4, 4, 1))})


def test_structure_maps_of_large_matrices_are_averaged() -> None:
    layer = StructuredLinear(GaudiGblr(64, 1024, 40, 0.3), generator=torch.Generator().manual_seed(0))
    image = structure_maps({"model.layers.10.a_rather_long_name.of_a_layer": layer}).axes[0].images[0].get_array()
    assert image.shape == (64, 256)
    whole = layer.format.overlap(layer.factors).unflatten(1, (256, 4)).mean(2)
    torch.testing.assert_close(torch.tensor(image), whole)


def test_many_structure_maps_are_about_square() -> None:
    panels = structure_maps({str(k): gaudi(k) for k in range(30)}).axes
    assert len(panels) == 5 * 6 + 1
    title = structure_maps({"a.name." * 9: gaudi()}).axes[0].get_title()
    assert title.startswith("…")
    assert len(title.splitlines()[0]) == 36


def entries(names: list[str], steps: int = 3) -> list[dict[str, Any]]:
    """A history whose first layer takes more and more."""
    found = []
    for step in range(steps):
        weights = {name: 1.0 + step * (k == 0) for k, name in enumerate(names)}
        total = sum(weights.values())
        costs = {name: weight / total for name, weight in weights.items()}
        found.append({"step": 10 * step, "structure_share": 0.5 - 0.1 * step, "costs": costs})
    return found


def heights(figure: Any) -> list[list[float]]:
    """Upper minus lower edge of the areas in the order of drawing, at each step."""
    areas = []
    for area in figure.axes[0].collections:
        if len(area.get_paths()) == 1 and len(area.get_paths()[0].vertices) > 2:
            points = area.get_paths()[0].vertices
            steps = sorted({x for x, _ in points.tolist()})
            areas.append([max(y for x, y in points.tolist() if x == s) - min(y for x, y in points.tolist() if x == s)
                          for s in steps])  # fmt: skip
    return areas


def test_budget_shares_are_stacked_by_kind_of_layer() -> None:
    history = entries(["blocks.0.fc", "blocks.1.fc", "head"])
    figure = budget_shares(history, title="shares")
    assert figure.axes[0].get_title() == "shares"
    both, first, head = heights(figure)  # the second block lies under the first
    costs = [entry["costs"] for entry in history]
    assert both == pytest.approx([cost["blocks.0.fc"] + cost["blocks.1.fc"] for cost in costs])
    assert first == pytest.approx([cost["blocks.0.fc"] for cost in costs])
    assert head == pytest.approx([cost["head"] for cost in costs])
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["head: 20%", "fc, 2 x: 80%"]
    assert figure.axes[1].lines[0].get_ydata() == pytest.approx([0.5, 0.4, 0.3])


def test_budget_shares_go_from_the_first_layer_to_the_last() -> None:
    """JSON files have names in alphabetical order, in which 10 comes before 2."""
    history = entries(sorted(f"blocks.{k}.fc" for k in (0, 2, 10)))
    whole, second, first = heights(budget_shares(history))
    costs = history[-1]["costs"]
    assert first[-1] == pytest.approx(costs["blocks.0.fc"])
    assert second[-1] == pytest.approx(costs["blocks.0.fc"] + costs["blocks.2.fc"])
    assert whole == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("layers", [2, 30])
def test_budget_shares_of_many_layers_have_a_short_legend(layers: int) -> None:
    kinds = [f"mlp{k}.proj" for k in range(layers // 2)]
    names = [f"model.layers.{k}.{kind}" for k in range(2) for kind in kinds]
    figure = budget_shares(entries(names))
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len(texts) == min(KINDS, len(kinds))
    if len(kinds) > KINDS:
        assert texts[0].startswith(f"others, {2 * (len(kinds) - KINDS + 1)} x: ")
    assert sum(float(text.split(": ")[1].rstrip("%")) for text in texts) == pytest.approx(100, abs=4)
    figure.canvas.draw()


def test_kinds_of_one_ending_keep_their_names_apart() -> None:
    texts = budget_shares(entries(["encoder.0.fc", "decoder.0.fc", "0", "1"])).axes[0].get_legend().get_texts()
    assert [text.get_text().split(":")[0] for text in texts] == ["*, 2 x", "decoder.*.fc", "encoder.*.fc"]


def test_a_history_of_one_entry_has_no_course() -> None:
    with pytest.raises(ValueError, match="expected a history of at least two entries to draw, got 1; log more often"):
        budget_shares(entries(["a"], 1))


def test_a_heat_map_writes_each_number() -> None:
    figure = heat_map({"a": [0.1, 0.25], "b": [0.5, 1.0]}, ["x", "y"], title="numbers")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.10", "0.25", "0.50", "1.00"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["x", "y"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"]
