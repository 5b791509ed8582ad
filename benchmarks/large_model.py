"""Compress a randomly initialised Llama of a billion parameters on the CPU: peak memory, time, and the time estimate.

The shape is that of TinyLlama (22 blocks of width 2048, 1.1 billion parameters, bf16); BLAST with 16 x 16 blocks at
keep 0.5. Compressed are the attention and MLP weights of the first few blocks, with the whole model in memory; all
blocks are alike, so that the time of a full run follows. The time estimate is the one that the progress bar showed
when it first passed 10 %.

    python benchmarks/large_model.py --blocks 2
    python benchmarks/large_model.py --blocks 1 --calibrate        # with 16 rows of 128 random tokens
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
import transformers

import structmat as sm
from hardware import hardware, hardware_line

RESULTS = Path(__file__).parent / "results"
ALL_BLOCKS = 22


def build() -> transformers.LlamaForCausalLM:
    """The model."""
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=ALL_BLOCKS,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def child(blocks: int, calibrate: bool) -> None:
    """Build, compress, and print what happened as JSON."""
    torch.manual_seed(0)
    model = build()
    process = psutil.Process()
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = before = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, process.memory_info().rss)

    threading.Thread(target=watch, daemon=True).start()
    pattern = rf"model\.layers\.({'|'.join(map(str, range(blocks)))})\..*_proj"
    plan = sm.make_plan(model, {pattern: sm.Blast}, keep=0.5, blocks=16)
    batches = None
    if calibrate:
        batches = [{"input_ids": torch.randint(0, 32000, (4, 128))} for _ in range(4)]
    start = time.perf_counter()
    sm.compress_(model, plan, batches=batches)
    seconds = time.perf_counter() - start
    done.set()
    print(
        json.dumps(
            {"dense": dense, "before": before, "peak": peak, "seconds": seconds, "blocks": blocks, "layers": len(plan)}
        )
    )


def seconds_of(clock: str) -> float:
    """``[hours:]minutes:seconds`` in seconds."""
    return sum(int(part) * 60**k for k, part in enumerate(reversed(clock.split(":"))))


def estimate_of(log: str) -> dict[str, float]:
    """What the progress bar said when it first passed 10 %."""
    for match in re.finditer(r"(\d+)%\|[^|]*\| ([\d:]+)<([\d:]+)", log):
        if int(match[1]) >= 10:
            return {
                "share": int(match[1]) / 100,
                "elapsed": seconds_of(match[2]),
                "estimate": seconds_of(match[2]) + seconds_of(match[3]),
            }
    raise ValueError("expected the progress bar to pass 10 %, but it never did")


def table() -> str:
    """The results as Markdown."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("large_model-*.json"))]
    lines = [
        "# A model of a billion parameters compressed on the CPU",
        "",
        f"Made by `benchmarks/large_model.py` on: {hardware_line(found[0]['hardware'])}.",
        "",
        "Llama, 22 blocks of width 2048, bf16, random weights; BLAST 16 x 16, keep 0.5. *Peak* is of the whole "
        "process, the interpreter and libraries included.",
        "",
        "| data | blocks compressed | dense size | peak memory | beyond dense | time | estimate at 10 % "
        "| estimate / time | all 22 blocks would take |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in found:
        lines.append(
            f"| {'calibrated' if run['calibrated'] else 'none'} | {run['blocks']} | {run['dense'] / 2**30:.2f} GiB | "
            f"{run['peak'] / 2**30:.2f} GiB | {(run['peak'] - run['dense']) / 2**30:.2f} GiB | "
            f"{run['seconds']:.0f} s | {run['estimate']['estimate']:.0f} s | "
            f"{run['estimate']['estimate'] / run['seconds']:.2f} | "
            f"{run['seconds'] / run['blocks'] * ALL_BLOCKS / 60:.0f} minutes |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run in a fresh process and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=2, help="how many to compress")
    parser.add_argument("--calibrate", action="store_true", help="with calibration data, block by block")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.blocks, options.calibrate)
        return
    command = [sys.executable, *sys.orig_argv[1:], "--child"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise SystemExit(finished.stderr[-2000:])
    result = json.loads(finished.stdout.splitlines()[-1])
    result |= {
        "calibrated": options.calibrate,
        "estimate": estimate_of(finished.stderr),
        "hardware": hardware(),
        "transformers": transformers.__version__,
    }
    name = f"large_model-{'calibrated' if options.calibrate else 'plain'}.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1))
    (RESULTS / "large_model.md").write_text(table())
    print(table())


if __name__ == "__main__":
    main()
