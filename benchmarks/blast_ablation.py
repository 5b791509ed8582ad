"""What each part of the default BLAST fit is worth: one setting changed at a time, on trained weights.

Every variant runs the same number of sweeps on all weights of `fit.py`'s trained part, keep 0.5 and 0.3, 4 x 4 and
16 x 16 blocks; shown is the final error relative to that of the published schedule with its 300 sweeps, as the median
and the maximum over the weights, and the time relative to the default's.

    python benchmarks/blast_ablation.py          # about two minutes on 2 cores
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fit import trained_weights
from hardware import hardware, hardware_line
from structmat import Blast
from structmat.fit import Lee2024Blast

RESULTS = Path(__file__).parent / "results"
SWEEPS = 30


class SvdStart(Lee2024Blast):
    """The default, started from the truncated SVD with couplings of 1 plus a little noise."""

    def initial(self, weights: Tensor, format: Blast) -> tuple[Tensor, Tensor, Tensor]:
        """The start, for each weight its own."""
        left, diag, right = super().initial(weights, format)
        U, S, Vh = torch.linalg.svd(weights, full_matrices=False)
        count = min(format.rank, S.shape[-1])
        root = S[:, None, :count].sqrt()
        left[..., :count] = (U[..., :count] * root).view(*left.shape[:-1], count)
        columns = (Vh[:, :count] * root.mT).view(len(weights), count, *format.blocks[1:], -1)
        right[:, :, :count] = columns.transpose(1, 2)
        return left, 1 + 0.1 * diag, right


def variants() -> dict[str, Lee2024Blast]:
    """The default and its neighbours, all with the same number of sweeps."""
    default = Lee2024Blast(sweeps=SWEEPS)
    return {
        "default": default,
        "not balanced": replace(default, balanced=False),
        "step 1 (alternating least squares)": replace(default, step=1.0),
        "step 1.5": replace(default, step=1.5),
        "step 1.9": replace(default, step=1.9),
        "step 2": replace(default, step=2.0),
        "published schedule, same sweeps": Lee2024Blast.published(sweeps=SWEEPS),
        "damping / 3": replace(default, damping=default.delta / 3),
        "damping x 3": replace(default, damping=default.delta * 3),
        "damping x 10": replace(default, damping=default.delta * 10),
        "settling 0.03": replace(default, settling=0.03),
        "settling 0.2": replace(default, settling=0.2),
        "start 1e-3": replace(default, start=1e-3),
        "start 1": replace(default, start=1.0),
        "start from the SVD": SvdStart(sweeps=SWEEPS),
        "diag by Cholesky": replace(default, direct_rank=10**6),
        "diag by 2 CG steps": replace(default, direct_rank=0, cg_iterations=2),
        "diag by 16 CG steps": replace(default, direct_rank=0, cg_iterations=16),
    }


def main() -> None:
    """Run all variants and write results and table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    weights = trained_weights()
    shapes = groupby(sorted(weights.values(), key=lambda w: tuple(w.shape)), key=lambda w: tuple(w.shape))
    groups = {shape: list(group) for shape, group in shapes}
    ratios: dict[str, dict[int, list[float]]] = {name: {4: [], 16: []} for name in variants()}
    seconds: dict[str, float] = dict.fromkeys(variants(), 0.0)
    for (M, N), stack in groups.items():
        for keep in (0.5, 0.3):
            for blocks in (4, 16):
                format = Blast.for_budget(M, N, keep=keep, blocks=blocks)
                goals = [fit.error for fit in Lee2024Blast.published().fit_many(stack, format)]
                for name, method in variants().items():
                    fits = method.fit_many(stack, format)
                    ratios[name][blocks] += [fit.error / goal for fit, goal in zip(fits, goals, strict=True)]
                    seconds[name] += sum(fit.seconds for fit in fits)
        print(f"{M} x {N} done", flush=True)
    rows: list[dict[str, Any]] = [
        {
            "variant": name,
            **{f"median_{b}": statistics.median(values) for b, values in by_blocks.items()},
            **{f"max_{b}": max(values) for b, values in by_blocks.items()},
            "time": seconds[name] / seconds["default"],
        }
        for name, by_blocks in ratios.items()
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "blast_ablation.json").write_text(json.dumps({"hardware": hardware(), "rows": rows}, indent=1))
    lines = [
        "# What each part of the default BLAST fit is worth",
        "",
        f"Made by `benchmarks/blast_ablation.py` on: {hardware_line(hardware())}. {SWEEPS} sweeps each; errors "
        "relative to the published schedule's after 300.",
        "",
        "| variant | 4 x 4, median | max | 16 x 16, median | max | time / default |",
        "|---|---|---|---|---|---|",
        *[
            f"| {r['variant']} | {r['median_4']:.4f} | {r['max_4']:.4f} | {r['median_16']:.4f} | {r['max_16']:.4f} "
            f"| {r['time']:.2f} |"
            for r in rows
        ],
    ]
    text = "\n".join(lines) + "\n"
    (RESULTS / "blast_ablation.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
