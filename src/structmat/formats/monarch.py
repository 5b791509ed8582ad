"""Monarch matrices, which without the output permutation are the block low-rank ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat.formats.base import Factors, FactorSpec, Format, RankedFormat
from structmat.formats.unrolled import Regrouped
from structmat.ops import monarch_matmul
from structmat.ops.monarch import ALGORITHMS


@dataclass(frozen=True)
class Monarch(RankedFormat):
    """``I x J`` blocks of rank ``t``: ``t (J M + I N)`` parameters (Dao et al. 2022, arXiv 2204.00595).

    Block ``(i, j)`` is ``left[i, :, j, :] @ right[j, i]`` with the views ``left (I, P, J, t)`` of ``(I P, J t)`` and
    ``right (J, I, t, Q)`` of ``(J I t, Q)``.

    Attributes:
        M: The number of out features.
        N: The number of in features.
        blocks: The block counts ``(I, J)``, or one count for both.
        rank: ``t``, at most ``min(P, Q)``.
        permute_output: Whether row ``p I + i`` of ``W`` is row ``p`` of block row ``i``, as in the original; otherwise
            this is row ``i P + p``.

    Raises:
        ValueError: If a field is out of range.

    Example:
        >>> Monarch.for_budget(64, 128, keep=0.5, blocks=4)
        Monarch(M=64, N=128, blocks=(4, 4), rank=5, permute_output=False)
    """

    blocks: tuple[int, int]
    rank: int
    permute_output: bool = False

    name: ClassVar[str] = "monarch"
    label: ClassVar[str] = "Monarch"
    algorithms: ClassVar[tuple[str, ...]] = tuple(ALGORITHMS)
    scale_exponents: ClassVar[dict[str, float]] = {"left": 0.5, "right": 0.5}

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "blocks", _checks.block_counts(self.blocks, self.M, self.N))
        _checks.positive_int(self.rank, "rank")
        if not isinstance(self.permute_output, bool):
            raise ValueError(f"expected permute_output to be true or false, got {self.permute_output!r}")
        if self.rank > self.max_rank:
            raise ValueError(f"expected a rank of at most min(P, Q) = {self.max_rank}, got {self.rank}")

    @property
    def block_shape(self) -> tuple[int, int]:
        """``(P, Q)``."""
        return self.M // self.blocks[0], self.N // self.blocks[1]

    @property
    def parameters_per_rank(self) -> int:
        """``J M + I N``."""
        return self.blocks[1] * self.M + self.blocks[0] * self.N

    @property
    def max_rank(self) -> int:
        """``min(P, Q)``."""
        return min(self.block_shape)

    @classmethod
    def for_budget(cls, M: int, N: int, *, keep: float, blocks: Any, permute_output: bool = False) -> Monarch:
        """The largest rank with at most ``keep M N`` parameters.

        Args:
            M: The number of out features.
            N: The number of in features.
            keep: The share of the dense parameters, in ``(0, 1]``.
            blocks: The block counts ``(I, J)``, or one count for both.
            permute_output: Whether the rows are in the order of the original.

        Returns:
            The format; its rank is a multiple of 8 where that loses under 2 %.

        Raises:
            ValueError: If not even rank 1 fits, or the blocks do not divide the shape.
        """
        smallest = cls(M, N, blocks, 1, permute_output)
        return cls(M, N, smallest.blocks, cls._largest_rank(smallest, keep), permute_output)

    def factor_specs(self) -> dict[str, FactorSpec]:
        """``left (I P, J t)``, ``right (J I t, Q)``."""
        I, J = self.blocks
        return {
            "left": FactorSpec((self.M, J * self.rank)),
            "right": FactorSpec((J * I * self.rank, self.block_shape[1])),
        }

    def views(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """The factors as ``left (I, P, J, t)`` and ``right (J, I, t, Q)``."""
        (I, J), (P, Q), t = self.blocks, self.block_shape, self.rank
        return factors["left"].view(I, P, J, t), factors["right"].view(J, I, t, Q)

    def to_dense(self, factors: Factors) -> Tensor:
        """The blocks' low-rank products, put in their places."""
        left, right = self.views(factors)
        W = torch.einsum("ipjt,jitq->ipjq", left, right)
        if self.permute_output:
            W = W.transpose(0, 1)
        return W.reshape(self.M, self.N)

    def part(self, factors: Factors, axis: int, index: int, count: int) -> tuple[Format, dict[str, Tensor]]:
        """Some rows or columns of blocks, which are made smaller where there are too few to share out."""
        (left, right), blocks = self.views(factors), list(self.blocks)
        split = count // math.gcd(blocks[axis], count)
        if (self.permute_output and axis == 0) or self.rank > self.block_shape[axis] // split:
            return super().part(factors, axis, index, count)
        blocks[axis] = blocks[axis] * split // count
        if axis:
            left = left.repeat_interleave(split, 2).chunk(count, 2)[index]
            right = right.unflatten(3, (split, -1)).permute(0, 3, 1, 2, 4).flatten(0, 1).chunk(count)[index]
        else:
            left = left.unflatten(1, (split, -1)).flatten(0, 1).chunk(count)[index]
            right = right.repeat_interleave(split, 1).chunk(count, 1)[index]
        M, N = left.shape[0] * left.shape[1], right.shape[0] * right.shape[3]
        format = Monarch(M, N, (blocks[0], blocks[1]), self.rank, self.permute_output)
        return format, {"left": left.flatten(2).flatten(0, 1), "right": right.flatten(0, 2)}

    def unrolled(self, factors: Factors, sums: bool = True) -> nn.Module:
        """One linear layer for each column of blocks and one for each row, with a regrouping between them."""
        left, right = self.views(factors)
        return Regrouped(left.flatten(2), right.flatten(1, 2), self.permute_output)

    def matmul(self, x: Tensor, factors: Factors, algorithm: str = "") -> Tensor:
        """Two batched products with a regrouping between them."""
        return monarch_matmul(x, *self.views(factors), self.permute_output, algorithm)

    def _random_factors(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        shapes, Q = {n: spec.shape for n, spec in self.factor_specs().items()}, self.block_shape[1]
        return {
            "left": torch.randn(shapes["left"], generator=generator) / math.sqrt(3 * shapes["left"][1]),
            "right": torch.randn(shapes["right"], generator=generator) / math.sqrt(Q),
        }
