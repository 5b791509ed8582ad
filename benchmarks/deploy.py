"""How fast and how large a dense network and BLAST ones with 4 x 4 blocks are in runtimes.

The runtimes are PyTorch (eager, compiled), onnxruntime, ExecuTorch and vLLM. The networks are a vision transformer with
the shapes of ViT-S/16 and a language model of 135 million parameters, at keep 0.8 and 0.5, and for PyTorch that
language model with its weights in integers. Latency does not depend on the values, so the factors are random. The
networks of one cell are timed in turns in one run, and the figure is the median of rounds; with one thread it is the
time of the processor, for which other programs on the machine matter less. Peak memory is that of a
process that loads the file and runs the longest call, less what it had before it loaded the file. Each cell is kept in
results/deploy.json as soon as it is measured; the rows of vLLM are measured in an environment that has it.

    python benchmarks/deploy.py --threads 1 --networks vit smollm2 --runtimes eager compiled onnx executorch
    python benchmarks/deploy.py --threads 1 --networks smollm2 --runtimes vllm
    python benchmarks/deploy.py --threads 1 --networks integers --runtimes eager
    python benchmarks/deploy.py --table                              # write the table again from the JSON
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hardware import hardware, hardware_line
from structmat import Blast, apply_plan_, make_plan
from structmat._files import write_atomically
from structmat.export import to_executorch, to_onnx
from structmat.export.checks import runtime
from structmat.export.quantize import KINDS
from structmat.formats import Dense, Quantized
from structmat.network.signatures import signature_of
from structmat.network.sites import find_sites

RESULTS = Path(__file__).parent / "results"
ROUNDS, SECONDS = 7, 1.5
BLOCKS = 4
NEW_TOKENS = 32
LANGUAGE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT, STEP = "128 tokens", "1 token after 127"
TOKENS = {
    STEP: {"batch": 1, "sequence_length": 1, "past_sequence_length": 127},
    PROMPT: {"batch": 1, "sequence_length": 128, "past_sequence_length": 1},
}
CALLS = {"vit": {"1 image": {"batch": 1}}, "smollm2": TOKENS, "integers": TOKENS}
VERSIONS = {"dense": (None, ""), "keep 0.8": (0.8, ""), "keep 0.5": (0.5, "")}
INTEGERS = {
    f"{name}, {kind}": (keep, kind)
    for name, keep in (("dense", None), ("keep 0.8", 0.8), ("keep 0.6", 0.6))
    for kind in ("float32", "float16", *KINDS)
}

Run = Callable[[Any], Any]


def network(kind: str, keep: float | None, dtype: str, name: str) -> nn.Module:
    """A network at this keep, with random factors; None for the dense one."""
    torch.manual_seed(0)
    if kind == "vit":
        config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
        model, layers = ViTForImageClassification(config), r".*layers?\..*"
    else:
        model, layers = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), r".*_proj"
    plan = {} if keep is None else dict(make_plan(model, {layers: Blast}, keep=keep, blocks=BLOCKS))
    if dtype in KINDS:
        shapes = {n: site.matrix.shape for n, site in find_sites(model).items() if n.endswith("_proj")}
        plan = {n: Quantized(M, N, plan.get(n) or Dense(M, N), *KINDS[dtype]) for n, (M, N) in shapes.items()}
    if plan:
        apply_plan_(model, plan)
    return model.to(dtype=torch.float16 if dtype == "float16" else torch.float32).eval()  # pyright: ignore


def opened(where: str, path: Path, threads: int) -> Run:
    """What runs a file in its runtime."""
    if where == "onnx":
        onnxruntime = runtime("onnxruntime", "onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        return lambda inputs: session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    if where == "executorch":
        program = runtime("executorch.runtime", "executorch").Runtime.get().load_program(path.read_bytes())
        return program.load_method("forward").execute
    kind = AutoModelForImageClassification if "vit" in path.parent.name else AutoModelForCausalLM
    module = signature_of(kind.from_pretrained(path).eval()).module
    return lambda inputs: module(*inputs)


def written(where: str, model: nn.Module, folder: Path, sizes: dict[str, int]) -> tuple[Path, int]:
    """The file of a network for a runtime, and its bytes."""
    if where == "onnx":
        path = folder / "model.onnx"
        if not path.exists():
            to_onnx(model, path)
        return path, sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    if where == "executorch":
        found = to_executorch(model, folder / "model.pte", dynamic=False, lengths=sizes)
        return found.path, found.size
    path = folder / "checkpoint"
    if not path.exists():
        model.save_pretrained(path)  # pyright: ignore - a model of transformers
    return path, sum(file.stat().st_size for file in path.glob("*.safetensors"))


def peak(where: str, path: Path, inputs: Path, threads: int) -> float:
    """The MB that a process takes to load a file and run one call."""
    command = [sys.executable, __file__, "--peak", where, str(path), str(inputs), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def print_peak(where: str, path: Path, inputs: Path, threads: int) -> None:
    """Load a file, run one call, and print by how many MB the largest memory of this process grew."""
    tensors = torch.load(inputs)
    if where in ("onnx", "executorch"):
        runtime({"onnx": "onnxruntime", "executorch": "executorch.runtime"}[where], where)
    before = psutil.Process().memory_info().rss
    with torch.inference_mode():
        opened(where, path, threads)(tensors)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e6)


def timed(runs: Mapping[str, Run], inputs: Mapping[str, Any], threads: int) -> dict[str, float]:
    """The median milliseconds of each, measured in turns: those of the processor where there is one thread."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round in range(ROUNDS + 1):
        for name, run in runs.items():
            count, start = 0, clock()
            while clock() - start < SECONDS / ROUNDS or not count:
                run(inputs[name])
                count += 1
            if round:
                times[name].append((clock() - start) / count * 1000)
    return {name: statistics.median(values) for name, values in times.items()}


def in_floats(inputs: Any, dtype: str) -> Any:
    """The inputs for a network in this dtype."""
    kind = torch.float16 if dtype == "float16" else torch.float32
    return tuple(x.to(kind) if x.is_floating_point() else x for x in inputs)


@torch.inference_mode()
def measure(kind: str, where: str, threads: int, name: str, folder: Path) -> dict[str, Any]:
    """All calls of one network in one runtime."""
    versions = INTEGERS if kind == "integers" else VERSIONS
    with torch.inference_mode(False):
        models = {version: network(kind, made[0], made[1], name) for version, made in versions.items()}
    drawn: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for call, sizes in CALLS[kind].items():
        runs: dict[str, Run] = {}
        found[call] = one = {"bytes": {}, "peak": {}}
        inputs = signature_of(models["dense" if kind != "integers" else "dense, float32"])
        drawn = dict.fromkeys(versions, inputs.draw(sizes, torch.Generator().manual_seed(0)))
        drawn = {version: in_floats(inputs, versions[version][1]) for version, inputs in drawn.items()}
        for version, model in models.items():
            own = folder / f"{kind} {version}"
            own.mkdir(exist_ok=True)
            with torch.inference_mode(False), torch.no_grad():
                if where in ("onnx", "executorch"):
                    path, one["bytes"][version] = written(where, model, own, dict(sizes))
                    runs[version] = opened(where, path, threads)
                else:
                    path, one["bytes"][version] = written("checkpoint", model, own, dict(sizes))
                    module = signature_of(model).module
                    module = torch.compile(module, dynamic=False) if where == "compiled" else module
                    runs[version] = lambda tensors, module=module: module(*tensors)
            if call == list(CALLS[kind])[-1] and where in ("onnx", "executorch"):
                torch.save(drawn[version], own / "inputs.pt")
                one["peak"][version] = peak(where, path, own / "inputs.pt", threads)
            print(f"{kind}, {where}, {call}: {version} is ready", flush=True)
        one["ms"] = timed(runs, drawn, threads)
        torch.compiler.reset()
    return found


def measure_vllm(threads: int, name: str, folder: Path) -> dict[str, Any]:
    """The same in vLLM, not compiled: the first token after a prompt, and each token after it."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": str(threads)}
    vllm = runtime("vllm", "vllm")
    options = {"dtype": "float32", "max_model_len": 256, "enable_prefix_caching": False, "enforce_eager": True}
    engines: dict[str, Any] = {}
    one: dict[str, Any] = {"bytes": {}, "peak": {}}
    for version, made in VERSIONS.items():
        own = folder / version
        own.mkdir()
        path, one["bytes"][version] = written("checkpoint", network("smollm2", made[0], made[1], name), own, {})
        engines[version] = vllm.LLM(str(path), skip_tokenizer_init=True, **options)
        print(f"smollm2, vllm: {version} is ready", flush=True)
    prompt = [{"prompt_token_ids": list(range(100, 228))}]

    def generating(version: str, tokens: int) -> Run:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        return lambda _: engines[version].generate(prompt, sampling, use_tqdm=False)

    none = dict.fromkeys(VERSIONS)
    first = timed({version: generating(version, 1) for version in VERSIONS}, none, threads)
    rest = timed({version: generating(version, 1 + NEW_TOKENS) for version in VERSIONS}, none, threads)
    steps = {version: (rest[version] - first[version]) / NEW_TOKENS for version in VERSIONS}
    return {STEP: {**one, "ms": steps}, PROMPT: {**one, "ms": first}}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = [
        "# Latency in runtimes",
        "",
        "Milliseconds of one call in float32, the median of rounds in turns, tokens per second, the size of the file",
        "and the peak memory, each for dense / keep 0.8 / keep 0.5, and how many programs used the machine before and",
        "after. With one thread it is the time of the processor, in which waiting for others does not count. The BLAST",
        "networks have",
        f"{BLOCKS} x {BLOCKS} blocks and random factors; embeddings and the head are dense in all.",
        "`python benchmarks/deploy.py` makes this table.",
        "",
        "| network | runtime | threads | call | ms | tokens/s | dense / keep 0.5 | MB of file | of memory | load |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, cell in results["cells"].items():
        kind, where, threads = key.split("/")
        for call, one in cell.items() if kind != "integers" else ():
            ms = one["ms"]
            tokens = {STEP: 1, PROMPT: 128}.get(call)
            rate = joined({v: tokens * 1000 / ms[v] for v in ms}, 0) if tokens else ""
            ratio = ms["dense"] / ms["keep 0.5"]
            sizes, peaks = joined({v: b / 1e6 for v, b in one["bytes"].items()}, 0), joined(one.get("peak", {}), 0)
            load = joined(dict(enumerate(results.get("load", {}).get(key, []))), 1)
            cells = [kind, where, threads, call, joined(ms, 1), rate, f"{ratio:.2f}", sizes, peaks, load]
            rows.append(f"| {' | '.join(cells)} |")
    rows += integers_table(results)
    rows += ["", results["note"]] if "note" in results else []
    return "\n".join([*rows, "", f"Measured on: {hardware_line(results['hardware'])}.", ""])


def joined(values: Mapping[Any, float], digits: int) -> str:
    """Numbers side by side."""
    return " / ".join(f"{value:.{digits}f}" for value in values.values())


def integers_table(results: dict[str, Any]) -> list[str]:
    """The rows on weights in integers."""
    found = {key: cell for key, cell in results["cells"].items() if key.startswith("integers/")}
    rows: list[str] = []
    for key, cell in found.items():
        rows += ["", f"## Weights in integers: SmolLM2 in eager PyTorch, {key.split('/')[2]} threads", ""]
        rows += [f"| weights | file, MB | {STEP}, ms | {PROMPT}, ms |", "|---|---|---|---|"]
        for version, size in cell[STEP]["bytes"].items():
            one, many = (cell[call]["ms"][version] for call in (STEP, PROMPT))
            rows.append(f"| {version} | {size / 1e6:.0f} | {one:.0f} | {many:.0f} |")
    return rows


def main() -> None:
    """Measure what is asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["vit", "smollm2"], help="The networks to time.")
    parser.add_argument("--runtimes", nargs="+", default=["eager", "onnx"], help="The runtimes to time.")
    parser.add_argument("--threads", type=int, default=1, help="The number of threads.")
    parser.add_argument("--model", default=LANGUAGE_MODEL, help="The folder or the name of the language model.")
    parser.add_argument("--table", action="store_true", help="Write the table from the results that are there.")
    parser.add_argument("--peak", nargs=3, help="A runtime, a file and its inputs: print the memory of one call.")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    if options.peak:
        where, path, inputs = options.peak
        print_peak(where, Path(path), Path(inputs), options.threads)
        return
    file = RESULTS / "deploy.json"
    results = json.loads(file.read_text()) if file.exists() else {"cells": {}}
    for kind in () if options.table else options.networks:
        for where in options.runtimes:
            load = os.getloadavg()[0]
            with tempfile.TemporaryDirectory() as folder:
                arguments = options.threads, options.model, Path(folder)
                cell = measure_vllm(*arguments) if where == "vllm" else measure(kind, where, *arguments)
            key = f"{kind}/{where}/{options.threads}"
            results = json.loads(file.read_text()) if file.exists() else results
            results["cells"][key] = cell
            results.setdefault("load", {})[key] = [round(load, 1), round(os.getloadavg()[0], 1)]
            results["hardware"] = hardware()
            text = json.dumps(results, indent=1) + "\n"
            write_atomically(file, lambda path, text=text: path.write_text(text))
            print(f"{key}: {cell}", flush=True)
    (RESULTS / "deploy.md").write_text(table(results))


if __name__ == "__main__":
    main()
