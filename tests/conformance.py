"""The formats that the conformance suite runs over: a new format adds its cases here, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structmat import Blast, BlockDiagonal, BlockSparse, Dense, Format, GaudiGblr, Gblr, LowRank, Monarch
from structmat.formats import FORMATS, Factors, FactorSpec, Merged, TiledGblr, flat_butterfly
from third_party.btt import BlockTensorTrain

FORMATS.pop("btt", None)  # other tests see the library's own formats alone


@dataclass(frozen=True)
class Minimal(Format):
    """The least that a format has to define, so that the suite runs over the defaults of ``Format`` too.

    ``W = (gate * column) row^T``, where the gate is a buffer that stays float32.
    """

    name: ClassVar[str] = "minimal"
    scale_exponents: ClassVar[dict[str, float]] = {"column": 0.75, "row": 0.25}

    def factor_specs(self) -> dict[str, FactorSpec]:
        return {
            "column": FactorSpec((self.M,)),
            "row": FactorSpec((self.N,)),
            "gate": FactorSpec((self.M,), trainable=False, dtype=torch.float32),
        }

    def to_dense(self, factors: Factors) -> Tensor:
        column = factors["gate"].to(factors["column"].dtype) * factors["column"]
        return column[:, None] * factors["row"]


CASES: dict[str, Format] = {
    "minimal": Minimal(6, 9),
    "dense": Dense(12, 10),
    "low-rank square": LowRank(9, 9, rank=3),
    "low-rank wide, rank 1": LowRank(10, 14, rank=1),
    "low-rank tall, full rank": LowRank(14, 10, rank=10),
    "block-diagonal square": BlockDiagonal(12, 12, blocks=3),
    "block-diagonal wide": BlockDiagonal(8, 20, blocks=4),
    "block-diagonal tall": BlockDiagonal(15, 10, blocks=5),
    "block-diagonal one block": BlockDiagonal(7, 5, blocks=1),
    "monarch square": Monarch(12, 12, blocks=3, rank=2),
    "monarch 3x7 blocks, I > J": Monarch(15, 21, blocks=(5, 3), rank=2),
    "monarch I < J": Monarch(15, 21, blocks=(3, 7), rank=3),
    "monarch one block, rank 1": Monarch(7, 5, blocks=1, rank=1),
    "monarch permuted": Monarch(12, 12, blocks=3, rank=2, permute_output=True),
    "monarch permuted, I > J": Monarch(15, 21, blocks=(5, 3), rank=2, permute_output=True),
    "monarch permuted, I < J": Monarch(15, 21, blocks=(3, 7), rank=3, permute_output=True),
    "merged": Merged(12, 12, Monarch(12, 12, blocks=3, rank=2), rank=2),
    "merged wide, rank 1": Merged(10, 14, BlockSparse(10, 14, ("10", "01")), rank=1),
    "blast square": Blast(12, 12, blocks=3, rank=4),
    "blast 3x7 blocks, I > J": Blast(15, 21, blocks=(5, 3), rank=6),
    "blast I < J": Blast(15, 21, blocks=(3, 7), rank=5),
    "blast one block": Blast(7, 5, blocks=1, rank=3),
    "blast rank 1": Blast(8, 6, blocks=2, rank=1),
    "blast R > min(M, N)": Blast(8, 6, blocks=2, rank=11),
    "block-sparse butterfly": BlockSparse(12, 12, flat_butterfly((4, 4), stride=1)),
    "block-sparse butterfly, I < J": BlockSparse(12, 24, flat_butterfly((4, 8), stride=2), rank=2),
    "block-sparse butterfly, I > J": BlockSparse(24, 12, flat_butterfly((8, 4), stride=4)),
    "block-sparse 3x7 blocks, unequal rows": BlockSparse(15, 21, ("110", "001", "111", "010", "101"), rank=3),
    "block-sparse empty first row": BlockSparse(9, 8, ("0000", "1010", "0100")),
    "block-sparse empty row and column, low rank": BlockSparse(9, 8, ("1010", "0000", "0010"), rank=1),
    "block-sparse one block": BlockSparse(7, 5, ("1",)),
    "gblr square": Gblr(12, 12, 6, (30, 25)),
    "gblr wide": Gblr(9, 21, 4, (17, 60)),
    "gblr tall, one component": Gblr(14, 5, 1, (9, 3)),
    "gblr full segments": Gblr(8, 6, 3, (24, 18)),
    "tiled gblr": TiledGblr(12, 12, 7, (3, 3), (4, 2), (4, 3)),
    "tiled gblr, several groups": TiledGblr(10, 21, 6, (1, 4, 1, 2), (1, 5, 1, 3, 1, 2), (5, 8)),
    "third party square": BlockTensorTrain(12, 12, ((4, 3), (3, 4)), 2),
    "third party wide, rank 1": BlockTensorTrain(10, 21, ((5, 2), (3, 7)), 1),
    "third party tall": BlockTensorTrain(14, 9, ((2, 7), (3, 3)), 3),
    "gaudi square": GaudiGblr(12, 12, 12, 0.5),
    "gaudi wide, few components": GaudiGblr(9, 21, 2, 0.4),
    "gaudi tall, multiple 4": GaudiGblr(16, 12, 10, 0.6, multiple=4),
}
"""Small ones, for what holds to float precision."""

LARGE: dict[str, Format] = {
    "minimal": Minimal(96, 160),
    "dense": Dense(96, 160),
    "low-rank": LowRank(96, 160, rank=24),
    "block-diagonal": BlockDiagonal(96, 160, blocks=4),
    "monarch": Monarch(96, 160, blocks=(4, 8), rank=6),
    "monarch permuted": Monarch(96, 160, blocks=(8, 4), rank=6, permute_output=True),
    "blast": Blast(96, 160, blocks=(4, 8), rank=32),
    "block-sparse": BlockSparse(96, 160, flat_butterfly((8, 8), stride=2)),
    "block-sparse, low rank": BlockSparse(96, 160, flat_butterfly((8, 8), stride=2), rank=16),
    "block-sparse unequal rows": BlockSparse(96, 160, ("1100", "0010", "1111", "0101")),
    "block-sparse empty row, low rank": BlockSparse(96, 160, ("1100", "0000", "1111", "0101"), rank=16),
    "gblr": Gblr(96, 160, 96, (2000, 3000)),
    "tiled gblr": TiledGblr(96, 160, 96, (6, 48), (4, 50, 6, 46), (16, 16)),
    "third party": BlockTensorTrain(96, 160, ((12, 8), (10, 16)), 3),
    "gaudi": GaudiGblr(96, 160, 96, 0.25),
    "gaudi, few components, multiple 8": GaudiGblr(96, 160, 48, 0.75, multiple=8),
}
"""Every format once or twice at a size at which averages mean something and training is possible."""
