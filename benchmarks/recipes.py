"""The three recipes with names on a small trained language model: time, perplexity, and whether two runs are equal.

``stories3M-llama`` from the data folder that STRUCTMAT_DATA names, calibrated on its first 1,500 stories, token
perplexity on the last 300 (BOS in front, cut at 512 tokens), as in ``benchmarks/compress_llm.py``. Another model comes
with data of its own. Each run is kept as JSON; a second call makes those that are missing.

    python benchmarks/recipes.py                          # all recipes at two budgets
    python benchmarks/recipes.py --only quick-0.8 --twice # and compare the bytes of two runs
    python benchmarks/recipes.py --model MODEL --calibrate train.txt --test test.txt --only quick-0.8
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import transformers

import structmat as sm
from hardware import hardware, hardware_line
from structmat.cli.recipe import named_recipes, read_recipe, with_settings
from structmat.data import read_texts
from structmat.evaluate import perplexity
from structmat.pretrained import run_recipe

RESULTS = Path(__file__).parent / "results"
CELLS = RESULTS / "recipes"
KEEPS = (0.8, 0.6)
WEIGHTS = "compress/model.safetensors"


def score(model: str, tokenizer: Any, texts: list[str]) -> float:
    """Token perplexity."""
    return perplexity(sm.load_pretrained(model), tokenizer, texts, length=512, truncate=True, progress=False).token


def timed_run(given: dict[str, Any], folder: Path) -> tuple[float, float]:
    """Run a recipe; the seconds on the clock and of all threads."""
    start, spent = time.perf_counter(), time.process_time()
    run_recipe(given, folder)
    return time.perf_counter() - start, time.process_time() - spent


def cell(arguments: argparse.Namespace, recipe: str, keep: float, dense: float) -> dict[str, Any]:
    """One recipe at one budget."""
    given = {**read_recipe(recipe), "model": arguments.model}
    given = with_settings(given, [f"keep={keep}", f"calibrate={arguments.calibrate}"])
    folder = Path(tempfile.mkdtemp(prefix="structmat-recipes-"))
    try:
        seconds, spent = timed_run(given, folder / "one")
        tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
        found = score(str(folder / "one" / "compress"), tokenizer, read_texts(arguments.test))
        record = json.loads((folder / "one" / "compress" / "structmat.json").read_text())
        fits = sum(layer["seconds"] for layer in record["layers"].values())
        equal = None
        if arguments.twice:
            timed_run(given, folder / "two")
            equal = (folder / "one" / WEIGHTS).read_bytes() == (folder / "two" / WEIGHTS).read_bytes()
    finally:
        shutil.rmtree(folder)
    return {
        "model": Path(arguments.model).name,
        "recipe": recipe,
        "keep": keep,
        "dense": dense,
        "perplexity": found,
        "ln": math.log(found / dense),
        "output_error": record["output_error"],
        "seconds": seconds,
        "processor_seconds": spent,
        "fit_seconds": fits,
        "equal": equal,
        "hardware": hardware(),
        "transformers": transformers.__version__,
    }


def table() -> str:
    """The cells that are there, as Markdown."""
    cells = [json.loads(path.read_text()) for path in sorted(CELLS.glob("*.json"))]
    lines = [
        "# Recipes",
        "",
        f"Made by `benchmarks/recipes.py` on: {hardware_line(cells[0]['hardware'])}.",
        "",
        "Token perplexity; in brackets ln(perplexity / dense). *Fits* are the seconds of the fits alone, and *all* is "
        "the time on the clock, loading included; *processor* is the time of all threads, which other work disturbs "
        "less. *Equal*: whether a second run wrote the same bytes. Each cell's JSON has its hardware.",
        "",
        "| model | recipe | keep | dense | perplexity | output error | fits | all | processor | threads | equal |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in sorted(cells, key=lambda one: (one["model"], -one["keep"], one["seconds"])):
        times = f"{one['fit_seconds']:.0f} s | {one['seconds']:.0f} s | {one['processor_seconds']:.0f} s"
        equal = {None: "", True: "yes", False: "no"}[one["equal"]]
        lines.append(
            f"| {one['model']} | {one['recipe']} | {one['keep']} | {one['dense']:.3f} | {one['perplexity']:.3f} "
            f"({one['ln']:.3f}) | {one['output_error']:.4f} | {times} | {one['hardware']['threads']} | {equal} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the cells that are missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("STRUCTMAT_DATA", ""))
    stories = data / "tinystories-sample" / "stories.txt.xz"
    parser.add_argument("--model", default=str(data / "stories3M-llama"))
    parser.add_argument("--calibrate", default=f"{stories}[:1500]")
    parser.add_argument("--test", default=f"{stories}[-300:]")
    parser.add_argument("--only", default="", help="a cell to run, such as quick-0.8")
    parser.add_argument("--twice", action="store_true", help="run each cell twice and compare the bytes")
    arguments = parser.parse_args()
    CELLS.mkdir(parents=True, exist_ok=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    dense = score(arguments.model, tokenizer, read_texts(arguments.test))
    for keep in KEEPS:
        for recipe in sorted(named_recipes(), key=["quick", "default", "best"].index):
            name = f"{recipe}-{keep}"
            path = CELLS / f"{Path(arguments.model).name}-{name}.json"
            if arguments.only not in ("", name) or path.is_file():
                continue
            path.write_text(json.dumps(cell(arguments, recipe, keep, dense), indent=1) + "\n")
            (RESULTS / "recipes.md").write_text(table())
            print(path.read_text())
    (RESULTS / "recipes.md").write_text(table())


if __name__ == "__main__":
    main()
