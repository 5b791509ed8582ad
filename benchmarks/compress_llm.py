"""Compress a small trained language model without retraining, with every structure, with and without data.

``stories3M-llama`` from the data folder that STRUCTMAT_DATA names: all attention and MLP weights, one uniform keep in
every layer, calibrated on 1,500 stories (or on as many tokens of the training text of WikiText-2), token perplexity on
the last 300 stories (BOS in front, cut at 512 tokens). Everything was tuned on stories 1,501 to 2,016; the last 300
were looked at by this script alone. Every cell of the table is a run of its own, kept as JSON: a second call makes
those that are missing.

    python benchmarks/compress_llm.py            # all cells, about two hours on 2 cores
    python benchmarks/compress_llm.py --only "blast.*0.8"
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import transformers

import structmat as sm
from hardware import hardware, hardware_line
from structmat.compress import Calibration
from structmat.data import read_texts, token_batches
from structmat.evaluate import perplexity

RESULTS = Path(__file__).parent / "results"
CELLS = RESULTS / "compress_llm"
FITS = Path("structmat-bench") / "compress_llm"
"""Where the finished fits of a cell are kept until it is done."""

KEEPS = (0.9, 0.8, 0.65, 0.5)
BLOCKS = 16
MONARCH_BLOCKS = 4
REFINEMENT = sm.Refinement()
CALIBRATIONS = ("stories", "wikitext")

PLAIN, AT_ONCE, IN_SEQUENCE, REFINED = "plain", "at once", "in sequence", "refined"
ALLOCATED, TWO_SIDED, BOTH, ALL = "allocated", "two-sided", "allocated, two-sided", "allocated, two-sided, refined"
"""How a row uses data: not at all, statistics of the dense model, block by block (the default), with refinement, in
sequence with one budget for the whole network in place of a uniform keep, or weighed by gradients, or both, or with
refinement too."""


ROWS: dict[str, tuple[type[sm.Format], int | None, str]] = {
    "low-rank": (sm.LowRank, None, PLAIN),
    "low-rank, whitened": (sm.LowRank, None, AT_ONCE),
    "low-rank, in sequence": (sm.LowRank, None, IN_SEQUENCE),
    "monarch": (sm.Monarch, MONARCH_BLOCKS, PLAIN),
    "monarch, activation-aware": (sm.Monarch, MONARCH_BLOCKS, AT_ONCE),
    "monarch, in sequence": (sm.Monarch, MONARCH_BLOCKS, IN_SEQUENCE),
    "block-diagonal": (sm.BlockDiagonal, None, PLAIN),
    "block-diagonal, activation-aware": (sm.BlockDiagonal, None, AT_ONCE),
    "block-diagonal, in sequence": (sm.BlockDiagonal, None, IN_SEQUENCE),
    "blast": (sm.Blast, BLOCKS, PLAIN),
    "blast, activation-aware": (sm.Blast, BLOCKS, AT_ONCE),
    "blast, in sequence": (sm.Blast, BLOCKS, IN_SEQUENCE),
    "blast, refined": (sm.Blast, BLOCKS, REFINED),
    "blast, two-sided": (sm.Blast, BLOCKS, TWO_SIDED),
    "blast, allocated": (sm.Blast, BLOCKS, ALLOCATED),
    "blast alone, allocated, two-sided": (sm.Blast, BLOCKS, BOTH),
    "blast, allocated, two-sided": (sm.Blast, BLOCKS, BOTH),
    "blast, allocated, two-sided, refined": (sm.Blast, BLOCKS, ALL),
}
"""What to compress with: structure, blocks, and how."""

PRIORITY = (0.8, 0.5, 0.9, 0.65)
"""The order in which budgets are run."""


def cells() -> list[tuple[str, float, str]]:
    """Every cell: row, keep, calibration data (``"none"`` where the row takes none)."""
    found = []
    for calibration in CALIBRATIONS:
        for keep in PRIORITY:
            for row, (kind, _, run) in ROWS.items():
                if kind is sm.BlockDiagonal and keep != 0.5:
                    continue  # its keep is 1/2, 1/3, …
                if run == PLAIN and calibration != CALIBRATIONS[0]:
                    continue
                found.append((row, keep, "none" if run == PLAIN else calibration))
    return found


class Bench:
    """The model, its data, and the cells."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "stories3M-llama")
        stories = str(folder / "tinystories-sample" / "stories.txt.xz")
        self.test = read_texts(f"{stories}[-300:]")
        self.stories = read_texts(f"{stories}[:1500]")
        self.dense = self.score(self.load())

    def load(self) -> Any:
        """The dense model."""
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder / "stories3M-llama")

    def batches(self, calibration: str) -> list[Any]:
        """Calibration data; of WikiText as many tokens as of the stories."""
        rows = token_batches(self.tokenizer, sorted(self.stories, key=len), length=512, batch_size=8)
        if calibration != "wikitext":
            return rows
        tokens = sum(int(batch["attention_mask"].sum()) for batch in rows)
        texts = read_texts(str(self.folder / "wikitext-2" / "train.txt.xz"))
        packed = token_batches(self.tokenizer, texts, length=256, batch_size=8, packed=True)
        return packed[: round(tokens / (8 * 256))]

    def score(self, model: Any) -> dict[str, float]:
        """Token and word perplexity on the last 300 stories."""
        found = perplexity(model, self.tokenizer, self.test, length=512, truncate=True, progress=False)
        return {"token": found.token, "word": found.word}

    def run(self, row: str, keep: float, calibration: str) -> dict[str, Any]:
        """One cell."""
        kind, blocks, how = ROWS[row]
        model = self.load()
        moments, spent = dense_moments(CALIBRATIONS.index(calibration), self) if how == AT_ONCE else (None, 0.0)
        batches = None if how in (PLAIN, AT_ONCE) else self.batches(calibration)
        start = time.perf_counter()
        cache = None if how in (PLAIN, AT_ONCE) else FITS / path_of(row, keep, calibration).stem
        if how in (ALLOCATED, BOTH, ALL):
            structures = kind if "alone" in row else (kind, sm.LowRank)
            shared = {"structures": structures, "blocks": blocks, "layers": r".*_proj", "cache": cache}
            plan = sm.allocate(model, batches or [], keep=keep, **shared)
        else:
            plan = sm.make_plan(model, {r".*_proj": kind}, keep=keep, blocks=blocks)
        allocated = time.perf_counter()
        refine = REFINEMENT if how in (REFINED, ALL) else None
        weighed = {"two_sided": how in (TWO_SIDED, BOTH, ALL), "cache": cache}
        fits = sm.compress_(model, plan, calibration=moments, batches=batches, refine=refine, **weighed)
        seconds = time.perf_counter() - start + spent
        score = self.score(model)
        kept = sum(f.num_parameters() for f in plan.values()) / sum(f.M * f.N for f in plan.values())
        return {
            "row": row,
            "keep": keep,
            "calibration": calibration,
            "blocks": blocks,
            "kept": kept,
            "seconds": seconds,
            "allocating": allocated - start,
            "formats": {name: str(format) for name, format in plan.items()},
            "perplexity": score["token"],
            "word_perplexity": score["word"],
            "ln": math.log(score["token"] / self.dense["token"]),
            "weight_error": math.sqrt(sum(fit.error**2 for fit in fits.values()) / len(fits)),
            "hardware": hardware(),
            "transformers": transformers.__version__,
        }


@functools.cache
def dense_moments(calibration: int, bench: Bench) -> tuple[Calibration, float]:
    """The statistics of the dense model on one of ``CALIBRATIONS``, for every row, and the seconds that they took."""
    model = bench.load()
    start = time.perf_counter()
    plan = sm.make_plan(model, {r".*_proj": sm.LowRank}, keep=0.5)
    moments = sm.calibrate(model, bench.batches(CALIBRATIONS[calibration]), plan)
    return moments, time.perf_counter() - start


def path_of(row: str, keep: float, calibration: str) -> Path:
    """Where a cell is kept."""
    return CELLS / (re.sub(r"[^a-z]+", "-", row) + f"-{keep}-{calibration}.json")


def table(dense: dict[str, float]) -> str:
    """The cells that are there, as Markdown."""
    found = [json.loads(path.read_text()) for path in sorted(CELLS.glob("*.json"))]
    by_key = {(cell["row"], cell["keep"], cell["calibration"]): cell for cell in found}
    lines = [
        "# A language model compressed without retraining",
        "",
        f"Made by `benchmarks/compress_llm.py` on: {hardware_line(found[0]['hardware'])}, transformers "
        f"{found[0]['transformers']}.",
        "",
        "`stories3M-llama`, all attention and MLP weights, the same keep in every layer. Token perplexity on the last "
        f"300 stories (BOS, cut at 512 tokens), dense {dense['token']:.3f} (word perplexity {dense['word']:.2f}); in "
        "brackets ln(perplexity / dense). BLAST has 16 x 16 blocks, Monarch 4 x 4. *Activation-aware* and *whitened*: "
        "statistics of the dense model, all at once. *In sequence*: block by block on what the compressed blocks give, "
        "the default with data. *Refined*: `--refine`. *Allocated*: in sequence, the same share of all parameters "
        "spread over the layers by `allocate`, in place of the same keep in each, and layers may be low-rank unless "
        "the row says *alone*. *Two-sided*: errors are weighed by gradients too. Each cell's JSON has its hardware. No "
        "row is retrained.",
    ]
    for calibration, title in (("stories", "1,500 stories"), ("wikitext", "WikiText-2, as many tokens")):
        lines += ["", f"## Calibrated on {title}", "", "| structure | " + " | ".join(f"keep {k}" for k in KEEPS) + " |"]
        lines.append("|---|" + "---|" * len(KEEPS))
        for row, (_, _, run) in ROWS.items():
            key = "none" if run == PLAIN else calibration
            values = [by_key.get((row, keep, key)) for keep in KEEPS]
            if any(values):
                texts = (f"{v['perplexity']:.2f} ({v['ln']:.3f})" if v else "" for v in values)
                lines.append(f"| {row} | " + " | ".join(texts) + " |")
    lines += ["", "Seconds of each run, as the machine was then (it was not always quiet):", ""]
    lines += ["| structure | calibration | " + " | ".join(f"keep {k}" for k in KEEPS) + " |", "|---|---|" + "---|" * 4]
    for row in ROWS:
        for calibration in ("none", *CALIBRATIONS):
            values = [by_key.get((row, keep, calibration)) for keep in KEEPS]
            if any(values):
                texts = (f"{v['seconds']:.0f}" if v else "" for v in values)
                lines.append(f"| {row} | {calibration} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the cells that are missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=".*", help="cells to run: a pattern for 'row keep calibration'")
    options = parser.parse_args()
    if "STRUCTMAT_DATA" not in os.environ:
        raise SystemExit("expected STRUCTMAT_DATA to name the folder with stories3M-llama")
    CELLS.mkdir(parents=True, exist_ok=True)
    bench = Bench(Path(os.environ["STRUCTMAT_DATA"]))
    for cell in cells():
        path = path_of(*cell)
        if path.exists() or not re.search(options.only, " ".join(map(str, cell))):
            continue
        result = bench.run(*cell)
        print(f"{cell}: perplexity {result['perplexity']:.3f}, ln {result['ln']:.4f}, {result['seconds']:.0f} s")
        path.write_text(json.dumps(result, indent=1))
        (RESULTS / "compress_llm.md").write_text(table(bench.dense))
    (RESULTS / "compress_llm.md").write_text(table(bench.dense))


if __name__ == "__main__":
    main()
