"""What each structure can hold: fits of matrices whose structure is known, at equal cost.

python benchmarks/expressivity.py          # a few minutes on 2 cores
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hardware import hardware, hardware_line
from structmat import Blast, BlockDiagonal, BlockSparse, Format, GaudiGblr, LowRank, Monarch, default_method
from structmat.inspect.plots import heat_map

RESULTS = Path(__file__).parent / "results"
SIZE = 256
KEEPS = (0.25, 0.125)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _distance(n: int) -> Tensor:
    places = torch.arange(n)
    return (places[:, None] - places).abs()


def block_sparse(n: int) -> Tensor:
    """A tenth of the blocks of 16 x 16, at random places."""
    on = torch.rand(n // 16, n // 16, generator=torch.Generator().manual_seed(1)) < 0.1
    return _normal(n, n) * on.repeat_interleave(16, 0).repeat_interleave(16, 1)


def hierarchical(n: int) -> Tensor:
    """Diagonal blocks of 16 dense, off-diagonal ones of rank 2 at every level (HODLR)."""
    if n <= 16:
        return _normal(n, n)
    half, scale = n // 2, (n / 2) ** -0.5
    corners = [_normal(half, 2, seed=n + k) @ _normal(2, half, seed=n + k + 2) * scale * 4 for k in (0, 1)]
    upper = torch.cat([hierarchical(half), corners[0]], 1)
    return torch.cat([upper, torch.cat([corners[1], hierarchical(half)], 1)])


def toeplitz(n: int) -> Tensor:
    """Random diagonals that fall off with their distance."""
    diagonals = _normal(2 * n - 1) / (1 + (torch.arange(2 * n - 1) - n + 1).abs() / 16)
    places = torch.arange(n)
    return diagonals[places[:, None] - places + n - 1]


MATRICES: dict[str, Callable[[int], Tensor]] = {
    "low-rank (16)": lambda n: _normal(n, 16) @ _normal(16, n, seed=1),
    "block-diagonal (4 blocks)": lambda n: torch.block_diag(*_normal(4, n // 4, n // 4)),
    "block-sparse": block_sparse,
    "banded (width 31)": lambda n: _normal(n, n) * (_distance(n) < 16),
    "diagonally dominant": lambda n: _normal(n, n) / n**0.5 + 2 * torch.eye(n),
    "hierarchical off-diagonal low-rank": hierarchical,
    "Toeplitz": toeplitz,
    "smooth kernel": lambda n: torch.exp(-((_distance(n) / n * 8) ** 2)),
    "permutation": lambda n: torch.eye(n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))],
    "random": lambda n: _normal(n, n),
}
"""The matrices by name."""

FORMATS: dict[str, Callable[[int, float], Format]] = {
    "low-rank": lambda n, keep: LowRank.for_budget(n, n, keep=keep),
    "block-diagonal": lambda n, keep: BlockDiagonal.for_budget(n, n, keep=keep),
    "Monarch 4 x 4": lambda n, keep: Monarch.for_budget(n, n, keep=keep, blocks=4),
    "Monarch 16 x 16": lambda n, keep: Monarch.for_budget(n, n, keep=keep, blocks=16),
    "block-sparse": lambda n, keep: BlockSparse.for_budget(n, n, keep=keep, blocks=16),
    "BLAST 4 x 4": lambda n, keep: Blast.for_budget(n, n, keep=keep, blocks=4),
    "BLAST 16 x 16": lambda n, keep: Blast.for_budget(n, n, keep=keep, blocks=16),
    "GBLR": lambda n, keep: GaudiGblr.for_budget(n, n, keep=keep),
}
"""The structures by name, largest members within a budget; block-sparse has the blocks of the largest norm."""


def error(structure: str, keep: float, matrix: Tensor) -> float:
    """Relative error of the structure's default fit."""
    format = FORMATS[structure](SIZE, keep)
    if isinstance(format, BlockSparse):
        format = BlockSparse.from_magnitude(matrix, keep=keep, blocks=16)
    return default_method(format)(matrix, format).error


def table(found: dict[str, Any]) -> str:
    """The errors as Markdown."""
    lines = [
        "# What each structure can hold",
        "",
        f"Made by `benchmarks/expressivity.py` on: {hardware_line(found['hardware'])}.",
        "",
        f"Relative Frobenius error of the default fit to {SIZE} x {SIZE} matrices of known structure, every structure "
        "at the same share of the dense parameters (the largest member within it; block-sparse with the blocks of the "
        "largest norm). GBLR has at most 256 components. Heat map: `expressivity.png`.",
    ]
    for keep in KEEPS:
        lines += [
            "",
            f"## keep {keep}",
            "",
            "| matrix | " + " | ".join(FORMATS) + " |",
            "|---|" + "---|" * len(FORMATS),
        ]
        for name in MATRICES:
            row = found["errors"][str(keep)][name]
            least = min(row.values())
            texts = [f"**{v:.3f}**" if v < least + 5e-4 else f"{v:.3f}" for v in row.values()]
            lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Fit everything and write JSON, table and heat map."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for keep in KEEPS:
        errors[str(keep)] = {}
        for name, make in MATRICES.items():
            matrix = make(SIZE)
            errors[str(keep)][name] = {structure: error(structure, keep, matrix) for structure in FORMATS}
            print(keep, name, {k: round(v, 3) for k, v in errors[str(keep)][name].items()}, flush=True)
    found = {"hardware": hardware(), "size": SIZE, "errors": errors}
    (RESULTS / "expressivity.json").write_text(json.dumps(found, indent=1))
    (RESULTS / "expressivity.md").write_text(table(found))
    figure = heat_map(
        {name: list(row.values()) for name, row in errors[str(KEEPS[0])].items()},
        list(FORMATS),
        title=f"relative error at keep {KEEPS[0]}",
    )
    figure.savefig(RESULTS / "expressivity.png")


if __name__ == "__main__":
    main()
