"""How fast structured layers and a structured Llama are on a CPU, against dense ones in the same run.

Layers of 2048 x 2048, 4096 x 4096 and 4096 x 11008 in float32 and bfloat16 at keep 0.5, each stack larger than the
caches; before anything is timed it is checked against its dense definition. Each cell is kept in results/cpu.json as
soon as it is measured, and a run that was interrupted goes on with what is missing. About 25 minutes on two cores that
nothing else uses.

    python benchmarks/cpu.py
    python benchmarks/cpu.py --only 'layers/float32' --again       # measure these cells anew
    python benchmarks/cpu.py --table                               # write the table again from the JSON
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hardware import hardware, hardware_line
from structmat import Blast, LowRank, Monarch, Rule, autotune_
from structmat._files import write_atomically
from structmat.bench import bench_layers
from structmat.integrations.transformers.generation import bench_generation
from structmat.integrations.transformers.llamas import random_llama

RESULTS = Path(__file__).parent / "results"
KEEP = 0.5
RULES = {
    "BLAST 4 x 4": Rule(Blast, KEEP, 4),
    "BLAST 16 x 16": Rule(Blast, KEEP, 16),
    "low-rank": Rule(LowRank, KEEP),
    "Monarch 4 x 4": Rule(Monarch, KEEP, 4),
    "Monarch 16 x 16": Rule(Monarch, KEEP, 16),
}
SHAPES = ((2048, 2048), (4096, 4096), (4096, 11008))
TOKENS = (1, 16, 128, 512)
GRADIENT_TOKENS = (128, 512)
DTYPES = (torch.float32, torch.bfloat16)
FORWARD_ROUNDS, GRADIENT_ROUNDS, CHOICE_ROUNDS = 15, 5, 5
MODEL = "llama-tiny"
VOCABULARIES = (4096, 32000)
PROMPT = 512
GENERATED = (10, 100, 1000)
MOST_TOKENS = 32
MODEL_ROUNDS = 7
MODEL_TARGET = 1.5

Cell = Callable[[], dict[str, Any]]


def target(format: str, dtype: str, shape: Sequence[int], step: str) -> float | None:
    """How many times faster than dense a cell is to be."""
    if step == "training":
        return None
    if step == "backward":
        return 1.5
    if format.startswith("BLAST"):
        return {"float32": 1.7, "bfloat16": 1.3 if shape[0] == 4096 else 1.0}[dtype]
    return {"float32": 1.8, "bfloat16": 1.0}[dtype]


def choose(model: nn.Module, tokens: Sequence[int]) -> None:
    """Let ``autotune_`` set the algorithms."""
    autotune_(model, tokens=tokens, allow_dense=False, rounds=CHOICE_ROUNDS)


def layer_cell(dtype: torch.dtype, shape: tuple[int, int], gradients: bool) -> dict[str, Any]:
    """Every format at one shape: forward with and without ``autotune_``, or the gradients."""
    found = bench_layers(
        RULES,
        shapes=[shape],
        tokens=GRADIENT_TOKENS if gradients else TOKENS,
        dtypes=[dtype],
        steps=("backward", "training") if gradients else ("forward",),
        rounds=GRADIENT_ROUNDS if gradients else FORWARD_ROUNDS,
        choose=None if gradients else choose,
    )
    return found.to_dict()


def model_cell(dtype: torch.dtype, vocabulary: int) -> dict[str, Any]:
    """The Llama: dense, with BLAST layers, and with these after ``autotune_``."""
    dense = random_llama(MODEL, dtype=dtype, vocab_size=vocabulary)
    blast = random_llama(MODEL, RULES["BLAST 16 x 16"], dtype=dtype, vocab_size=vocabulary)
    chosen = copy.deepcopy(blast)
    choose(chosen, (1, PROMPT))
    found = bench_generation(
        {"dense": dense, "BLAST 16 x 16": blast, "after autotune_": chosen},
        prefill=[PROMPT],
        generate=GENERATED,
        training=[PROMPT],
        most_tokens=MOST_TOKENS,
        rounds=MODEL_ROUNDS,
    ).to_dict()
    embedding = dense.model.embed_tokens.weight
    read = {name: size["bytes"] - embedding.numel() * embedding.element_size() for name, size in found["sizes"].items()}
    found["possible_decode"] = read["dense"] / read["BLAST 16 x 16"]
    return found


def cells() -> dict[str, Cell]:
    """Everything to measure, by name, in this order."""
    found: dict[str, Cell] = {}
    for gradients in (False, True):
        for dtype in DTYPES:
            for shape in SHAPES:
                key = f"layers/{name_of(dtype)}/{shape[0]}x{shape[1]}/{'gradients' if gradients else 'forward'}"
                found[key] = lambda dtype=dtype, shape=shape, gradients=gradients: layer_cell(dtype, shape, gradients)
    for dtype in DTYPES:
        for vocabulary in VOCABULARIES:
            key = f"model/{name_of(dtype)}/vocabulary-{vocabulary}"
            found[key] = lambda dtype=dtype, vocabulary=vocabulary: model_cell(dtype, vocabulary)
    return found


def name_of(dtype: torch.dtype) -> str:
    """``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def layer_tables(found: dict[str, Any]) -> list[str]:
    """Speed-ups and shares of the limit of all layers, as Markdown."""
    rows = [row for key, cell in found.items() if key.startswith("layers/") for row in cell["layers"]]
    columns = [("forward", tokens) for tokens in TOKENS]
    columns += [(step, tokens) for step in ("backward", "training") for tokens in GRADIENT_TOKENS]
    lines: list[str] = []
    for dtype in (name_of(dtype) for dtype in DTYPES):
        missed = 0
        body = []
        for shape in SHAPES:
            for format in RULES:
                texts = []
                for step, tokens in columns:
                    here = [
                        row
                        for row in rows
                        if (row["dtype"], row["format"], row["step"], row["tokens"]) == (dtype, format, step, tokens)
                        and tuple(row["shape"]) == shape
                    ]
                    text, miss = cell_text(here, target(format, dtype, shape, step))
                    texts.append(text)
                    missed += miss
                body.append(f"| {shape[0]} x {shape[1]} | {format} | " + " | ".join(texts) + " |")
        head = [f"{step} {tokens}" for step, tokens in columns]
        peaks = [cell["peaks"][dtype] for key, cell in found.items() if key.startswith(f"layers/{dtype}/")]
        if peaks:
            flops, moved = (max(peak[name] for peak in peaks) for name in ("flops", "bytes"))
            lines += [
                f"## {dtype}",
                "",
                f"Measured peaks: {flops / 1e9:.0f} GFLOP/s, {moved / 1e9:.1f} GB/s. Cells below target: {missed}.",
                "",
                "| shape | format | " + " | ".join(head) + " |",
                "|---|---|" + "---|" * len(head),
                *body,
                "",
            ]
    return lines


def model_table(found: dict[str, Any]) -> list[str]:
    """The Llamas, as Markdown."""
    columns = [
        ("prefill", PROMPT),
        ("decode", 1),
        ("training", PROMPT),
        *(("generate", tokens) for tokens in GENERATED),
    ]
    lines = [
        "## Llama",
        "",
        f"Six blocks of width 1024, BLAST with 16 x 16 blocks at keep {KEEP} in attention and MLPs, random weights. "
        "Each cell: seconds, and how many times faster than dense; with ~ where the time of fewer tokens was scaled "
        f"up ({MOST_TOKENS} were generated at most). Embedding and output head are dense in all of them; how much "
        "faster decoding can be by the bytes that it reads is in the column limit.",
        "",
        "| dtype | vocabulary | model | parameters | "
        + " | ".join(f"{step} {n}" for step, n in columns)
        + " | limit |",
        "|---|---|---|---|" + "---|" * len(columns) + "---|",
    ]
    start = len(lines)
    for key, cell in found.items():
        if not key.startswith("model/"):
            continue
        _, dtype, vocabulary = key.split("/")
        for name, size in cell["sizes"].items():
            texts = []
            for step, tokens in columns:
                row = next(r for r in cell["models"] if (r["model"], r["step"], r["tokens"]) == (name, step, tokens))
                text = f"{'~' * row['extrapolated']}{row['seconds']['median']:.3g} s, {row['speedup']:.2f}x"
                miss = name != "dense" and step in ("prefill", "decode") and row["speedup"] < MODEL_TARGET
                texts.append(f"**{text}**" if miss else text)
            limit = "" if name == "dense" else f"{cell['possible_decode']:.2f}x"
            head = (
                f"| {dtype} | {vocabulary.removeprefix('vocabulary-')} | {name} | {size['parameters'] / 1e6:.1f} M | "
            )
            lines.append(head + " | ".join(texts) + f" | {limit} |")
    return [*lines, ""] if len(lines) > start else []


def cell_text(here: list[dict[str, Any]], goal: float | None) -> tuple[str, bool]:
    """Speed-up and share of the limit, with what ``autotune_`` chose behind; bold where the target is missed."""
    if not here:
        return "", False
    here = sorted(here, key=lambda row: row["algorithm"] != "automatic")
    text = " → ".join(f"{row['speedup']:.2f}x" for row in here) + f" ({here[-1]['limit_share']:.2f})"
    miss = goal is not None and here[-1]["speedup"] < goal
    return (f"**{text}**" if miss else text), miss


def table(found: dict[str, Any]) -> str:
    """All results as Markdown."""
    facts = next(iter(found.values()))["hardware"]
    lines = [
        "# Speed on a CPU",
        "",
        f"Made by `benchmarks/cpu.py` on: {hardware_line(facts)}.",
        "",
        "Each cell: how many times faster than `nn.Linear` in the same run, by medians; behind an arrow with the "
        "algorithm that `autotune_(allow_dense=False)` chose, where it chose another; in brackets the share of the "
        "measured limit that is reached (the larger of operations over peak operations and bytes over peak bytes, "
        "over the time). A stack of layers larger than the caches is run at a time, after an untimed run of the same "
        "stack. The number in the column's head is the number of tokens; training is forward and backward together. "
        "**Bold** misses its target: forward in "
        "float32 1.7x for BLAST and 1.8x for the others; in bfloat16 1.3x for BLAST at the 4096 shapes, 1.0x else; "
        "backward 1.5x; both steps of the Llama 1.5x.",
        "",
        *layer_tables(found),
        *model_table(found),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="cells whose name contains this")
    parser.add_argument("--again", action="store_true", help="measure cells that are there already")
    parser.add_argument("--table", action="store_true", help="measure nothing, write the table")
    parser.add_argument("--list", action="store_true", help="name the cells")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of cpu.json and cpu.md")
    options = parser.parse_args()
    wanted = {name: cell for name, cell in cells().items() if re.search(options.only, name)}
    if options.list:
        print("\n".join(wanted))
        return
    path = options.out / "cpu.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    torch.manual_seed(0)
    for name, cell in wanted.items():
        if options.table or (name in found and not options.again):
            continue
        print(name, flush=True)
        found[name] = cell()
        order = {key: found[key] for key in (*cells(), *found) if key in found}
        write_atomically(path, lambda temporary, order=order: temporary.write_text(json.dumps(order, indent=1)))
        write_table(found, options.out)
    if not found:
        parser.error(f"expected results in {path} or cells to measure, found none")
    write_table(found, options.out)
    print(table(found))
    print(f"threads {torch.get_num_threads()}, bf16 instructions {hardware()['bf16_instructions']}")


def write_table(found: dict[str, Any], folder: Path) -> None:
    """Write the table."""
    write_atomically(folder / "cpu.md", lambda temporary: temporary.write_text(table(found)))


if __name__ == "__main__":
    main()
