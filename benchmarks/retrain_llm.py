"""Retrain a small language model that was compressed to half, with every structure alike.

``stories3M-llama`` from the data folder that STRUCTMAT_DATA names, all attention and MLP weights at keep 0.5: BLAST,
low-rank and Monarch fitted to the weights with calibration data (in sequence), and BLAST from a random start, whose
other weights are the pretrained ones. Everyone trains for the same number of steps on the same 1,500 stories with
the dense model as teacher, and tunes the same: the peak learning rate, out of the same candidates, each with one run
of seed 0, by perplexity on stories 1,501 to 2,016. The best one then runs with three seeds, which set the order of the
data (and the random start), and is measured on the last 300 stories. Every run is kept as JSON; a second call makes
those that are missing.

    python benchmarks/retrain_llm.py             # about an hour and a half on 2 cores
    python benchmarks/retrain_llm.py --only "blast|monarch"
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import structmat as sm
from hardware import hardware, hardware_line
from structmat.data import read_texts, token_batches
from structmat.evaluate import perplexity
from structmat.integrations.transformers.arguments import StructuredTrainingArguments
from structmat.integrations.transformers.retraining import retrain

RESULTS = Path(__file__).parent / "results"
RUNS = RESULTS / "retrain_llm"
STEPS = 200
BATCH = 8
LENGTH = 256
CANDIDATES = (2e-4, 5e-4, 1.5e-3)
SEEDS = (0, 1, 2)
KEEP = 0.5
STARTS: dict[str, tuple[type[sm.Format], int | None, bool]] = {
    "blast": (sm.Blast, 16, True),
    "low-rank": (sm.LowRank, None, True),
    "monarch": (sm.Monarch, 4, True),
    "blast, random start": (sm.Blast, 16, False),
}
"""Structure, blocks, and whether it is fitted to the pretrained weights."""


class Bench:
    """The model, its data and its compressed starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "stories3M-llama")
        stories = str(folder / "tinystories-sample" / "stories.txt.xz")
        self.train = read_texts(f"{stories}[:1500]")
        self.development = read_texts(f"{stories}[1500:2016]")[::2]
        self.test = read_texts(f"{stories}[-300:]")
        self.starts = Path(tempfile.gettempdir()) / "structmat-retrain-llm"  # what a later call can take up again
        self.starts.mkdir(exist_ok=True)

    def load(self) -> Any:
        """The dense model."""
        return transformers.AutoModelForCausalLM.from_pretrained(self.folder / "stories3M-llama")

    def start(self, name: str, seed: int) -> Any:
        """The compressed model before it is trained."""
        kind, blocks, fitted = STARTS[name]
        model = self.load()
        plan = sm.make_plan(model, {r".*_proj": kind}, keep=KEEP, blocks=blocks)
        if not fitted:
            return sm.apply_plan_(model, plan, generator=torch.Generator().manual_seed(seed))
        path = self.starts / f"{name}.safetensors"
        if not path.exists():
            batches = token_batches(self.tokenizer, sorted(self.train, key=len), length=512, batch_size=8)
            sm.save_model(compressed(model, plan, batches), path)
            model = self.load()
        return sm.load_model(model, path)

    def score(self, model: Any, texts: list[str]) -> float:
        """Token perplexity."""
        return perplexity(model, self.tokenizer, texts, length=512, truncate=True, progress=False).token

    def run(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        """One training run."""
        model = self.start(name, seed)
        before = self.score(model, self.development)
        with tempfile.TemporaryDirectory() as out:
            args = StructuredTrainingArguments(
                output_dir=out,
                max_steps=STEPS,
                per_device_train_batch_size=BATCH,
                learning_rate=rate,
                lr_scheduler_type="cosine",
                warmup_steps=20,
                weight_decay=0.01,
                distill_logits=1.0,
                task_weight=0.5,
                seed=seed,
                data_seed=seed,
                save_strategy="no",
                report_to="none",
                logging_steps=50,
                use_cpu=True,
                disable_tqdm=True,
            )
            start = time.perf_counter()
            retrain(model, self.tokenizer, self.train, None, args, teacher=self.load(), length=LENGTH)
        return {
            "start": name,
            "learning_rate": rate,
            "seed": seed,
            "steps": STEPS,
            "batch": BATCH,
            "length": LENGTH,
            "seconds": time.perf_counter() - start,
            "before": before,
            "development": self.score(model, self.development),
            "test": self.score(model, self.test),
            "hardware": hardware(),
            "transformers": transformers.__version__,
        }


def compressed(model: Any, plan: sm.Plan, batches: list[Any]) -> Any:
    """The model compressed in sequence."""
    sm.compress_(model, plan, batches=batches)
    return model


def path_of(name: str, rate: float, seed: int) -> Path:
    """Where a run is kept."""
    return RUNS / f"{name.replace(', ', '-').replace(' ', '-')}-{rate}-{seed}.json"


def read(name: str, rate: float, seed: int) -> dict[str, Any] | None:
    """A run that is there."""
    path = path_of(name, rate, seed)
    return json.loads(path.read_text()) if path.exists() else None


def best_rate(name: str) -> float | None:
    """The learning rate with the least perplexity on the development stories; None while runs are missing."""
    found = {rate: read(name, rate, 0) for rate in CANDIDATES}
    if not all(found.values()):
        return None
    return min(CANDIDATES, key=lambda rate: (found[rate] or {})["development"])


def table() -> str:
    """The runs that are there, as Markdown."""
    found = [json.loads(path.read_text()) for path in sorted(RUNS.glob("*.json"))]
    lines = [
        "# A language model at half its weights, retrained",
        "",
        f"Made by `benchmarks/retrain_llm.py` on: {hardware_line(found[0]['hardware'])}, transformers "
        f"{found[0]['transformers']}.",
        "",
        f"`stories3M-llama`, keep {KEEP} in every attention and MLP weight, {STEPS} steps of {BATCH} stories (cut "
        f"at {LENGTH} tokens), the learning rate falling as a cosine after 20 steps, distillation from the dense model "
        "beside the usual loss. Token perplexity on the last 300 stories (BOS, cut at 512 tokens; dense 3.87), three "
        "seeds.",
        "",
        "| start | learning rate | before (development) | seeds | mean | spread (max - min) | ln(mean / 3.868) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in STARTS:
        rate = best_rate(name)
        if rate is None:
            continue
        runs = [run for seed in SEEDS if (run := read(name, rate, seed))]
        tests = [run["test"] for run in runs]
        mean = statistics.mean(tests)
        lines.append(
            f"| {name} | {rate} | {runs[0]['before']:.2f} | {', '.join(f'{t:.3f}' for t in tests)} | {mean:.3f} | "
            f"{max(tests) - min(tests):.3f} | {math.log(mean / 3.868):.3f} |"
        )
    lines += ["", "Tuning: perplexity on the development stories, seed 0.", ""]
    lines += ["| start | " + " | ".join(map(str, CANDIDATES)) + " |", "|---|" + "---|" * len(CANDIDATES)]
    for name in STARTS:
        values = [read(name, rate, 0) for rate in CANDIDATES]
        lines.append(f"| {name} | " + " | ".join(f"{v['development']:.3f}" if v else "" for v in values) + " |")
    minutes = [run["seconds"] / 60 for run in found]
    lines += ["", f"One run took {statistics.median(minutes):.1f} minutes (median)."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the runs that are missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=".*", help="starts to run: a pattern for the whole name")
    options = parser.parse_args()
    if "STRUCTMAT_DATA" not in os.environ:
        raise SystemExit("expected STRUCTMAT_DATA to name the folder with stories3M-llama")
    RUNS.mkdir(parents=True, exist_ok=True)
    bench = Bench(Path(os.environ["STRUCTMAT_DATA"]))

    def make(name: str, rate: float, seed: int) -> None:
        if read(name, rate, seed) is None:
            result = bench.run(name, rate, seed)
            print(f"{name}, rate {rate}, seed {seed}: test {result['test']:.3f}, {result['seconds']:.0f} s", flush=True)
            path_of(name, rate, seed).write_text(json.dumps(result, indent=1))
            (RESULTS / "retrain_llm.md").write_text(table())

    names = [name for name in STARTS if re.fullmatch(options.only, name)]
    for name in names:
        for rate in CANDIDATES:
            make(name, rate, 0)
    for seed in SEEDS:
        for name in names:
            make(name, best_rate(name) or CANDIDATES[0], seed)
    (RESULTS / "retrain_llm.md").write_text(table())


if __name__ == "__main__":
    main()
