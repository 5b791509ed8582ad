"""GPT-2 from random weights with every structure: perplexity against multiplications, as in the BLAST paper.

A small GPT-2 on WikiText-2 from the folder STRUCTMAT_DATA; the linear layers of its blocks get a structure. All train
and tune alike: the peak learning rate at keep 0.25, by perplexity on the validation text; while the highest is the
best, its double is tried. The best one runs at every budget with three seeds; perplexity is that of the test text.
Every run is kept as JSON; a second call makes those that are missing, on any machine.

    python benchmarks/gpt2.py --workers 8 --minutes 8          # on a GPU, which the workers share
    python benchmarks/gpt2.py --scale tiny --out /tmp/tiny     # minutes on a CPU, to try it
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import structmat as sm
from hardware import hardware, hardware_line
from structmat._files import write_atomically
from structmat.training import StructureLearning, parameter_groups, set_sigma_, structure_layers, structure_step_

METHODS: dict[str, tuple[type[sm.Format] | None, int | None]] = {  # structure and blocks
    "dense": (None, None),
    "low-rank": (sm.LowRank, None),
    "monarch": (sm.Monarch, 4),
    "block-sparse": (sm.BlockSparse, 16),
    "blast": (sm.Blast, 6),
    "gaudi-gblr": (sm.GaudiGblr, None),
}
LAYERS = r"transformer\.h\..*\.(c_attn|c_proj|c_fc)"
KEEPS, TUNED_AT, SEEDS = (0.5, 0.25, 0.125), 0.25, (0, 1, 2)
RATES, HIGHEST_RATE = (1e-3, 2e-3, 4e-3, 8e-3), 3.2e-2
WEIGHT_DECAY, BETAS, WARM_UP, LOWEST = 0.1, (0.9, 0.95), 0.05, 0.1  # of the steps; of the peak rate, at the end
STRUCTURE_RATE, STRUCTURE_STEPS = 1e-3, 150  # of widths and locations; how often they are brought within the budget
NOTED, EAGER_STEPS = 50, 5  # steps between losses that are kept; before a step is recorded as a CUDA graph
NEAR = 0.05  # a perplexity up to this much above the dense one, relative to it, is called near it


@dataclass(frozen=True)
class Scale:
    """Network and training; of each text the first ``characters`` are read, or all."""

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int
    batch: int
    steps: int
    characters: int | None = None

    def network(self) -> GPT2LMHeadModel:
        """A dense network with random weights, dropout 0.1; its GELU is GPT-2's, as one operation."""
        sizes = {"n_layer": self.layers, "n_embd": self.width, "n_head": self.heads, "n_positions": self.context}
        ends = {"bos_token_id": None, "eos_token_id": None, "activation_function": "gelu_pytorch_tanh"}
        return GPT2LMHeadModel(GPT2Config.from_dict({"vocab_size": self.vocabulary, **sizes, **ends}))


SCALES = {"small": Scale(6, 384, 6, 256, 8192, 32, 1500), "tiny": Scale(2, 96, 4, 64, 512, 8, 20, 200_000)}


@dataclass(frozen=True)
class Cell:
    """One run: ``keep`` is the share of the dense multiplications, ``rate`` the highest learning rate."""

    method: str
    keep: float
    rate: float
    seed: int


def load_corpus(scale: Scale) -> dict[str, np.ndarray]:
    """WikiText-2, each text as one stream of tokens of a byte-level BPE that is trained on the training text."""
    if "STRUCTMAT_DATA" not in os.environ:
        sys.exit("expected STRUCTMAT_DATA to name the data folder with wikitext-2/{train,valid,test}.txt.xz")
    texts: dict[str, list[str]] = {}
    for name in ("train", "valid", "test"):
        packed = (Path(os.environ["STRUCTMAT_DATA"]) / "wikitext-2" / f"{name}.txt.xz").read_bytes()
        texts[name] = lzma.decompress(packed).decode()[: scale.characters].splitlines(keepends=True)
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=scale.vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts["train"], trainer)
    ids = {name: [line.ids for line in tokenizer.encode_batch(lines)] for name, lines in texts.items()}
    return {name: np.concatenate(lines).astype(np.uint16) for name, lines in ids.items()}


def token_losses(model: nn.Module, ids: Tensor, reduction: str) -> Tensor:
    """The loss of all tokens of ``(B, T)`` but the first ones; without the mask that transformers waits for."""
    core: Any = model.transformer
    hidden = core.drop(core.wte(ids) + core.wpe.weight[: ids.shape[1]])
    for block in core.h:
        hidden = block(hidden)  # causal, since there is no mask
    logits = model.get_submodule("lm_head")(core.ln_f(hidden)).flatten(0, 1)  # (B T, vocabulary)
    return F.cross_entropy(logits, F.pad(ids[:, 1:], (0, 1), value=-100).flatten(), reduction=reduction)


@torch.no_grad()
def perplexity(model: nn.Module, stream: Tensor, scale: Scale) -> float | None:
    """Token perplexity over consecutive windows, in float32; None where it is not finite."""
    torch.set_float32_matmul_precision("highest")
    windows = stream[: len(stream) // scale.context * scale.context].view(-1, scale.context)
    losses = [token_losses(model.eval(), some, "sum").double() for some in windows.split(scale.batch)]
    result = float((torch.stack(losses).sum() / windows[:, 1:].numel()).exp())
    return result if math.isfinite(result) else None


class Step:
    """A training step on ``ids``, whose values change; widths and locations do not count in the gradient's norm."""

    def __init__(self, model: nn.Module, ids: Tensor, rate: float, graphs: bool) -> None:
        self.model, self.ids, self.graphs = model, ids, graphs
        groups = parameter_groups(model, rate, WEIGHT_DECAY, structure_learning_rate=STRUCTURE_RATE)
        self.rates = [(torch.tensor(group["lr"], device=ids.device), group["lr"]) for group in groups]
        for group, (now, _) in zip(groups, self.rates, strict=True):
            group["lr"] = now
        self.clipped = [p for group in groups if group["name"] != "structure" for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, fused=True, capturable=graphs)

    def __call__(self, index: int, progress: float) -> Tensor:
        """Take the step, recorded as a CUDA graph if asked for; the loss before it."""
        fallen = (1 - math.cos(math.pi * max(progress - WARM_UP, 0) / (1 - WARM_UP))) / 2
        for now, peak in self.rates:  # a linear rise, then a cosine
            now.fill_(peak * min(progress / WARM_UP, 1 - (1 - LOWEST) * fallen))
        if not self.graphs or index < EAGER_STEPS:
            return self.eager()
        if index == EAGER_STEPS:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = self.eager()
        self.graph.replay()
        return self.loss

    def eager(self) -> Tensor:
        """Launch the operations one by one."""
        self.optimizer.zero_grad()
        with torch.autocast(self.ids.device.type, torch.bfloat16, enabled=self.ids.is_cuda):
            loss = token_losses(self.model, self.ids, "mean")
        loss.backward()
        nn.utils.clip_grad_norm_(self.clipped, 1.0)
        self.optimizer.step()
        return loss.detach()


def train(scale: Scale, cell: Cell, model: nn.Module, stream: Tensor, graphs: bool) -> list[float]:
    """Train in place; the loss after every ``NOTED`` steps, up to one that is not finite."""
    learning = StructureLearning(cell.keep, rule="shrink")
    set_sigma_(model, learning.sigma_at(0))
    generator = torch.Generator().manual_seed(cell.seed)
    starts = torch.randint(len(stream) - scale.context, (scale.steps, scale.batch, 1), generator=generator)
    starts, offsets = starts.to(stream.device), torch.arange(scale.context, device=stream.device)
    ids = stream[starts[0] + offsets]
    step, every = Step(model.train(), ids, cell.rate, graphs), max(1, scale.steps // STRUCTURE_STEPS)
    torch.set_float32_matmul_precision("high" if ids.is_cuda else "highest")
    losses: list[float] = []
    for index in range(scale.steps):
        progress, last = (index + 1) / scale.steps, index + 1 == scale.steps
        ids.copy_(stream[starts[index] + offsets])
        loss = step(index, progress)
        if cell.method == "gaudi-gblr" and ((index + 1) % every == 0 or last):
            structure_step_(model, learning, STRUCTURE_RATE, progress)
        if (index + 1) % NOTED == 0 or last:
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
    return losses


def begin(scale: Scale, cell: Cell) -> nn.Module:
    """The network with random weights, in its structure."""
    torch.manual_seed(cell.seed)
    model = scale.network()
    kind, blocks = METHODS[cell.method]
    if kind is not None:
        plan = sm.make_plan(model, {LAYERS: sm.Rule(kind, blocks=blocks)}, keep=cell.keep)
        sm.apply_plan_(model, plan, generator=torch.Generator().manual_seed(cell.seed))
    return model


def finish_(model: nn.Module) -> float:
    """Harden what was learned, the worst change of a matrix; a layer that outgrew the dense one becomes dense."""
    kinds = {name: (layer.format, layer.factors) for name, layer in structure_layers(model).items()}
    large = [name for name, (kind, factors) in kinds.items() if kind.num_parameters(factors) >= math.prod(kind.shape)]
    sm.densify_(model, large)
    return max(sm.harden_(model).values())


def execute(scale: Scale, cell: Cell, corpus: dict[str, np.ndarray], path: Path, threads: int, graphs: bool) -> None:
    """Begin, train, harden, measure and write the record; in a worker process."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    streams = {name: torch.from_numpy(tokens.astype(np.int64)).to(device) for name, tokens in corpus.items()}
    model = begin(scale, cell).to(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.cuda.stream(torch.cuda.Stream() if graphs else None):  # a recording needs one of its own
        losses = train(scale, cell, model, streams["train"], graphs)
    seconds, diverged = time.perf_counter() - started, not math.isfinite(losses[-1])
    gap = finish_(model) if cell.method == "gaudi-gblr" and not diverged else None
    saved = sum(math.prod(kind.shape) - kind.multiplications() for kind in sm.plan_of(model).values())
    parameters = sum(p.numel() for p in model.parameters()) / scale.network().num_parameters()
    if gap is not None:
        sm.densify_(model)  # the same matrices, multiplied as a GPU likes it
    steps = min(len(losses) * NOTED, scale.steps)
    texts = {text: None if diverged else perplexity(model, streams[text], scale) for text in ("valid", "test")}
    facts = {"parameters": parameters, "diverged": diverged, "hardening_gap": gap, "seconds": seconds, "steps": steps}
    record: dict[str, Any] = asdict(cell) | facts | texts
    record.update(
        share=1 - saved / (12 * scale.layers * scale.width**2),  # 3, 1, 4 and 4 squares in a block
        scale=asdict(scale),
        losses=[loss if math.isfinite(loss) else None for loss in losses],
        tokens={name: len(stream) for name, stream in streams.items()},
        hardware={"commit": os.environ.get("STRUCTMAT_COMMIT", "unknown"), **hardware()},
        versions={name: version(name) for name in ("transformers", "tokenizers")},
    )
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(record, indent=1)))


class Cells:
    """The runs of a scale, where they are kept, and which are missing."""

    def __init__(self, scale: Scale, out: Path) -> None:
        self.scale, self.out, self.found = scale, out, dict[Cell, dict[str, Any]]()

    def path(self, cell: Cell) -> Path:
        """The file of one run."""
        return self.out / "gpt2" / f"{cell.method}-{cell.keep:g}-{cell.rate:g}-{cell.seed}.json"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """A run that is there."""
        if cell not in self.found and self.path(cell).exists():
            self.found[cell] = json.loads(self.path(cell).read_text())
            if self.found[cell]["scale"] != asdict(self.scale):
                sys.exit(f"expected a run of {self.scale} in {self.path(cell)}, got another scale; give another --out")
        return self.found.get(cell)

    def tuning(self, method: str) -> list[Cell]:
        """The runs that choose the rate, as far as they are known: doubled while the best is the highest."""
        cells = [Cell(method, 1.0 if method == "dense" else TUNED_AT, rate, 0) for rate in RATES]
        while cells[-1].rate < HIGHEST_RATE and self.best(cells) == cells[-1]:
            cells.append(replace(cells[-1], rate=2 * cells[-1].rate))
        return cells

    def best(self, cells: list[Cell]) -> Cell | None:
        """The run with the lowest perplexity of the validation text; None while one is missing."""
        found = {cell: run["valid"] or math.inf for cell in cells if (run := self.read(cell))}
        return min(found, key=lambda cell: found[cell]) if len(found) == len(cells) else None

    def at_best(self, method: str, keep: float) -> list[Cell]:
        """The runs of all seeds at the best rate, those of dense for every budget; none while it is not known."""
        best = self.best(self.tuning(method))
        return [replace(best, keep=1.0 if method == "dense" else keep, seed=seed) for seed in SEEDS] if best else []

    def missing(self, only: str) -> list[Cell]:
        """What is to be run: tuning, then the first seed of everything, then the other seeds."""
        names = [method for method in METHODS if re.fullmatch(only, method)]
        cells = [cell for method in names for cell in self.tuning(method)]
        last = [cell for method in names for keep in KEEPS for cell in self.at_best(method, keep)]
        cells += sorted(last, key=lambda cell: cell.seed)
        return [cell for cell in dict.fromkeys(cells) if self.read(cell) is None]


def run(cells: Cells, options: argparse.Namespace) -> dict[Cell, BaseException]:
    """Make the runs that are missing, the next one whenever a worker is free; the errors of those that failed."""
    started, corpus, failed = time.monotonic(), load_corpus(cells.scale), dict[Cell, BaseException]()
    threads, running = max(1, (os.cpu_count() or 1) // options.workers), dict[Future[None], Cell]()
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        while True:
            wanted = [cell for cell in cells.missing(options.only) if cell not in {*running.values(), *failed}]
            room = options.workers - len(running) if time.monotonic() - started < 60 * options.minutes else 0
            for cell in wanted[:room]:
                facts = cells.scale, cell, corpus, cells.path(cell), threads, options.graphs
                running[pool.submit(execute, *facts)] = cell
            if not running:
                return failed
            for task in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(task)
                if error := task.exception():
                    failed[cell] = error
                got = cells.read(cell) or {}
                shown = [f"{name} {got[name]:.5g}" for name in ("valid", "test", "share", "seconds") if got.get(name)]
                print(f"{time.monotonic() - started:.0f} s: {cells.path(cell).stem}:", *shown, error or "", flush=True)


def results(cells: Cells, method: str, keep: float) -> tuple[float, list[float]]:
    """The mean share of the runs of a method at a budget, and their perplexities, infinite where they diverged."""
    runs = [run for cell in cells.at_best(method, keep) if (run := cells.read(cell))]
    return (mean(run["share"] for run in runs) if runs else keep), [run["test"] or math.inf for run in runs]


def table(cells: Cells) -> str:
    """What is there as Markdown."""
    scale, run = cells.scale, next(run for method in METHODS for c in cells.tuning(method) if (run := cells.read(c)))
    lines = [
        "# GPT-2 from random weights, with every structure\n",
        f"Made by `benchmarks/gpt2.py` on: {hardware_line(run['hardware'] | run['versions'])}.\n",
        f"- A GPT-2 of {scale.layers} layers, width {scale.width} and context {scale.context} on WikiText-2 "
        f"({run['tokens']['train']:,} tokens of a BPE of {scale.vocabulary:,}).",
        "- All linear layers of its blocks get the structure; head and embeddings stay dense.",
        f"- Everyone trains for {scale.steps} steps of {scale.batch} windows with AdamW, on the same windows.",
        f"- Each method's peak rate is the best on the validation text (seed 0, keep {TUNED_AT}; dense: 1). It is not "
        "tuned again at the other budgets, where it can be too high: read wide spreads so.",
        "- The table has the token perplexity of the test text in such windows: mean, spread (max - "
        "min), number of seeds, and the share of the layers' multiplications that is really left (inf: diverged).\n",
        "| method | " + " | ".join(f"keep {keep:g}" for keep in KEEPS) + " |",
        "|---" * (1 + len(KEEPS)) + "|",
    ]
    for method in METHODS:
        found = [results(cells, method, keep) for keep in KEEPS]
        texts = [f"{mean(t):.2f} ± {max(t) - min(t):.2f} ({len(t)}) at {s:.3f}" if t else "" for s, t in found]
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    rates = sorted({cell.rate for method in METHODS for cell in cells.tuning(method)})
    lines += ["\nTuning: token perplexity of the validation text by peak rate (inf where it diverged).\n"]
    lines += ["| method | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---" * (1 + len(rates)) + "|"]
    for method in METHODS:
        found = {run["rate"]: run["valid"] or math.inf for cell in cells.tuning(method) if (run := cells.read(cell))}
        texts = [f"{found[rate]:.2f}" if rate in found else "" for rate in rates]
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", *claims(cells)]) + "\n"


def claims(cells: Cells) -> list[str]:
    """What the numbers say about the paper's claims, at the budgets at which all that they compare is there."""
    lower, above = list[bool](), list[float]()
    for keep in KEEPS:
        found = {method: tests for method in METHODS if (tests := results(cells, method, keep)[1])}
        if {"blast", "monarch", "low-rank"} <= found.keys():
            lower.append(max(found["blast"]) < min(found["monarch"] + found["low-rank"]))
        if {"dense", "gaudi-gblr"} <= found.keys():
            above.append(mean(found["gaudi-gblr"]) / mean(found["dense"]) - 1)
    return [
        f"- BLAST below Monarch and low-rank (with every seed): supported at {sum(lower)} of {len(lower)} budgets.",
        f"- Gaudi-GBLR near dense (at most {NEAR:.0%} above): supported at {sum(more <= NEAR for more in above)} of "
        f"{len(above)} budgets; above by {', '.join(f'{more:.1%}' for more in above)}.",
    ]


def picture(cells: Cells) -> None:
    """Perplexity against multiplications, with the range over the seeds."""
    figure, axes = plt.subplots(figsize=(7.4, 4.2), layout="constrained")
    for method in METHODS:
        points = [point for keep in KEEPS if (point := results(cells, method, keep))[1] and max(point[1]) < math.inf]
        if points:
            spans = [(mean(tests) - min(tests), max(tests) - mean(tests)) for _, tests in points]
            shares, means = [share for share, _ in points], [mean(tests) for _, tests in points]
            axes.errorbar(shares, means, np.transpose(spans), marker="o", capsize=3, label=method)
    axes.set(xlabel="multiplications, relative to dense", ylabel="token perplexity", xscale="log", yscale="log")
    axes.set_xticks([1.0, *KEEPS], [f"{keep:g}" for keep in (1.0, *KEEPS)])
    axes.minorticks_off()
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(cells.out / "gpt2.png", dpi=150)


def main() -> None:
    """Make the runs that are missing and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--steps", type=int, help="training steps, other than the scale's")
    parser.add_argument("--only", default=".*", help="methods to run: a pattern for the whole name")
    parser.add_argument("--workers", type=int, default=1, help="processes, which share one GPU")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run starts after that")
    parser.add_argument("--graphs", action="store_true", help="record the steps as CUDA graphs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--table", action="store_true", help="write table and picture only")
    options = parser.parse_args()
    steps = options.steps or SCALES[options.scale].steps
    cells = Cells(replace(SCALES[options.scale], steps=steps), options.out)
    failed = {} if options.table else run(cells, options)
    write_atomically(cells.out / "gpt2.md", lambda path: path.write_text(table(cells)))
    picture(cells)
    if failed:
        raise next(iter(failed.values()))


if __name__ == "__main__":
    main()
