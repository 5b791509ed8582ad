"""How much faster two and four processes compress than one, and whether the cost model says so.

Each process has one thread. A run shares a budget, fits in sequence and refines: stories3M, or four blocks of the shape
of SmolLM2-135M with random weights. Beside the seconds on the clock stands the critical path: between two exchanges the
processor time of the slowest process, added up. It is what the run takes where every process has a core of its own, and
other programs on the machine hardly change it.

    python benchmarks/ranks.py --model stories3M
    python benchmarks/ranks.py --model smollm2-4
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import structmat as sm
from hardware import hardware, hardware_line
from structmat._ranks import current, group, together
from structmat.compress import gradients, refinement, spectra, tasks
from structmat.compress.processes import KINDS, Job, Machine, Network, expected
from structmat.data import read_texts, token_rows
from structmat.data.tokens import row_batches
from structmat.fit import Lee2024Blast, Method, moments

RESULTS = Path(__file__).parent / "results"
SIZES = (1, 2, 4)
ROWS, STEP, STEPS = 64, 8, 20
"""The number of rows of data, of rows in a step of the refinement, and of steps for each block."""

KEEP, BLOCKS = 0.7, 16


def quick(format: sm.Format) -> Method[Any] | None:
    """The method of quick runs: about a sixth of the work for BLAST, the default one for others."""
    return Lee2024Blast(sweeps=8, metric_iterations=16) if isinstance(format, sm.Blast) else None


def stories() -> tuple[Any, list[Any]]:
    """stories3M, and a batch for each row of stories."""
    folder = Path(os.environ["STRUCTMAT_DATA"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "stories3M-llama")
    texts = read_texts(str(folder / "tinystories-sample" / "stories.txt.xz[:400]"))
    rows = sorted(token_rows(tokenizer, texts, length=256, most=ROWS), key=len)
    return sm.load_pretrained(folder / "stories3M-llama"), row_batches(tokenizer, rows, 1)


def smollm() -> tuple[Any, list[Any]]:
    """Four blocks of the shape of SmolLM2-135M with random weights, and random tokens."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return model, [{"input_ids": torch.randint(49152, (1, 128))} for _ in range(ROWS)]


MODELS = {"stories3M": stories, "smollm2-4": smollm}
SHAPES = {
    "stories3M": Network.llama(192, 512, 6, 64, 4096),
    "smollm2-4": Network.llama(576, 1536, 4, 192, 49152),
}


class Trace:
    """The processor time of this process at each exchange, and the bytes that it handed on."""

    def __init__(self) -> None:
        self.marks, self._broadcast = [time.process_time()], group.broadcast
        group.broadcast = self.broadcast

    def broadcast(self, value: Any, owner: int) -> Any:
        """Note the time before an exchange."""
        self.marks.append(time.process_time())
        return self._broadcast(value, owner)

    def close(self) -> None:
        """Note the last time."""
        self.marks.append(time.process_time())
        group.broadcast = self._broadcast


class Watch:
    """The processor time of this process in functions, by the kind of work; one that calls another has the rest."""

    PLACES = (
        (tasks, "_fit_batch", "fits"),
        (refinement._Tuning, "run", "refinement"),
        (gradients, "_gathered", "gradients"),
        (spectra, "spectrum", "spectra"),
        (moments.MomentSums, "moments", "solves"),
        (moments.Moments, "problem", "solves"),
        (moments.MomentSums, "add", "moments"),
    )

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(KINDS, 0.0)
        self._inside = [0.0]
        for home, name, kind in self.PLACES:
            setattr(home, name, self._watched(getattr(home, name), kind))

    def _watched(self, function: Any, kind: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.process_time() - start
                self.seconds[kind] += spent - self._inside.pop()  # pyright: ignore - one of its keys
                self._inside[-1] += spent

        return call


def work(name: str, out: Path) -> None:
    """One process of a run."""
    torch.set_num_threads(1)
    model, batches = MODELS[name]()
    with together() as ranks:
        ranks.gathered(0)  # all have loaded
        watch, trace = Watch(), Trace()
        started = time.perf_counter()
        seconds = {}
        plan = sm.allocate(model, batches, keep=KEEP, blocks=BLOCKS, method=quick, progress=False)
        seconds["allocation"] = time.perf_counter() - started
        refine = sm.Refinement(STEPS, batches=STEP)
        sm.compress_(model, plan, batches=batches, method=quick, refine=refine, progress=False)
        trace.close()
        seconds["all"] = time.perf_counter() - started
        watch.seconds["calls"] = trace.marks[-1] - trace.marks[0] - sum(watch.seconds.values())
        digest = hashlib.sha256(b"".join(one.contiguous().numpy().tobytes() for one in model.state_dict().values()))
        marks = current().gathered(trace.marks)
        memory = current().gathered(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        if ranks.leads:
            steps = [[b - a for a, b in itertools.pairwise(one)] for one in marks]
            facts = {
                "tokens": sum(batch["input_ids"].numel() for batch in batches),
                "seconds": seconds["all"],
                "allocation": seconds["allocation"],
                "critical": sum(map(max, zip(*steps, strict=True))),
                "processor": [one[-1] - one[0] for one in marks],
                "memory": memory,
                "exchanges": len(marks[0]) - 2,
                "kinds": watch.seconds,
                "digest": digest.hexdigest(),
            }
            out.write_text(json.dumps(facts))


def launch(name: str, size: int) -> dict[str, Any]:
    """Run with a number of processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "facts.json"
        load = os.getloadavg()[0]
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", f"--master-port={port}",
             __file__, "--model", name, "--work", str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True,
        )  # fmt: skip
        return {"processes": size, "load_before": load, **json.loads(out.read_text())}


def predicted(name: str, runs: list[dict[str, Any]]) -> None:
    """Set what the cost model says beside each run, from how fast one process was in each kind of work."""
    first = runs[0]
    job = Job(
        tokens=first["tokens"], batches=ROWS, keep=KEEP, counts=BLOCKS, steps=STEPS, step_batches=STEP, value_bytes=4,
        method=Lee2024Blast(sweeps=8, metric_iterations=16), curves=Lee2024Blast(sweeps=8, metric_iterations=16),
    )  # fmt: skip
    work = expected(SHAPES[name], job, Machine(dict.fromkeys(KINDS, 0.0), 1e9, 0.0), 1).work
    rates = {kind: first["kinds"][kind] / work[kind] for kind in KINDS}
    for run in runs:
        run["predicted"] = expected(SHAPES[name], job, Machine(rates, 1e9, 0.0), run["processes"]).total


def table(found: dict[str, Any]) -> str:
    """What came out, as a page."""
    head = "processes | seconds on the clock | load before | critical path | faster | cost model | memory of a process"
    lines = [f"| model | {head} |", "|" + "---|" * 8]
    for name, runs in found["runs"].items():
        for run in runs:
            lines.append(
                f"| {name} | {run['processes']} | {run['seconds']:.0f} | {run['load_before']:.1f} | "
                f"{run['critical']:.0f} | {runs[0]['critical'] / run['critical']:.2f} x | {run['predicted']:.0f} "
                f"({run['predicted'] / run['critical'] - 1:+.0%}) | {max(run['memory']) / 1e9:.2f} GB |"
            )
    text = " ".join((__doc__ or "").split("\n\n    ")[0].split())
    return "\n".join(["# Several processes", "", text, "", hardware_line(found["hardware"]), "", *lines, ""])


def main() -> None:
    """Run with each number of processes, and record what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.model, arguments.work)
        return
    runs = [launch(arguments.model, size) for size in SIZES]
    predicted(arguments.model, runs)
    if len({run["digest"] for run in runs}) > 1:
        raise RuntimeError("expected the same network from any number of processes, got several")
    file = RESULTS / "ranks.json"
    before = json.loads(file.read_text())["runs"] if file.is_file() else {}
    found = {"hardware": hardware(), "runs": {**before, arguments.model: runs}}
    file.write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "ranks.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
