"""Compress SmolLM2-135M-Instruct with one budget for the whole network, without retraining.

The seven kinds of attention and MLP weights share the budget; they are calibrated on 64 packed rows of 512 tokens of
WikiText-2's training text, of paragraphs without ``<unk>``. Token perplexity is measured on 12 windows of 1,024 tokens
that are spread evenly over the raw test text, as for the peers in the table, and on text of two other kinds, 48
excerpts of C4 and 48 short stories. Each run is kept as JSON; a second call resumes it from the finished fits.

    python benchmarks/smollm.py MODEL --keep 0.8                  # MODEL is a folder with the dense model
    python benchmarks/smollm.py MODEL --keep 0.8 --uniform --quick
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import lzma
import math
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import structmat as sm
from hardware import hardware, hardware_line
from structmat.data import read_texts
from structmat.evaluate import perplexity
from structmat.fit import Lee2024Blast, Method

CELLS = Path(__file__).parent / "results" / "smollm"
ROWS, LENGTH = 64, 512
WINDOWS, WINDOW = 12, 1024
EXCERPTS = 48
TEXTS = ("wikitext", "c4", "stories")
LAYERS = r".*\.(q|k|v|o|gate|up|down)_proj"


def quick(format: sm.Format) -> Method[Any] | None:
    """The method of quick runs: about a third of the work for BLAST, the default one for others."""
    return Lee2024Blast(sweeps=25, metric_iterations=40) if isinstance(format, sm.Blast) else None


def text_of(name: str) -> str:
    """A text of WikiText-2 from the data folder."""
    with lzma.open(Path(os.environ["STRUCTMAT_DATA"]) / "wikitext-2" / name, "rt", encoding="utf-8") as file:
        return file.read()


def calibration(tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    """The rows, four to a batch, of paragraphs from all over the training text."""
    lines = [line for line in text_of("train.txt.xz").split("\n") if "<unk>" not in line and not line.startswith(" =")]
    paragraphs = [line for line in lines if line.strip()]
    random.Random(0).shuffle(paragraphs)
    tokens = tokenizer("\n".join(paragraphs[:2000])).input_ids[: ROWS * LENGTH]
    return [{"input_ids": rows} for rows in torch.tensor(tokens).view(-1, 4, LENGTH)]


@torch.no_grad()
def window_perplexity(model: Any, tokenizer: Any) -> float:
    """Token perplexity on windows that are spread evenly over the raw test text, each for itself."""
    tokens = torch.tensor(tokenizer(text_of("test.raw.txt.xz")).input_ids)
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    chosen = [windows[i * len(windows) // WINDOWS] for i in range(WINDOWS)]
    losses = [float(model(input_ids=row[None], labels=row[None]).loss) for row in chosen]
    return math.exp(sum(losses) / len(losses))


def scores(model: Any, tokenizer: Any) -> dict[str, float]:
    """Perplexity on each kind of text."""
    data = Path(os.environ["STRUCTMAT_DATA"])
    with lzma.open(data / "zeroshot" / "c4_excerpts.jsonl.xz", "rt", encoding="utf-8") as file:
        excerpts = [json.loads(line)["text"] for line in itertools.islice(file, EXCERPTS)]
    stories = read_texts(str(data / "tinystories-sample" / f"stories.txt.xz[-{EXCERPTS}:]"))
    found = {"wikitext": window_perplexity(model, tokenizer)}
    for name, texts in (("c4", excerpts), ("stories", stories)):
        found[name] = perplexity(model, tokenizer, texts, length=512, truncate=True, progress=False).token
    return found


def dense_scores(model: Any, tokenizer: Any) -> dict[str, float]:
    """The scores of the dense model, which are kept for other cells."""
    path = CELLS / "dense.json"
    if not path.is_file():
        path.write_text(json.dumps(scores(model, tokenizer), indent=1) + "\n")
    return json.loads(path.read_text())


def bytes_of(model: Any, names: list[str]) -> int:
    """The bytes of the weights of layers."""
    layers = [model.get_submodule(name) for name in names]
    return sum(tensor.nbytes for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))


def in_integers(model: Any, tokenizer: Any, batches: list[Any], names: list[str]) -> dict[str, Any]:
    """Perplexity and bytes of the planned layers, in float16 and in integers."""
    found = {"float32": {"bytes": bytes_of(model, names), "perplexity": window_perplexity(model, tokenizer)}}
    for kind in ("float16", "int8", "int4"):
        for data in (None,) if kind == "float16" else (None, batches):
            start, rounded = time.perf_counter(), copy.deepcopy(model)
            if kind == "float16":
                rounded.half().float()
            else:
                sm.quantize_(rounded, kind, names, batches=data)
            name = kind if data is None else f"{kind}, with data"
            size = bytes_of(rounded, names) // (2 if kind == "float16" else 1)
            seconds = time.perf_counter() - start
            found[name] = {"bytes": size, "perplexity": window_perplexity(rounded, tokenizer), "seconds": seconds}
            print(name, found[name], flush=True)
    return found


def plan_for(model: Any, arguments: argparse.Namespace, batches: list[Any], cache: Path) -> sm.Plan:
    """The format of each layer; none for the dense model."""
    if arguments.keep == 1:
        return sm.Plan({})
    if arguments.uniform:
        return sm.make_plan(model, {LAYERS: sm.Blast}, keep=arguments.keep, blocks=16)
    return sm.allocate(model, batches, keep=arguments.keep, blocks=16, layers=LAYERS, cache=cache)


def run(arguments: argparse.Namespace, cell: Path) -> dict[str, Any]:
    """One cell: compress, and measure before and after."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    dense = dense_scores(model, tokenizer)
    batches, cache = calibration(tokenizer), cell.with_suffix(".fits")
    names = [name for name, _ in model.named_modules() if re.fullmatch(LAYERS, name)]
    size = sum(weight.numel() for name in names for weight in model.get_submodule(name).parameters())
    start = time.perf_counter()
    plan = plan_for(model, arguments, batches, cache)
    allocated = time.perf_counter()
    fits = sm.compress_(
        model,
        plan,
        method=quick if arguments.quick else None,
        batches=batches,
        two_sided=not arguments.one_sided,
        refine=sm.Refinement() if arguments.refine else None,
        cache=cache,
    )
    seconds = time.perf_counter() - start
    found = scores(model, tokenizer)
    integers = in_integers(model, tokenizer, batches, names) if arguments.quantize else {}
    if arguments.save:
        model.save_pretrained(arguments.save)
        tokenizer.save_pretrained(arguments.save)
    kept = 1 - sum(f.M * f.N - f.num_parameters() for f in plan.values()) / size
    return {
        "kept": kept,
        "dense": dense,
        "perplexity": found,
        "ln": {name: math.log(value / dense[name]) for name, value in found.items()},
        "seconds": {"allocate": allocated - start, "all": seconds},
        "formats": {name: str(format) for name, format in plan.items()},
        "integers": integers,
        "mean_output_error": sum(fit.output_error or 0.0 for fit in fits.values()) / max(len(fits), 1),
        "hardware": hardware(),
        "transformers": transformers.__version__,
    }


PEERS = {
    "SVD-LLM (whitened SVD)": (132.1, 556.6),
    "AA-SVD without refinement": (259.2, 587.5),
    "KFAC-SVD, uniform": (104.0, 359.4),
    "ZS-SVD, one-shot": (65.4, 350.8),
    "KFAC-SVD with LEMS allocation": (47.1, 148.8),
}
"""The perplexity that the official code of other methods gave in the same protocol, at keep 0.8 and 0.6."""


def integer_lines(cells: dict[str, Any]) -> list[str]:
    """The table of weights in integers."""
    lines = ["", "The planned layers in fewer bits, WikiText-2:", ""]
    lines += ["| what | weights | bytes of the planned layers | perplexity | over float32 |", "|---|---|---|---|---|"]
    for name, cell in cells.items():
        for kind, one in cell.get("integers", {}).items():
            change = one["perplexity"] / cell["integers"]["float32"]["perplexity"] - 1
            what = f"keep {name.split('-')[0]}" if cell["kept"] < 1 else "dense"
            size = one["bytes"] / 2**20
            lines.append(f"| {what} | {kind} | {size:.1f} MiB | {one['perplexity']:.2f} | {change:+.1%} |")
    return lines


def table() -> str:
    """The cells as Markdown."""
    cells = {path.stem: json.loads(path.read_text()) for path in sorted(CELLS.glob("*.json")) if path.stem != "dense"}
    dense = json.loads((CELLS / "dense.json").read_text())
    lines = [
        "# SmolLM2-135M-Instruct compressed without retraining",
        "",
        f"Made by `benchmarks/smollm.py` on: {hardware_line(next(iter(cells.values()))['hardware'])}.",
        "",
        "The seven kinds of attention and MLP weights of the 30 layers are planned, embeddings and head stay. "
        "Calibrated on 64 packed rows of 512 tokens of WikiText-2's training text. Token perplexity, in brackets "
        "ln(perplexity / dense), on 12 windows of 1,024 tokens of WikiText-2's raw test text, on 48 excerpts of C4 "
        "and on 48 short stories. *Kept* is the share of the planned weights' parameters. BLAST has 16 x 16 "
        "blocks; *uniform*: the same keep in every layer; *allocated*: one budget, and layers may be low-rank too. "
        "Errors are weighed by gradients but where a row says one-sided. *Quick*: 25 + 40 steps of a fit in place of "
        "50 + 100. *Refined*: `--refine`. Runs with one thread shared the machine with others. Each cell's JSON has "
        "its hardware, its plan and its commit.",
        "",
        "| what | kept | WikiText-2 | C4 | stories | minutes (threads) |",
        "|---|---|---|---|---|---|",
        "| dense | 1 | " + " | ".join(f"{dense[name]:.2f}" for name in TEXTS) + " | |",
    ]
    for name, cell in cells.items():
        if cell["kept"] == 1 or "quantize" in name:
            continue
        keep, *flags = name.split("-", 1)
        words = " ".join(flags).replace("-", " ").replace("one sided", "one-sided")
        how = words if "uniform" in words else f"allocated {words}".strip()
        values = [f"{cell['perplexity'][text]:.2f} ({cell['ln'][text]:.3f})" for text in TEXTS]
        threads = cell["hardware"]["threads"]
        minutes = f"{cell['seconds']['all'] / 60:.0f} ({threads})"
        lines.append(f"| keep {keep}, {how} | {cell['kept']:.3f} | " + " | ".join(values) + f" | {minutes} |")
    lines += integer_lines(cells)
    lines += ["", "Others' official code, WikiText-2 in the same protocol (measured earlier, elsewhere):", ""]
    lines += ["| method | keep 0.8 | keep 0.6 |", "|---|---|---|"]
    for name, values in PEERS.items():
        texts = [f"{value} ({math.log(value / dense['wikitext']):.3f})" for value in values]
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run one cell, or print it if it is there, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--save", default="", help="a folder for the compressed model")
    for flag in ("--uniform", "--one-sided", "--quick", "--refine", "--quantize"):
        parser.add_argument(flag, action="store_true")
    arguments = parser.parse_args()
    flags = [flag for flag in ("uniform", "one_sided", "quick", "refine", "quantize") if getattr(arguments, flag)]
    cell = CELLS / f"{'-'.join([f'{arguments.keep:g}', *flags])}.json"
    cell.parent.mkdir(parents=True, exist_ok=True)
    if not cell.is_file():
        cell.write_text(json.dumps(run(arguments, cell), indent=1) + "\n")
    (CELLS.parent / "smollm.md").write_text(table())
    result = json.loads(cell.read_text())
    print(json.dumps({name: result[name] for name in ("kept", "dense", "perplexity", "ln", "seconds")}, indent=1))


if __name__ == "__main__":
    main()
