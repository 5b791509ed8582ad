"""How fast a dense network and BLAST ones with 4 x 4 blocks are in runtimes: PyTorch, onnxruntime, ExecuTorch.

A vision transformer with the shapes of ViT-S/16, and a language model of 135 million parameters, at keep 0.8 and 0.5.
Latency does not depend on the values, so the factors are random. The networks of one cell are timed in turns in one
process, and the figure is the median. Each cell is kept in results/deploy.json as soon as it is measured.

    python benchmarks/deploy.py --threads 1 --networks vit smollm2 --runtimes eager onnx executorch
    python benchmarks/deploy.py --table                              # write the table again from the JSON
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, ViTConfig, ViTForImageClassification

from hardware import hardware, hardware_line
from structmat import Blast, apply_plan_, make_plan
from structmat._files import write_atomically
from structmat.export import to_executorch, to_onnx
from structmat.export.checks import runtime
from structmat.network.signatures import signature_of

RESULTS = Path(__file__).parent / "results"
ROUNDS, SECONDS = 7, 1.5
BLOCKS = 4
LANGUAGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CALLS = {"vit": {"1 image": {"batch": 1}}}
TOKENS = {
    "1 token after 127": {"batch": 1, "sequence_length": 1, "past_sequence_length": 127},
    "128 tokens": {"batch": 1, "sequence_length": 128, "past_sequence_length": 1},
}
VERSIONS = {"dense": None, "BLAST keep 0.8": 0.8, "BLAST keep 0.5": 0.5}

Run = Callable[[Any], Any]


def network(kind: str, keep: float | None, name: str) -> nn.Module:
    """A network at this keep, with random factors; None for the dense one."""
    torch.manual_seed(0)
    if kind == "vit":
        config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
        model, layers = ViTForImageClassification(config), r".*layers?\..*"
    else:
        model, layers = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), r".*_proj"
    if keep is not None:
        apply_plan_(model, make_plan(model, {layers: Blast}, keep=keep, blocks=BLOCKS))
    return model.eval()


def prepared(where: str, model: nn.Module, folder: Path, sizes: dict[str, int], threads: int) -> tuple[Run, int]:
    """What runs a network in a runtime, and the bytes of its file."""
    if where == "eager":
        module = signature_of(model).module
        return lambda inputs: module(*inputs), sum(p.numel() * p.element_size() for p in model.parameters())
    if where == "onnx":
        path = folder / "model.onnx"
        size = path.stat().st_size if path.exists() else to_onnx(model, path).size
        onnxruntime = runtime("onnxruntime", "onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        return lambda inputs: session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True))), size
    found = to_executorch(model, folder / "model.pte", dynamic=False, lengths=sizes)
    program = runtime("executorch.runtime", "executorch").Runtime.get().load_program(found.path.read_bytes())
    return program.load_method("forward").execute, found.size


def timed(runs: dict[str, Run], inputs: Any) -> dict[str, float]:
    """The median milliseconds of each, measured in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round in range(ROUNDS + 1):
        for name, run in runs.items():
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < SECONDS / ROUNDS or not count:
                run(inputs)
                count += 1
            if round:
                times[name].append((time.perf_counter() - start) / count * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(kind: str, where: str, threads: int, name: str, folder: Path) -> dict[str, Any]:
    """All calls of one network in one runtime."""
    models = {version: network(kind, keep, name) for version, keep in VERSIONS.items()}
    found: dict[str, Any] = {}
    for call, sizes in CALLS.get(kind, TOKENS).items():
        runs, bytes_of = {}, {}
        for version, model in models.items():
            own = folder / f"{kind} {version}"
            own.mkdir(exist_ok=True)
            runs[version], bytes_of[version] = prepared(where, model, own, dict(sizes), threads)
            print(f"{kind}, {where}: {version} is ready", flush=True)
        inputs = signature_of(models["dense"]).draw(sizes, torch.Generator().manual_seed(0))
        with torch.no_grad():
            found[call] = {"ms": timed(runs, inputs), "bytes": bytes_of}
    return found


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = [
        "# Latency in runtimes",
        "",
        "Milliseconds of one call in float32, the median of rounds in turns, and the size of the file in MB. The BLAST",
        f"networks have {BLOCKS} x {BLOCKS} blocks and random factors; embeddings and the head are dense in all.",
        "`python benchmarks/deploy.py` makes this table.",
        "",
        "| network | runtime | threads | call | dense | BLAST keep 0.8 | BLAST keep 0.5 | dense / keep 0.5 | MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, cell in results["cells"].items():
        kind, where, threads = key.split("/")
        for call, one in cell.items():
            ms, sizes = one["ms"], one["bytes"]
            shown = " | ".join(f"{ms[version]:.1f}" for version in VERSIONS)
            ratio = ms["dense"] / ms["BLAST keep 0.5"]
            megabytes = " / ".join(f"{sizes[version] / 1e6:.0f}" for version in VERSIONS)
            rows.append(f"| {kind} | {where} | {threads} | {call} | {shown} | {ratio:.2f} | {megabytes} |")
    rows += ["", results["note"]] if "note" in results else []
    return "\n".join([*rows, "", f"Measured on: {hardware_line(results['hardware'])}.", ""])


def main() -> None:
    """Measure what is asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["vit", "smollm2"], help="The networks to time.")
    parser.add_argument("--runtimes", nargs="+", default=["eager", "onnx", "executorch"], help="The runtimes to time.")
    parser.add_argument("--threads", type=int, default=1, help="The number of threads.")
    parser.add_argument("--model", default=LANGUAGE_MODEL, help="The folder or the name of the language model.")
    parser.add_argument("--table", action="store_true", help="Write the table from the results that are there.")
    options = parser.parse_args()
    file = RESULTS / "deploy.json"
    results = json.loads(file.read_text()) if file.exists() else {"cells": {}}
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        for kind in () if options.table else options.networks:
            for where in options.runtimes:
                cell = measure(kind, where, options.threads, options.model, Path(folder))
                results["cells"][f"{kind}/{where}/{options.threads}"] = cell
                results["hardware"] = hardware()
                write_atomically(file, lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
                print(f"{kind}/{where}/{options.threads}: {cell}", flush=True)
    (RESULTS / "deploy.md").write_text(table(results))


if __name__ == "__main__":
    main()
