"""Block tensor-train matrices, written as another package would: one file that uses public names alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structmat import Format, register_format
from structmat.formats import Factors, FactorSpec


@register_format
@dataclass(frozen=True)
class BlockTensorTrain(Format):
    """A block tensor-train matrix of two cores (Qiu et al. 2024, *Compute Better Spent*, arXiv 2406.06248).

    With ``M = m1 m2`` and ``N = n1 n2``,
    ``W[(a1, a2), (b1, b2)] = sum_s left[a1, a2, s, b1] right[b1, s, a2, b2]``, where ``s`` counts the tensor-train
    rank. Unlike in a tensor train both cores see ``a2`` and ``b1``, at no cost in the product: it takes as many
    multiplications as there are parameters, ``rank (M n1 + N m2)``. At rank 1 it is a Monarch matrix.

    Attributes:
        M: The number of out features.
        N: The number of in features.
        cores: ``((m1, m2), (n1, n2))``.
        rank: The tensor-train rank.
    """

    cores: tuple[tuple[int, int], tuple[int, int]]
    rank: int

    name: ClassVar[str] = "btt"
    label: ClassVar[str] = "BTT"
    scale_exponents: ClassVar[dict[str, float]] = {"left": 0.5, "right": 0.5}

    def __post_init__(self) -> None:
        super().__post_init__()
        if tuple(math.prod(sizes) for sizes in self.cores) != (self.M, self.N) or self.rank < 1:
            raise ValueError(f"expected cores of {self.M} x {self.N} and a positive rank, got {self}")

    @classmethod
    def for_budget(cls, M: int, N: int, *, keep: float, rank_cap: int | None = None) -> BlockTensorTrain:
        """The largest rank with at most ``keep M N`` parameters on cores that are as square as can be.

        Args:
            M: The number of out features.
            N: The number of in features.
            keep: The share of the dense parameters.
            rank_cap: The largest rank allowed; None for any.

        Returns:
            The format.
        """
        m2, n1 = (max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0) for n in (M, N))
        cores = (M // m2, m2), (n1, N // n1)
        rank = int(keep * M * N) // (M * n1 + N * m2)
        if rank < 1:
            raise ValueError(f"expected a larger keep for a {M} x {N} matrix of cores {cores}, got {keep}")
        return cls(M, N, cores, rank if rank_cap is None else min(rank, rank_cap))

    def factor_specs(self) -> dict[str, FactorSpec]:
        """``left (m1 m2, r n1)`` and ``right (n1 r m2, n2)``."""
        (_, m2), (n1, n2) = self.cores
        return {"left": FactorSpec((self.M, self.rank * n1)), "right": FactorSpec((n1 * self.rank * m2, n2))}

    def _views(self, factors: Factors) -> tuple[Tensor, Tensor]:
        (m1, m2), (n1, n2) = self.cores
        return factors["left"].view(m1, m2, self.rank, n1), factors["right"].view(n1, self.rank, m2, n2)

    def to_dense(self, factors: Factors) -> Tensor:
        """The sum over the rank."""
        return torch.einsum("acsb,bscd->acbd", *self._views(factors)).reshape(self.M, self.N)

    def matmul(self, x: Tensor, factors: Factors, algorithm: str = "") -> Tensor:
        """One core after the other."""
        left, right = self._views(factors)
        n1, n2 = self.cores[1]
        z = torch.einsum("tbd,bscd->tbsc", x.reshape(-1, n1, n2), right)
        return torch.einsum("tbsc,acsb->tac", z, left).reshape(*x.shape[:-1], self.M)
