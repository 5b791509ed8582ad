"""Train small vision networks with every structure, from random weights and from pretrained ones.

Gaudi-GBLR against low-rank, Monarch, block-sparse, BLAST and dense at the same multiplications, and against low-rank
with ranks learned per layer under one budget for the network (vision.rank_step_): what it gains over low-rank comes
from the allocation, what Gaudi-GBLR gains over it from the shape of the blocks. Everyone trains for the same number of
steps and tunes alike: the peak learning rate, out of four or five, each with one run of seed 0 at the middle budget, by
accuracy on images held out of the training set. The best one then runs at every budget with three seeds and is measured
on the test images. Every run is kept as JSON; a second call makes those that are missing, on any machine.

    python benchmarks/from_scratch.py                       # two hours on 2 cores, alone
    python benchmarks/from_scratch.py --grid mixer --only "blast|monarch"
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

import structmat as sm
import vision
from hardware import hardware, hardware_line
from vision import Run

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
METHODS = ("dense", "low-rank", "learned ranks", "monarch", "block-sparse", "blast", "gaudi-gblr")


@dataclass(frozen=True)
class Grid:
    """One experiment.

    Attributes:
        title: The heading of its table.
        network: ``"vit"`` or ``"mixer"``.
        keeps: The budgets.
        tuned_at: The budget at which the learning rate is chosen.
        steps: The number of training steps.
        rates: The learning rates that are tried.
        pretrained_steps: The steps of training a dense network first; 0 for a random start.
    """

    title: str
    network: str
    keeps: tuple[float, ...]
    tuned_at: float
    steps: int
    rates: tuple[float, ...]
    pretrained_steps: int = 0

    def run(self, method: str, keep: float, rate: float, seed: int) -> Run:
        """One cell."""
        return Run(self.network, method, keep, rate, seed, self.steps, self.pretrained_steps)


GRIDS = {
    "vit": Grid("ViT from random weights", "vit", (0.25, 0.125, 0.0625), 0.125, 1000, (1e-3, 2e-3, 4e-3, 8e-3)),
    "mixer": Grid("MLP-Mixer from random weights", "mixer", (0.125,), 0.125, 400, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)),
    "finetune": Grid("ViT from pretrained weights", "vit", (0.125,), 0.125, 200, (5e-4, 1e-3, 2e-3, 4e-3), 1000),
}


class Cells:
    """The runs of a grid and where they are kept."""

    def __init__(self, name: str) -> None:
        self.name, self.grid = name, GRIDS[name]
        self.folder = RESULTS / "from_scratch" / name

    def path(self, run: Run) -> Path:
        """The file of one run."""
        return self.folder / f"{run.method.replace(' ', '-')}-{run.keep}-{run.rate}-{run.seed}.json"

    def read(self, run: Run) -> dict[str, Any] | None:
        """A run that is there."""
        path = self.path(run)
        return json.loads(path.read_text()) if path.exists() else None

    def keeps(self, method: str) -> tuple[float, ...]:
        """The budgets of a method."""
        return (1.0,) if method == "dense" else self.grid.keeps

    def tuning(self, method: str) -> list[Run]:
        """The runs that choose the learning rate."""
        keep = 1.0 if method == "dense" else self.grid.tuned_at
        return [self.grid.run(method, keep, rate, 0) for rate in self.grid.rates]

    def best_rate(self, method: str) -> float | None:
        """The rate with the highest accuracy on the held-out images; None while runs are missing."""
        found = {run.rate: self.read(run) for run in self.tuning(method)}
        if not all(found.values()):
            return None
        return max(found, key=lambda rate: (found[rate] or {})["development"])

    def missing(self, only: str) -> Iterator[Run]:
        """What is to be run, the first seed of everything first."""
        methods = [method for method in METHODS if re.fullmatch(only, method)]
        for method in methods:
            yield from (run for run in self.tuning(method) if self.read(run) is None)
        for seed in SEEDS:
            for method in methods:
                for keep in self.keeps(method):
                    run = self.grid.run(method, keep, self.best_rate(method) or self.grid.rates[0], seed)
                    if self.read(run) is None:
                        yield run

    def records(self) -> dict[tuple[str, float], list[dict[str, Any]]]:
        """The records of the runs at the best rate, by method and budget."""
        found: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for method in METHODS:
            rate = self.best_rate(method)
            if rate is None:
                continue
            for keep in self.keeps(method):
                runs = [self.read(self.grid.run(method, keep, rate, seed)) for seed in SEEDS]
                if any(runs):
                    found[method, keep] = [run for run in runs if run]
        return found


def table() -> str:
    """All grids as Markdown."""
    first = next((RESULTS / "from_scratch").glob("*/*.json"))
    record = json.loads(first.read_text())
    lines = [
        "# Learning from scratch and from pretrained weights",
        "",
        f"Made by `benchmarks/from_scratch.py` on: {hardware_line(record['hardware'])}, timm {record['timm']}. "
        f"{record['data']}, networks of width 128 and depth 3 on 16 tokens, batches of {vision.BATCH}.",
        "",
        "Test accuracy in %, mean and spread (max - min) over the seeds that are there, at the multiplications of the "
        "structured layers, relative to dense, that the method really has.",
    ]
    for name, grid in GRIDS.items():
        cells = Cells(name)
        records = cells.records()
        if not records:
            continue
        keeps = [keep for keep in grid.keeps if any(k == keep for _, k in records)]
        lines += ["", f"## {grid.title}, {grid.steps} steps", ""]
        if grid.pretrained_steps:
            lines += [
                f"The dense network was trained for {grid.pretrained_steps} steps, then compressed with each "
                "method's default fit (without data). In brackets the accuracy before fine-tuning (held-out "
                "images).",
                "",
            ]
        lines += [
            "| method | rate | " + " | ".join(f"keep {keep}" for keep in keeps) + " |",
            "|---|---|" + "---|" * len(keeps),
        ]
        for method in METHODS:
            if not any(m == method for m, _ in records):
                continue
            texts = []
            for keep in keeps:
                runs = records.get((method, 1.0 if method == "dense" else keep), [])
                texts.append(cell(runs) if runs else "")
            lines.append(f"| {method} | {cells.best_rate(method)} | " + " | ".join(texts) + " |")
        lines += [
            "",
            f"Tuning: accuracy on held-out images, seed 0, keep {grid.tuned_at}.",
            "",
            "| method | " + " | ".join(map(str, grid.rates)) + " |",
            "|---|" + "---|" * len(grid.rates),
        ]
        for method in METHODS:
            found = [cells.read(run) for run in cells.tuning(method)]
            if any(found):
                shown = " | ".join(f"{100 * run['development']:.1f}" if run else "" for run in found)
                lines.append(f"| {method} | {shown} |")
    return "\n".join(lines) + "\n"


def cell(runs: list[dict[str, Any]]) -> str:
    """Accuracy of the seeds of one method and budget."""
    tests = [100 * run["test"] for run in runs]
    before = [100 * run["before"] for run in runs if run["before"] is not None]
    share = statistics.mean(run["keep"] for run in runs)
    text = f"{statistics.mean(tests):.2f} ± {max(tests) - min(tests):.2f} at {share:.3f}"
    return text + (f" ({statistics.mean(before):.1f})" if before else "")


def picture() -> None:
    """Trade-off curves of the ViT from random weights."""
    records = Cells("vit").records()
    figure, axes = plt.subplots(figsize=(7.4, 4.2), layout="constrained")
    for method in METHODS:
        points = [
            (statistics.mean(r["keep"] for r in runs), [100 * r["test"] for r in runs])
            for (name, _), runs in records.items()
            if name == method
        ]
        if not points:
            continue
        if method == "dense":
            axes.axhline(statistics.mean(points[0][1]), color="0.4", linestyle="--", label="dense")
            continue
        points.sort()
        shares, means = [share for share, _ in points], [statistics.mean(tests) for _, tests in points]
        line = axes.plot(shares, means, marker="o", label=method)[0]
        axes.fill_between(
            shares, [min(t) for _, t in points], [max(t) for _, t in points], alpha=0.15, color=line.get_color()
        )
    axes.set(
        xlabel="multiplications, relative to dense", ylabel="test accuracy (%)", xscale="log", title=GRIDS["vit"].title
    )
    axes.set_xticks([0.0625, 0.125, 0.25], ["0.0625", "0.125", "0.25"])
    axes.minorticks_off()
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(RESULTS / "from_scratch.png", dpi=150)
    plt.close(figure)


def segments(model: torch.nn.Module) -> dict[str, Any]:
    """What the hardened layers learned, for benchmarks/gblr_speed.py: shares of the axes."""
    found: dict[str, Any] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, sm.StructuredLinear) and isinstance(layer.format, sm.Gblr):
            factors, order = layer.factors, layer.factors["order"].long()
            start = [factors["start"][0], factors["start"][1][order]]
            width = [factors["width"][0], factors["width"][1][order]]
            found[name] = {
                "shape": layer.format.shape,
                "start": [row.tolist() for row in start],
                "width": [row.tolist() for row in width],
            }
    return found


def main() -> None:
    """Make the runs that are missing and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=[*GRIDS, "all"], default="all")
    parser.add_argument("--only", default=".*", help="methods to run: a pattern for the whole name")
    options = parser.parse_args()
    import timm  # noqa: PLC0415 - for its version alone

    data = vision.load_data()
    for name in GRIDS if options.grid == "all" else [options.grid]:
        cells = Cells(name)
        cells.folder.mkdir(parents=True, exist_ok=True)
        for run in cells.missing(options.only):
            record, model = vision.execute(run, data)
            record.update(
                network=run.network,
                method=run.method,
                asked=run.keep,
                rate=run.rate,
                seed=run.seed,
                steps=run.steps,
                hardware=hardware(),
                timm=timm.__version__,
            )
            if run.method == "gaudi-gblr" and run.seed == 0:
                kept = RESULTS / "from_scratch" / f"segments-{name}-{run.keep}-{run.rate}.json"
                kept.write_text(json.dumps(segments(model)))
            cells.path(run).write_text(json.dumps(record))
            print(
                f"{name}: {run.method} {run.keep} rate {run.rate} seed {run.seed}: test {record['test']:.4f}, keep "
                f"{record['keep']:.4f}, {record['seconds']:.0f} s",
                flush=True,
            )
            (RESULTS / "from_scratch.md").write_text(table())
    (RESULTS / "from_scratch.md").write_text(table())
    picture()


if __name__ == "__main__":
    main()
