"""Low-rank matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat.formats.base import Factors, FactorSpec, Format, RankedFormat
from structmat.formats.dense import Dense
from structmat.formats.unrolled import Chain
from structmat.ops import low_rank_matmul
from structmat.ops.common import LINEAR


@dataclass(frozen=True)
class LowRank(RankedFormat):
    """``W = left @ right`` with ``left (M, R)`` and ``right (R, N)``: ``R (M + N)`` parameters.

    Attributes:
        M: The number of out features.
        N: The number of in features.
        rank: ``R``, at most ``min(M, N)``.

    Raises:
        ValueError: If a field is out of range.

    Example:
        >>> LowRank.for_budget(1024, 1024, keep=0.5)
        LowRank(M=1024, N=1024, rank=256)
    """

    rank: int

    name: ClassVar[str] = "low_rank"
    label: ClassVar[str] = "low-rank"
    algorithms: ClassVar[tuple[str, ...]] = tuple(LINEAR)
    scale_exponents: ClassVar[dict[str, float]] = {"left": 0.5, "right": 0.5}
    component_axes: ClassVar[dict[str, int]] = {"left": 1, "right": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.positive_int(self.rank, "rank")
        if self.rank > self.max_rank:
            raise ValueError(f"expected a rank of at most min(M, N) = {self.max_rank}, got {self.rank}")

    @property
    def parameters_per_rank(self) -> int:
        """``M + N``."""
        return self.M + self.N

    @property
    def max_rank(self) -> int:
        """``min(M, N)``."""
        return min(self.M, self.N)

    @classmethod
    def for_budget(cls, M: int, N: int, *, keep: float) -> LowRank:
        """The largest rank with at most ``keep M N`` parameters.

        Args:
            M: The number of out features.
            N: The number of in features.
            keep: The share of the dense parameters, in ``(0, 1]``.

        Returns:
            The format; its rank is a multiple of 8 where that loses under 2 %.

        Raises:
            ValueError: If not even rank 1 fits.
        """
        return cls(M, N, cls._largest_rank(cls(M, N, 1), keep))

    def factor_specs(self) -> dict[str, FactorSpec]:
        """``left (M, R)``, ``right (R, N)``."""
        return {"left": FactorSpec((self.M, self.rank)), "right": FactorSpec((self.rank, self.N))}

    def to_dense(self, factors: Factors) -> Tensor:
        """``left @ right``."""
        return factors["left"] @ factors["right"]

    def part(self, factors: Factors, axis: int, index: int, count: int) -> tuple[Format, dict[str, Tensor]]:
        """Some rows of ``left`` or columns of ``right``; a dense matrix where the part has no higher rank."""
        left, right = factors["left"], factors["right"]
        left = left if axis else left.chunk(count)[index]
        right = right.chunk(count, 1)[index] if axis else right
        shape = len(left), right.shape[1]
        if self.rank > min(shape):
            return Dense(*shape), {"weight": left @ right}
        return LowRank(*shape, self.rank), {"left": left, "right": right}

    def unrolled(self, factors: Factors, sums: bool = True) -> nn.Module:
        """Two linear layers."""
        return Chain(factors["right"], factors["left"])

    def matmul(self, x: Tensor, factors: Factors, algorithm: str = "") -> Tensor:
        """Two products through the ``R`` features in the middle."""
        return low_rank_matmul(x, factors["left"], factors["right"], algorithm)

    def _random_factors(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        return {
            "left": torch.randn(self.M, self.rank, generator=generator) / math.sqrt(3 * self.rank),
            "right": torch.randn(self.rank, self.N, generator=generator) / math.sqrt(self.N),
        }
