"""What the digests cost: loading with and without the check, beside the time in which the same bytes are read.

    python benchmarks/digests.py

``from_pretrained`` maps the file and reads nothing: a first pass over the weights then reads all. Therefore each time
is given alone and together with one such pass.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import structmat as sm
from hardware import hardware, hardware_line
from structmat._digests import OPT_OUT
from structmat._files import write_atomically

RESULTS = Path(__file__).parent / "results"
SIZES = {"small": (256, 4), "middle": (768, 12), "large": (1536, 16)}
"""The width and the number of blocks of each network."""


def llama(size: str, device: str = "cpu") -> Any:
    """A random Llama with low-rank layers in its blocks."""
    width, blocks = SIZES[size]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    with torch.device(device):
        return LlamaForCausalLM(config)


def touched(model: Any) -> None:
    """Read every weight once."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().sum()


def seconds(run: Callable[[], Any], touch: bool) -> float:
    """The time of one run, and of one pass over the weights that it gives if that is wanted."""
    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        model = run()
    if touch:
        touched(model)
    return time.perf_counter() - started


def measure(size: str, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Time every way to load one network, with and without the check in turn."""
    model = llama(size)
    sm.apply_plan_(model, sm.make_plan(model, {r".*layers.*": "low_rank"}, keep=0.5))
    model.save_pretrained(folder / "pretrained")
    sm.save_model(model, folder / "file")
    ways: dict[str, Callable[[], Any]] = {
        "from_pretrained": lambda: LlamaForCausalLM.from_pretrained(folder / "pretrained"),
        "load_model": lambda: sm.load_model(fresh, folder / "file"),
    }
    rows: list[dict[str, Any]] = []
    for way, run in ways.items():
        for touch in (False, True):
            found: dict[str, list[float]] = {"0": [], "1": []}
            for _ in range(rounds + 1):
                for check, times in found.items():
                    os.environ[OPT_OUT] = check
                    fresh = llama(size)
                    times.append(seconds(run, touch))
            without, checked = (statistics.median(found[check][1:]) for check in ("0", "1"))
            rows.append(
                {
                    "size": size,
                    "bytes": (folder / "file").stat().st_size,
                    "way": way,
                    "weights_read": touch,
                    "seconds": without,
                    "seconds_with_digests": checked,
                    "share": checked / without - 1,
                }
            )
    return rows


def table(found: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# Digests: what the check on loading costs",
        "",
        hardware_line(found["hardware"]),
        "",
        "| file | way | weights read once | without, s | with, s | more |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        what = f"{row['bytes'] / 1e6:.0f} MB | {row['way']} | {'yes' if row['weights_read'] else 'no'}"
        lines.append(f"| {what} | {row['seconds']:.3f} | {row['seconds_with_digests']:.3f} | {row['share']:+.0%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is timed")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), help="the networks")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder for the results")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(size, Path(folder), options.rounds)
    found = {"hardware": hardware(), "rounds": options.rounds, "rows": rows}
    write_atomically(options.out / "digests.json", lambda path: path.write_text(json.dumps(found, indent=1) + "\n"))
    write_atomically(options.out / "digests.md", lambda path: path.write_text(table(found)))
    print(table(found))


if __name__ == "__main__":
    main()
