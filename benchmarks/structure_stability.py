"""Whether Gaudi-GBLR learns the same structure twice: overlap maps of two seeds, on the ViT of from_scratch.py.

Two runs start from one pretrained network, whose fitted structure they share, and train in another order of the data;
two others start from random weights of their own. The similarity of two maps is what they share when both sum to 1
(``inspect.learned.map_similarity``). Beside it stands the similarity of the same segments at random places, which is
what maps of such sizes share by chance. Every run is kept as JSON; a second call makes those that are missing.

    python benchmarks/structure_stability.py                # five minutes on 2 cores, alone
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import structmat as sm
import vision
from from_scratch import segments
from hardware import hardware, hardware_line
from structmat.inspect.learned import map_similarity
from vision import Run

RESULTS = Path(__file__).parent / "results" / "structure_stability"
SEEDS = (0, 1)
STARTS = {
    "pretrained": Run("vit", "gaudi-gblr", 0.125, 1e-3, 0, 300, pretrained_steps=1000),
    "random": Run("vit", "gaudi-gblr", 0.125, 4e-3, 0, 300),
}
DRAWS = 8
"""Pairs of maps at random places, of which the mean is taken."""

Segments = dict[str, dict[str, Any]]
"""Shape, starts and widths of each layer, as from_scratch.py keeps them."""


def record_of(run: Run, seed: int, data: vision.Data) -> dict[str, Any]:
    """Train one network; a pretrained one is that of seed 0, whatever the order of the data."""
    run = dataclasses.replace(run, seed=seed)
    model = vision.begin(dataclasses.replace(run, seed=0) if run.pretrained_steps else run, data)
    start = soft_segments(model)
    vision.train(run, model, data)
    sm.harden_(model)
    return {
        "seed": seed,
        "steps": run.steps,
        "keep": run.keep,
        "pretrained_steps": run.pretrained_steps,
        "rate": run.rate,
        "development": vision.accuracy(model, data.development),
        "test": vision.accuracy(model, data.test),
        "start": start,
        "learned": segments(model),
        "data": data.name,
        "hardware": hardware(),
    }


def soft_segments(model: torch.nn.Module) -> Segments:
    """The segments of Gaudi-GBLR layers."""
    found: Segments = {}
    for name, layer in model.named_modules():
        if isinstance(layer, sm.StructuredLinear) and isinstance(layer.format, sm.GaudiGblr):
            start, width = layer.format.segments(layer.factors)
            found[name] = {"shape": layer.format.shape, "start": start.tolist(), "width": width.tolist()}
    return found


def overlap_map(layer: dict[str, Any], generator: torch.Generator | None = None) -> Tensor:
    """How many components lie over each entry; with a generator, at random places instead of theirs."""
    masks = []
    for n, start, width in zip(layer["shape"], layer["start"], layer["width"], strict=True):
        starts = torch.tensor(start) if generator is None else torch.randint(n, (len(start),), generator=generator)
        masks.append(((torch.arange(n) - starts[:, None]) % n < torch.tensor(width)[:, None]).double())
    return masks[0].mT @ masks[1]


def chance(first: dict[str, Any], second: dict[str, Any]) -> float:
    """The similarity of two layers' maps at random places."""
    generator = torch.Generator().manual_seed(0)
    return statistics.mean(
        map_similarity(overlap_map(first, generator), overlap_map(second, generator)) for _ in range(DRAWS)
    )


def row(runs: Sequence[dict[str, Any]], name: str) -> tuple[float, float, float]:
    """The similarity of one layer in both runs, that by chance, and that of the first with its start."""
    first, second = (run["learned"][name] for run in runs)
    learned = map_similarity(overlap_map(first), overlap_map(second))
    return learned, chance(first, second), map_similarity(overlap_map(first), overlap_map(runs[0]["start"][name]))


def table(folder: Path) -> str:
    """The starts of which both runs are there, as Markdown."""
    files = {start: [path(start, seed, folder) for seed in SEEDS] for start in STARTS}
    pairs = {
        start: [json.loads(file.read_text()) for file in both]
        for start, both in files.items()
        if all(file.exists() for file in both)
    }
    if not pairs:
        return "# Stability of learned structures over seeds\n\nNo pair of runs yet.\n"
    one = next(iter(pairs.values()))[0]
    lines = [
        "# Stability of learned structures over seeds",
        "",
        f"Made by `benchmarks/structure_stability.py` on: {hardware_line(one['hardware'])}. {one['data']}, ViT of "
        f"width 128 and depth 3, {one['steps']} steps at keep {one['keep']}.",
        "",
        "Similarity of the overlap maps of two runs (`map_similarity`: what they share when both sum to 1), in "
        "brackets that of the same segments at random places, and that of the first run's map with the one it began "
        "with. From the pretrained network both runs begin with the same fitted structure and see the data in another "
        "order; from random weights they share nothing but the data.",
        "",
        "| layer | " + " | ".join(f"{start}: two runs (by chance) | with its start" for start in pairs) + " |",
        "|---|" + "---|---|" * len(pairs),
    ]
    names = list(one["learned"])
    rows = {name: [row(runs, name) for runs in pairs.values()] for name in names}
    mean = [
        tuple(statistics.mean(values) for values in zip(*column, strict=True))
        for column in zip(*rows.values(), strict=True)
    ]
    for name, columns in [*rows.items(), ("**mean**", mean)]:
        texts = [f"{learned:.3f} ({by_chance:.3f}) | {begun:.3f}" for learned, by_chance, begun in columns]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    tests = [f"{start} " + " and ".join(f"{100 * run['test']:.2f}" for run in runs) for start, runs in pairs.items()]
    return "\n".join([*lines, "", f"Test accuracy in %: {'; '.join(tests)}."]) + "\n"


def path(start: str, seed: int, folder: Path) -> Path:
    """The file with the results of one run."""
    return folder / f"{start}-{seed}.json"


def main() -> None:
    """Make the runs that are missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="other than the usual for a trial")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the runs; the table goes beside it")
    options = parser.parse_args()
    data = vision.load_data()
    options.results.mkdir(parents=True, exist_ok=True)
    for start, run in STARTS.items():
        for seed in SEEDS:
            file = path(start, seed, options.results)
            if file.exists():
                continue
            if options.steps is not None:
                run = dataclasses.replace(
                    run, steps=options.steps, pretrained_steps=min(run.pretrained_steps, options.steps)
                )
            record = record_of(run, seed, data)
            file.write_text(json.dumps(record))
            print(f"{start}, seed {seed}: test {record['test']:.4f}", flush=True)
    options.results.with_suffix(".md").write_text(table(options.results))


if __name__ == "__main__":
    main()
