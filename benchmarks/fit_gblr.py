"""Compare GBLR fits: the published initialisation and the default, with low-rank and BLAST at the same parameters.

On really trained weights (the layers of stories3M-llama, where STRUCTMAT_DATA names the data folder, and those of the
demo's Vision Transformer), at keep 0.5 and 0.3. Both GBLR fits get the same budget, ``GaudiGblr.for_budget``, with
``min(M, N)`` components, and are counted hardened, entry by entry. Each weight is fitted by itself, one method after
the other.

    python benchmarks/fit_gblr.py              # about half an hour on one core
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from torch import Tensor

from fit import trained_weights
from hardware import hardware, hardware_line
from structmat import Blast, GaudiGblr, LowRank
from structmat.fit import Lee2024Blast, Lee2024Gblr, TruncatedSvd
from structmat.formats import harden

RESULTS = Path(__file__).parent / "results"
KEEPS = (0.5, 0.3)
BLOCKS = 4


def cell(name: str, weight: Tensor, keep: float) -> dict[str, Any]:
    """All fits of one weight at one budget."""
    M, N = weight.shape
    format = GaudiGblr.for_budget(M, N, keep=keep)
    published = Lee2024Gblr.published()(weight, format)
    default = Lee2024Gblr()(weight, format)
    low_rank = TruncatedSvd()(weight, LowRank.for_budget(M, N, keep=keep))
    blast = Lee2024Blast()(weight, Blast.for_budget(M, N, keep=keep, blocks=BLOCKS))
    record: dict[str, Any] = {"weight": name, "shape": [M, N], "asked": keep, "budget": format.num_parameters()}
    for key, fit in {"published": published, "default": default}.items():
        hard, factors = harden(format, fit.factors)
        record[key] = {
            "error": fit.error,
            "seconds": fit.seconds,
            "parameters": hard.num_parameters(),
            "components": hard.components,
            "error_hardened": float((hard.to_dense(factors) - weight).norm() / weight.norm()),
        }
    for key, fit in {"low_rank": low_rank, "blast": blast}.items():
        record[key] = {"error": fit.error, "seconds": fit.seconds, "parameters": fit.format.num_parameters()}
    return record


def table(found: dict[str, Any]) -> str:
    """The records as Markdown."""
    lines = [
        "# GBLR fits of trained weights",
        "",
        f"Made by `benchmarks/fit_gblr.py` on: {hardware_line(found['hardware'])}.",
        "",
        "Relative Frobenius error, medians; ratios are medians of the weights' own ratios. *Default*: `Lee2024Gblr()`; "
        "*published*: `Lee2024Gblr.published()`, 1,000 steps of Adam; both at the same number of true parameters, "
        f"hardened. BLAST has {BLOCKS} x {BLOCKS} blocks.",
        "",
        "| weights | keep | low-rank | BLAST | published | default | default / published | default / low-rank (worst) "
        "| time / published |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for source in ("llama", "vit"):
        for keep in KEEPS:
            group = [r for r in found["records"] if r["weight"].startswith(source) and r["asked"] == keep]
            if not group:
                continue

            def median(key: str, group: list[dict[str, Any]] = group) -> str:
                return f"{statistics.median(r[key]['error'] for r in group):.4f}"

            ratios = [r["default"]["error"] / r["published"]["error"] for r in group]
            low = [r["default"]["error"] / r["low_rank"]["error"] for r in group]
            times = [r["default"]["seconds"] / r["published"]["seconds"] for r in group]
            lines.append(
                f"| {len(group)} of {source} | {keep} | {median('low_rank')} | {median('blast')} | "
                f"{median('published')} | {median('default')} | {statistics.median(ratios):.3f} (worst "
                f"{max(ratios):.3f}) | {statistics.median(low):.3f} ({max(low):.3f}) | 1/"
                f"{1 / statistics.median(times):.1f} |"
            )
    records = found["records"]
    better = sum(r["default"]["error"] < r["published"]["error"] for r in records)
    below = sum(r["default"]["error"] < r["low_rank"]["error"] for r in records)
    over = sum(max(r[k]["parameters"] for k in ("default", "published")) > r["budget"] for r in records)
    lines += [
        "",
        f"The default is below the published one on {better} of {len(records)} weights, below low-rank on "
        f"{below}; {over} fits are over the budget.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fit what is missing and write JSON and table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    path = RESULTS / "fit_gblr.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"records": []}
    done = {(r["weight"], r["asked"]) for r in found["records"]}
    for name, weight in trained_weights().items():
        for keep in KEEPS:
            if (name, keep) in done:
                continue
            found["records"].append(cell(name, weight, keep))
            found["hardware"] = hardware()
            path.write_text(json.dumps(found, indent=1))
            last = found["records"][-1]
            print(name, keep, {k: round(last[k]["error"], 4) for k in ("low_rank", "published", "default")}, flush=True)
            (RESULTS / "fit_gblr.md").write_text(table(found))
    (RESULTS / "fit_gblr.md").write_text(table(found))


if __name__ == "__main__":
    main()
