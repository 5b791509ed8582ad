"""Compare the fits: low-rank, block-diagonal, Monarch, BLAST by the published schedule, and BLAST by default.

On really trained weights (the layers of stories3M-llama, where STRUCTMAT_DATA names the data folder, and those of
the demo's Vision Transformer), at keep 0.5 and 0.3 and 4 x 4 and 16 x 16 blocks, and on a 4096 x 4096 matrix with Haar
factors and singular values k^-1/2 at 16 x 16 blocks and rank 1024. Weights of one shape are fitted in one call, by
every method, and the time of a weight is the call's divided by their number. Both BLAST schedules run on the same
solvers.

Time to reach: the default runs with several budgets of sweeps; counted is the first whole run, settling included, that
ends at or below the error at which the published schedule ended. Equal time: the default with as many sweeps as fill
the time that the published schedule took.

    python benchmarks/fit.py              # all of it, about half an hour on 2 cores
    python benchmarks/fit.py --part trained       # or large, or sweep
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hardware import hardware, hardware_line
from structmat import Blast, BlockDiagonal, Format, LowRank, Monarch, default_method
from structmat.demo.vit import VisionTransformer, digits, train
from structmat.fit import Lee2024Blast
from structmat.fit.lee2024blast import Sweeper

LARGE = Blast(4096, 4096, (16, 16), 1024)
RESULTS = Path(__file__).parent / "results"
BUDGETS = (15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 300)


def trained_weights() -> dict[str, Tensor]:
    """The weights by name: ``llama.<layer>.<projection>`` and ``vit.<layer>.<linear>``."""
    weights: dict[str, Tensor] = {}
    folder = os.environ.get("STRUCTMAT_DATA")
    if folder:
        tensors = load_file(Path(folder) / "stories3M-llama" / "model.safetensors")
        weights |= {
            f"llama.{name.removeprefix('model.layers.').removesuffix('.weight')}": tensor.float()
            for name, tensor in tensors.items()
            if name.endswith("_proj.weight")
        }
    else:
        print("STRUCTMAT_DATA is not set: the weights of stories3M-llama are left out")
    torch.manual_seed(0)
    model = VisionTransformer()
    train(model, digits(), epochs=30, learning_rate=2e-3, seed=0)
    weights |= {
        f"vit.{n}": m.weight.detach() for n, m in model.blocks.named_modules() if isinstance(m, torch.nn.Linear)
    }
    return weights


def synthetic(n: int = 4096) -> Tensor:
    """A matrix with Haar factors and singular values ``k^-1/2``."""
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for _ in range(2))
    return (U * torch.arange(1, n + 1).float().rsqrt()) @ V.T


def blast_cell(weights: dict[str, Tensor], format: Blast, budgets: Sequence[int]) -> list[dict[str, Any]]:
    """Both schedules on weights of one shape; a record for each weight."""
    stack = list(weights.values())
    default = Lee2024Blast()
    replace(default, sweeps=2).fit_many(stack, format)  # warms up the allocator and the libraries
    published = Lee2024Blast.published().fit_many(stack, format)
    fits = default.fit_many(stack, format)
    seconds_per_sweep = fits[0].seconds / default.sweeps
    equal_sweeps = max(1, int(published[0].seconds / seconds_per_sweep))
    equal = replace(default, sweeps=equal_sweeps).fit_many(stack, format)
    reached: dict[str, dict[str, float]] = {}
    for sweeps in budgets:
        run = fits if sweeps == default.sweeps else replace(default, sweeps=sweeps).fit_many(stack, format)
        for name, fit, goal in zip(weights, run, published, strict=True):
            if name not in reached and fit.error <= goal.error:
                reached[name] = {"sweeps": sweeps, "time_ratio": fit.seconds / goal.seconds, "error": fit.error}
        if len(reached) == len(weights):
            break
    return [
        {
            "weight": name,
            "format": format.to_json(),
            "keep": format.keep,
            "published": {"error": p.error, "seconds": p.seconds, "sweeps": Lee2024Blast.published().sweeps},
            "default": {
                "error": d.error,
                "seconds": d.seconds,
                "sweeps": default.sweeps,
                "error_ratio": d.error / p.error,
                "time_ratio": d.seconds / p.seconds,
            },
            "reached": reached.get(name),
            "equal_time": {
                "error": e.error,
                "seconds": e.seconds,
                "sweeps": equal_sweeps,
                "error_ratio": e.error / p.error,
                "time_ratio": e.seconds / p.seconds,
            },
        }
        for name, p, d, e in zip(weights, published, fits, equal, strict=True)
    ]


def closed_form_cell(weights: dict[str, Tensor], format: Format) -> list[dict[str, Any]]:
    """The format's default fit; a record for each weight."""
    fits = default_method(format).fit_many(list(weights.values()), format)
    return [
        {"weight": n, "format": format.to_json(), "keep": format.keep, "error": f.error, "seconds": f.seconds}
        for n, f in zip(weights, fits, strict=True)
    ]


def trained() -> dict[str, Any]:
    """All cells of the trained weights."""
    weights = trained_weights()
    shapes = sorted({tuple(w.shape) for w in weights.values()})
    blast: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for keep in (0.5, 0.3):
        for M, N in shapes:
            for source in ("llama", "vit"):
                group = {n: w for n, w in weights.items() if tuple(w.shape) == (M, N) and n.startswith(source)}
                if not group:
                    continue
                print(f"keep {keep}, {len(group)} weights of {source}, {M} x {N}", flush=True)
                others += [dict(r, asked=keep) for r in closed_form_cell(group, LowRank.for_budget(M, N, keep=keep))]
                format = BlockDiagonal.for_budget(M, N, keep=keep)
                others += [dict(r, asked=keep) for r in closed_form_cell(group, format)]
                for blocks in (4, 16):
                    try:
                        format = Monarch.for_budget(M, N, keep=keep, blocks=blocks)
                        others += [dict(r, asked=keep) for r in closed_form_cell(group, format)]
                    except ValueError as error:
                        others += [{"weight": n, "asked": keep, "blocks": blocks, "refused": str(error)} for n in group]
                    cell = blast_cell(group, Blast.for_budget(M, N, keep=keep, blocks=blocks), BUDGETS)
                    blast += [dict(record, asked=keep) for record in cell]
    return {"blast": blast, "others": others}


def large() -> dict[str, Any]:
    """The large matrix: both schedules, and the other structures at the same budget."""
    weight, format = synthetic(), LARGE
    print(f"{format}", flush=True)
    cell = blast_cell({"synthetic": weight}, format, (15, 20, 25, 30, 40, 50))
    others: list[dict[str, Any]] = []
    for other in (
        LowRank.for_budget(4096, 4096, keep=format.keep),
        BlockDiagonal.for_budget(4096, 4096, keep=format.keep),
        Monarch.for_budget(4096, 4096, keep=format.keep, blocks=16),
    ):
        others += [dict(r, asked=format.keep) for r in closed_form_cell({"synthetic": weight}, other)]
    return {"blast": [dict(r, asked=format.keep) for r in cell], "others": others}


def sweep_profile(sweeps: int = 7) -> dict[str, float]:
    """The large matrix: seconds of the parts of a sweep, the share of ``diag``, and peak memory beyond the weight."""
    weight, format, method = synthetic(), LARGE, Lee2024Blast()
    print("time and memory of a sweep", flush=True)
    stack = (weight / weight.square().mean().sqrt())[None]
    before = _peak_bytes()
    sweeper = Sweeper(stack, *method.initial(stack, format), method)
    outer, diag = [], []
    for _ in range(sweeps):
        start = time.perf_counter()
        damping = sweeper.outer_steps(torch.tensor([method.step]))
        between = time.perf_counter()
        sweeper.diag_step(torch.tensor([method.step]), damping)
        end = time.perf_counter()
        outer.append(between - start)
        diag.append(end - between)
    (I, J), R = format.blocks, format.rank
    products = 2 * format.M * format.N * R
    solves = (I + J) * R**3 / 6 + (format.M + format.N) * R * R
    grams = (format.M + format.N) * R * R
    seconds = statistics.median(outer) + statistics.median(diag)
    return {
        "outer_seconds": statistics.median(outer),
        "diag_seconds": statistics.median(diag),
        "diag_share": statistics.median(diag) / seconds,
        "peak_extra_bytes": _peak_bytes() - before,
        "gigaflops": 2 * (products + solves + grams) / seconds / 1e9,
        "gemm_gigaflops": _gemm_gigaflops(),
    }


def _gemm_gigaflops(n: int = 2048, rounds: int = 5) -> float:
    """What a plain product reaches on this machine, for the share of the limit."""
    a = torch.randn(n, n)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(a, a)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times) / 1e9


def _peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def summary(results: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = ["# Fits compared", "", f"Made by `benchmarks/fit.py` on: {hardware_line(results['hardware'])}.", ""]
    for part, title in (("trained", "Trained weights"), ("large", "4096 x 4096, Haar factors, singular values k^-1/2")):
        if part not in results:
            continue
        blast, others = results[part]["blast"], results[part]["others"]
        lines += [f"## {title}", "", "BLAST: the default against the published schedule, medians over the weights.", ""]
        head = (
            "weights",
            "keep",
            "blocks",
            "count",
            "published error",
            "default error",
            "default / published",
            "default time / published",
            "reached at time",
            "reached at sweeps",
            "equal time: error / published",
        )
        rows: list[tuple[str, ...]] = [head]
        cells = sorted({(r["weight"].split(".")[0], r["asked"], r["format"]["blocks"][0]) for r in blast}, reverse=True)
        for source, asked, blocks in cells:
            group = [
                r
                for r in blast
                if r["weight"].split(".")[0] == source and r["asked"] == asked and r["format"]["blocks"][0] == blocks
            ]
            rows.append((source, f"{asked:.3g}", f"{blocks} x {blocks}", *_medians(group)))
        rows.append(("all, pooled", "", "", *_medians(blast)))
        lines += [_markdown(rows), ""]
        lines += ["Relative error of every structure, medians (real keep in brackets).", ""]
        lines += [_markdown(_structures(blast, others)), ""]
    if "sweep" in results:
        sweep = results["sweep"]
        lines += [
            f"One sweep at 4096 x 4096, R 1024, 16 x 16 blocks: "
            f"{sweep['outer_seconds'] + sweep['diag_seconds']:.2f} s, of which `diag` {sweep['diag_share']:.0%}; "
            f"peak memory beyond the weight {sweep['peak_extra_bytes'] / 1e9:.2f} GB; "
            f"{sweep['gigaflops']:.0f} GFLOP/s, where a plain product reaches {sweep['gemm_gigaflops']:.0f}.",
            "",
        ]
    return "\n".join(lines)


def _medians(records: list[dict[str, Any]]) -> tuple[str, ...]:
    median = statistics.median
    never = float("inf")
    times = [r["reached"]["time_ratio"] if r["reached"] else never for r in records]
    sweeps = [r["reached"]["sweeps"] if r["reached"] else never for r in records]
    return (
        str(len(records)),
        f"{median(r['published']['error'] for r in records):.4f}",
        f"{median(r['default']['error'] for r in records):.4f}",
        f"{median(r['default']['error_ratio'] for r in records):.4f}",
        f"1/{1 / median(r['default']['time_ratio'] for r in records):.1f}",
        f"1/{1 / median(times):.1f}",
        f"{median(sweeps):g}",
        f"{median(r['equal_time']['error_ratio'] for r in records):.4f}",
    )


def _structures(blast: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        (
            "weights",
            "keep",
            "low-rank",
            "block-diagonal",
            "Monarch 4 x 4",
            "Monarch 16 x 16",
            "BLAST 4 x 4",
            "BLAST 16 x 16",
        )
    ]
    records = [dict(r, error=r["default"]["error"]) for r in blast] + [r for r in others if "error" in r]

    def cell(source: str, asked: float, name: str, blocks: int | None) -> str:
        group = [
            r
            for r in records
            if r["weight"].split(".")[0] == source
            and r["asked"] == asked
            and r["format"]["format"] == name
            and (blocks is None or r["format"]["blocks"][0] == blocks)
        ]
        if not group:
            refused = any(r["weight"].split(".")[0] == source and r["asked"] == asked for r in others if "refused" in r)
            return "does not fit" if refused and name == "monarch" else "not run"
        return f"{statistics.median(r['error'] for r in group):.4f} ({statistics.median(r['keep'] for r in group):.3f})"

    for source, asked in sorted({(r["weight"].split(".")[0], r["asked"]) for r in blast}, reverse=True):
        kinds = (
            ("low_rank", None),
            ("block_diagonal", None),
            ("monarch", 4),
            ("monarch", 16),
            ("blast", 4),
            ("blast", 16),
        )
        rows.append((source, f"{asked:.3g}", *[cell(source, asked, name, blocks) for name, blocks in kinds]))
    return rows


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def main() -> None:
    """Run the parts that are asked for, and write results and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part", choices=("trained", "large", "sweep", "table"), help="one part only; the others' results are kept"
    )
    options = parser.parse_args()
    path = RESULTS / "fit.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results.setdefault("hardware", hardware())
    if options.part != "table":
        results |= {"hardware": hardware(), "default": repr(Lee2024Blast())}
    for part, run in (("trained", trained), ("large", large), ("sweep", sweep_profile)):
        if options.part in (None, part):
            results[part] = run()
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps(results, indent=1))
    text = summary(results)
    (RESULTS / "fit.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
