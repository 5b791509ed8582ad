"""How fast a hardened GBLR matrix multiplies: against the dense product and a low-rank one of equal multiplications.

A 2048 x 2048 matrix in float32 with about a quarter of the multiplications in 2048 components: segments uniformly
random (every start alike, widths up to a quarter of the axis), and segments that were learned (those of the hardened
networks of from_scratch.py, scaled to the size), each rounded to multiples of 1, 8, 16 and 32. A stack of copies that
no cache holds is run at a time, after an untimed run of the same stack.

    python benchmarks/gblr_speed.py                                     # random segments, about three minutes
    python benchmarks/gblr_speed.py --learned benchmarks/results/from_scratch/segments-vit-0.25-*.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hardware import hardware, hardware_line
from structmat import LowRank
from structmat.bench import time_side_by_side
from structmat.bench.machine import cold_bytes
from structmat.formats import tile
from structmat.formats.gblr import from_segments

RESULTS = Path(__file__).parent / "results"
SIZE = 2048
COMPONENTS = 2048
KEEP = 0.25
TOKENS = (1, 16, 128, 512)
MULTIPLES = (1, 8, 16, 32)


def random_segments() -> tuple[Tensor, Tensor]:
    """Start and width as shares of the axes, ``(2, K)``: widths uniform with the mean that the budget gives."""
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(2, COMPONENTS, generator=generator, dtype=torch.float64)
    width = torch.rand(2, COMPONENTS, generator=generator, dtype=torch.float64) * KEEP * SIZE / COMPONENTS
    return start, width


def learned_segments(files: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """The segments of every layer that from_scratch.py wrote to files, drawn with repetition, scaled to the budget."""
    starts, widths = [], []
    for file in files:
        for layer in json.loads(file.read_text()).values():
            sizes = torch.tensor(layer["shape"], dtype=torch.float64)[:, None]
            starts.append(torch.tensor(layer["start"], dtype=torch.float64) / sizes)
            widths.append(torch.tensor(layer["width"], dtype=torch.float64) / sizes)
    start, width = torch.cat(starts, 1), torch.cat(widths, 1)
    chosen = torch.randint(start.shape[1], (COMPONENTS,), generator=torch.Generator().manual_seed(0))
    start, width = start[:, chosen], width[:, chosen]
    for _ in range(20):  # the widest end at the axis' length, and the others take over what is left
        width = (width * KEEP * SIZE / width.sum()).clamp(max=1)
    return start, width


def stack(product: Callable[[Tensor, Any], Tensor], x: Tensor, layers: Sequence[Any]) -> Callable[[], None]:
    """Calls the layers of a stack one after the other."""

    def run() -> None:
        for layer in layers:
            product(x, layer)

    return run


def cell(segments: tuple[Tensor, Tensor], multiple: int) -> dict[str, Any]:
    """Times of one kind of segments, rounded."""
    start, width = ((share * SIZE / multiple).round().mul(multiple).long() for share in segments)
    generator = torch.Generator().manual_seed(1)
    contents = [torch.randn(SIZE, COMPONENTS, generator=generator) / 40 for _ in range(2)]
    format, factors = from_segments((SIZE, SIZE), contents[0], contents[1].T, start % SIZE, width.clamp(multiple, SIZE))
    tiled, packed = tile(format, factors)
    low_rank = LowRank.for_budget(SIZE, SIZE, keep=format.keep)
    copies = -(-cold_bytes(torch.device("cpu")) // (4 * low_rank.num_parameters()))
    weights = [torch.randn(SIZE, SIZE, generator=generator) for _ in range(copies)]
    low_rank_factors = [low_rank.init(generator=generator) for _ in range(copies)]
    tiles = [{name: factor.clone() for name, factor in packed.items()} for _ in range(copies)]
    times: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for tokens in TOKENS:
            x = torch.randn(tokens, SIZE, generator=generator)
            runs = {
                "dense": stack(torch.nn.functional.linear, x, weights),
                "low_rank": stack(low_rank.matmul, x, low_rank_factors),
                "gblr": stack(tiled.matmul, x, tiles),
            }
            found = time_side_by_side(runs, rounds=20 if tokens < 128 else 9, settle=1)
            times[str(tokens)] = {name: seconds / copies for name, seconds in found.items()}
    exact = {name: factor.double() if factor.is_floating_point() else factor for name, factor in packed.items()}
    x = torch.randn(3, SIZE, dtype=torch.float64)
    reference = x @ format.to_dense({n: f.double() if f.is_floating_point() else f for n, f in factors.items()}).T
    torch.testing.assert_close(tiled.matmul(x, exact), reference)
    return {
        "multiple": multiple,
        "multiplications": format.keep,
        "with_padding": tiled.keep,
        "copies": copies,
        "out_groups": tiled.out_groups,
        "in_groups": tiled.in_groups,
        "blocks": tiled.block_sizes,
        "seconds": times,
    }


def table(found: dict[str, Any]) -> str:
    """The times as Markdown."""
    lines = [
        "# Speed of hardened GBLR matrices",
        "",
        f"Made by `benchmarks/gblr_speed.py` on: {hardware_line(found['hardware'])}.",
        "",
        f"{SIZE} x {SIZE}, float32, {COMPONENTS} components, `TiledGblr`, in stacks larger than the caches. Each cell: "
        "how many times faster than the dense product, and in brackets the time relative to a low-rank product of "
        "equal multiplications.",
        "",
        "| segments | multiple | multiplications | with padding | "
        + " | ".join(f"{t} token{'s' if t > 1 else ''}" for t in TOKENS)
        + " |",
        "|---|---|---|---|" + "---|" * len(TOKENS),
    ]
    for kind, cells in found["segments"].items():
        for record in cells:
            texts = []
            for tokens in TOKENS:
                times = record["seconds"][str(tokens)]
                texts.append(f"{times['dense'] / times['gblr']:.2f}x ({times['gblr'] / times['low_rank']:.2f})")
            lines.append(
                f"| {kind} | {record['multiple']} | {record['multiplications']:.3f} | {record['with_padding']:.3f} | "
                + " | ".join(texts)
                + " |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Time everything and write JSON and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learned", type=Path, nargs="+", metavar="FILE", help="segments-*.json of from_scratch.py")
    options = parser.parse_args()
    path = RESULTS / "gblr_speed.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"segments": {}}
    kind, segments = "random", random_segments
    if options.learned is not None:
        names = ", ".join(file.stem.removeprefix("segments-") for file in options.learned)
        kind, segments = f"learned ({names})", lambda: learned_segments(options.learned)
    found["segments"][kind] = [cell(segments(), multiple) for multiple in MULTIPLES]
    found["hardware"] = hardware()
    path.write_text(json.dumps(found, indent=1))
    (RESULTS / "gblr_speed.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
