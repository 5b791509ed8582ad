"""Networks that the tests of exporters share."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from conformance import CASES
from structmat import Blast, Format, Gblr, LowRank, StructuredLinear
from structmat.nn import StructuredConv2d

FINAL = [format for format in CASES.values() if not format.learns] + [Gblr(7, 5, 0, (0, 0))]
"""The formats that are exported unchanged, or in tiles."""

FEW = [CASES["blast square"], CASES["low-rank square"], CASES["gblr square"], CASES["monarch permuted"]]


class Bank(nn.Module):
    """A layer of each format, each for the first features of the input."""

    def __init__(self, formats: Iterable[Format]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(StructuredLinear(format, generator=seed()) for format in formats)

    def forward(self, x: Tensor) -> Any:
        return [layer(x[..., : layer.in_features]) for layer in self.layers]


class Images(nn.Module):
    """Convolutions with residual connections, one of them on a part of the channels, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            [
                StructuredConv2d(Blast(8, 72, (2, 2), 6), 3, padding=1),
                StructuredConv2d(LowRank(8, 72, 3), 3, padding=1),
                StructuredConv2d(Blast(8, 72, (8, 8), 6), 3, padding=1),
            ]
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x.mean((2, 3)))


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)
