"""Block-diagonal matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat.formats.base import Factors, FactorSpec, Format
from structmat.formats.unrolled import Sliced
from structmat.ops import block_diagonal_matmul
from structmat.ops.block_diagonal import ALGORITHMS


@dataclass(frozen=True)
class BlockDiagonal(Format):
    """``I`` dense blocks of ``P x Q`` on the diagonal: ``M N / I`` parameters.

    The factor ``blocks (I P, Q)`` stacks them; it is two-dimensional so that sharding cuts a long axis.

    Attributes:
        M: The number of out features.
        N: The number of in features.
        blocks: ``I``, a divisor of both.

    Raises:
        ValueError: If ``blocks`` does not divide ``M`` and ``N``.

    Example:
        >>> BlockDiagonal.for_budget(96, 192, keep=0.3)
        BlockDiagonal(M=96, N=192, blocks=4)
    """

    blocks: int

    name: ClassVar[str] = "block_diagonal"
    label: ClassVar[str] = "block-diagonal"
    algorithms: ClassVar[tuple[str, ...]] = tuple(ALGORITHMS)
    scale_exponents: ClassVar[dict[str, float]] = {"blocks": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.positive_int(self.blocks, "blocks")
        _checks.block_counts(self.blocks, self.M, self.N)

    @classmethod
    def for_budget(cls, M: int, N: int, *, keep: float) -> BlockDiagonal:
        """The fewest blocks with at most ``keep M N`` parameters.

        Args:
            M: The number of out features.
            N: The number of in features.
            keep: The share of the dense parameters, in ``(0, 1]``; the block count is at least ``1 / keep``.

        Returns:
            The format.

        Raises:
            ValueError: If no common divisor of ``M`` and ``N`` is large enough.
        """
        budget = _checks.budget(keep, M * N)
        common = _checks.divisors(math.gcd(M, N))
        fitting = [count for count in common if M * N // count <= budget]
        if not fitting:
            raise ValueError(
                f"expected a keep of at least {_checks.rounded_up(1 / common[-1])} for a {M} x {N} block-diagonal "
                f"matrix (the common divisors of the shape are {', '.join(map(str, common))}), got {keep}"
            )
        return cls(M, N, fitting[0])

    @property
    def block_shape(self) -> tuple[int, int]:
        """``(P, Q)``."""
        return self.M // self.blocks, self.N // self.blocks

    def factor_specs(self) -> dict[str, FactorSpec]:
        """``blocks (I P, Q)``."""
        return {"blocks": FactorSpec((self.M, self.block_shape[1]))}

    def to_dense(self, factors: Factors) -> Tensor:
        """Zeros with the blocks on the diagonal."""
        return torch.block_diag(*factors["blocks"].view(self.blocks, *self.block_shape))

    def unrolled(self, factors: Factors, sums: bool = True) -> nn.Module:
        """One linear layer for each block."""
        return Sliced(factors["blocks"].view(self.blocks, *self.block_shape).unbind())

    def matmul(self, x: Tensor, factors: Factors, algorithm: str = "") -> Tensor:
        """One batched product over the blocks."""
        return block_diagonal_matmul(x, factors["blocks"].view(self.blocks, *self.block_shape), algorithm)

    def _random_factors(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        Q = self.block_shape[1]
        return {"blocks": torch.randn(self.M, Q, generator=generator) / math.sqrt(3 * Q)}
