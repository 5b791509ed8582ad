"""How much the settings of Gaudi-GBLR matter: one at a time around the usual ones, on the ViT of from_scratch.py.

A network of random weights at an eighth of the multiplications, 400 steps, two seeds: the number of components, the
smoothing, how large the structure begins and how fast it moves, the shrinkage, the rule, and rounding to multiples.
Every run is kept as JSON; a second call makes those that are missing.

    python benchmarks/sensitivity.py                        # an hour and a half on 2 cores, alone
    python benchmarks/sensitivity.py --only "sigma.*"
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
from pathlib import Path
from typing import Any

import vision
from hardware import hardware, hardware_line
from vision import Run

RESULTS = Path(__file__).parent / "results" / "sensitivity"
SEEDS = (0, 1)
USUAL = Run("vit", "gaudi-gblr", 0.125, 4e-3, 0, 400)
"""The usual run; its learning rate is in the middle of those that from_scratch.py tries for Gaudi-GBLR."""

SETTINGS: dict[str, dict[str, Any]] = {
    "usual": {},
    "components 32": {"options": {"components": 32}},
    "components 64": {"options": {"components": 64}},
    "components 256": {"options": {"components": 256}},
    "components 10": {"options": {"components": 10}},
    "diagonal": {"segments": "diagonal"},
    "uneven": {"segments": "uneven"},
    "sigma 1 to 100": {"structure": {"sigma": (1.0, 100.0)}},
    "sigma 1 to 30": {"structure": {"sigma": (1.0, 30.0)}},
    "sigma 10 to 100": {"structure": {"sigma": (10.0, 100.0)}},
    "sigma 100": {"structure": {"sigma": (100.0, 100.0)}},
    "start 0.5": {"start": 0.5},
    "start 1.5": {"start": 1.5},
    "start 2": {"start": 2.0},
    "structure rate 0": {"structure_rate": 0.0},
    "structure rate 3e-4": {"structure_rate": 3e-4},
    "structure rate 3e-3": {"structure_rate": 3e-3},
    "structure rate 1e-2": {"structure_rate": 1e-2},
    "start 1.5, shrinkage 0.02": {"start": 1.5, "structure": {"shrinkage": 0.02}},
    "start 1.5, shrinkage 2": {"start": 1.5, "structure": {"shrinkage": 2.0}},
    "start 1.5, continuous": {"start": 1.5, "structure": {"rule": "continuous"}},
    "start 1.5, shrink": {"start": 1.5, "structure": {"rule": "shrink"}},
    "continuous": {"structure": {"rule": "continuous"}},
    "shrink": {"structure": {"rule": "shrink"}},
    "multiple 8": {"options": {"multiple": 8}},
    "components 64, multiple 8": {"options": {"components": 64, "multiple": 8}},
    "components 64, multiple 16": {"options": {"components": 64, "multiple": 16}},
}
"""Each setting that is tried: what differs from ``USUAL``."""

TABLE: dict[str, dict[str, str]] = {
    "components K of each matrix": {
        "32": "components 32",
        "64": "components 64",
        "128 (usual)": "usual",
        "256": "components 256",
    },
    "smoothing sigma": {
        "none (usual)": "usual",
        "1 to 100": "sigma 1 to 100",
        "1 to 30": "sigma 1 to 30",
        "10 to 100": "sigma 10 to 100",
        "100 throughout": "sigma 100",
    },
    "initialisation": {
        "equal widths, random places (usual)": "usual",
        "equal widths along the diagonal": "diagonal",
        "random widths and places": "uneven",
        "low-rank: K 10, nearly full widths": "components 10",
    },
    "cost at the start, of the budget": {
        "0.5": "start 0.5",
        "1 (usual)": "usual",
        "1.5": "start 1.5",
        "2": "start 2",
    },
    "learning rate of the structure": {
        "0 (random, fixed)": "structure rate 0",
        "3e-4": "structure rate 3e-4",
        "1e-3 (usual)": "usual",
        "3e-3": "structure rate 3e-3",
        "1e-2": "structure rate 1e-2",
    },
    "shrinkage lambda, from 1.5 times the budget": {
        "0.02": "start 1.5, shrinkage 0.02",
        "0.2 (usual)": "start 1.5",
        "2": "start 1.5, shrinkage 2",
    },
    "rule, from the budget": {"switch (usual)": "usual", "continuous": "continuous", "shrink": "shrink"},
    "rule, from 1.5 times the budget": {
        "switch (usual)": "start 1.5",
        "continuous": "start 1.5, continuous",
        "shrink": "start 1.5, shrink",
    },
    "segments rounded to multiples of": {
        "1 (usual)": "usual",
        "8": "multiple 8",
        "1, K 64": "components 64",
        "8, K 64": "components 64, multiple 8",
        "16, K 64": "components 64, multiple 16",
    },
}
"""The rows of the table by factor: what a row is called, and which setting it shows."""


def path(name: str, seed: int, folder: Path) -> Path:
    """The file with the results of one run."""
    return folder / f"{name.replace(', ', '_').replace(' ', '-')}-{seed}.json"


def record_of(name: str, seed: int, data: vision.Data, steps: int) -> dict[str, Any]:
    """Make one run."""
    run = dataclasses.replace(USUAL, seed=seed, steps=steps, **SETTINGS[name])
    record, _ = vision.execute(run, data)
    hard = [entry for entry in record["history"] if run.learning and run.learning.is_hard(entry["step"] / steps)]
    soft = record["history"][: -len(hard)] or record["history"][:1]
    return {
        **record,
        "setting": name,
        "seed": seed,
        "steps": steps,
        "rate": run.rate,
        "share_before": soft[-1]["structure_share"],
        "dead": record["history"][-1]["structure_dead"],
        "hardware": hardware(),
    }


def table(folder: Path) -> str:
    """Everything that is there, as Markdown."""
    runs = {
        name: [json.loads(file.read_text()) for seed in SEEDS if (file := path(name, seed, folder)).exists()]
        for name in SETTINGS
    }
    one = next(found[0] for found in runs.values() if found)
    lines = [
        "# Sensitivity of Gaudi-GBLR to its settings",
        "",
        f"Made by `benchmarks/sensitivity.py` on: {hardware_line(one['hardware'])}. {one['data']}, ViT of width 128 "
        f"and depth 3 from random weights, {one['steps']} steps at the peak learning rate {USUAL.rate}, keep "
        f"{USUAL.keep}. One setting differs at a time; what is usual here: K = 128, no smoothing, a start at the "
        "budget, 1e-3 for widths and locations, `shrinkage=0.2`, the rule `switch`, no rounding. A multiple of 16 "
        "needs K = 64 at this budget.",
        "",
        "Accuracies in %, mean over the seeds and in brackets their spread (max - min); multiplications relative to "
        "dense: before the last phase, which takes off what exceeds the budget, and at the end; dead: components "
        "without a block at the end; gap: the largest relative change of a matrix by hardening.",
    ]
    for factor, rows in TABLE.items():
        lines += [
            "",
            f"## {factor[0].upper()}{factor[1:]}",
            "",
            "| | held-out | test | mult. before | at the end | dead | gap | seeds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for label, name in rows.items():
            lines.append(f"| {label} | {cells(runs[name])} |")
    return "\n".join(lines) + "\n"


def cells(runs: list[dict[str, Any]]) -> str:
    """What the seeds of one setting came to."""
    if not runs:
        return " | ".join([""] * 6 + ["0"])

    def accuracy(key: str) -> str:
        values = [100 * run[key] for run in runs]
        return f"{statistics.mean(values):.2f} ({max(values) - min(values):.2f})"

    def mean(key: str) -> float:
        return statistics.mean(run[key] for run in runs)

    gap = max(run["hardening_gap"] for run in runs)
    return (
        f"{accuracy('development')} | {accuracy('test')} | {mean('share_before'):.3f} | {mean('keep'):.3f} | "
        f"{100 * mean('dead'):.1f} % | {gap:.1e} | {len(runs)}"
    )


def main() -> None:
    """Make the runs that are missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=".*", help="settings to run: a pattern for the whole name")
    parser.add_argument("--steps", type=int, default=USUAL.steps, help="other than the usual for a trial")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the runs; the table goes beside it")
    options = parser.parse_args()
    data = vision.load_data()
    options.results.mkdir(parents=True, exist_ok=True)
    for seed in SEEDS:
        for name in SETTINGS:
            file = path(name, seed, options.results)
            if not re.fullmatch(options.only, name) or file.exists():
                continue
            record = record_of(name, seed, data, options.steps)
            file.write_text(json.dumps(record))
            print(
                f"{name}, seed {seed}: held-out {record['development']:.4f}, keep {record['keep']:.4f}, "
                f"{record['seconds']:.0f} s",
                flush=True,
            )
            options.results.with_suffix(".md").write_text(table(options.results))
    options.results.with_suffix(".md").write_text(table(options.results))


if __name__ == "__main__":
    main()
