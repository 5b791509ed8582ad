"""BLAST matrices: blocks that share their bases along rows and columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat.formats.base import Factors, FactorSpec, RankedFormat
from structmat.formats.unrolled import Coupled, CoupledByTerms
from structmat.ops import blast_matmul
from structmat.ops.blast import ALGORITHMS


@dataclass(frozen=True)
class Blast(RankedFormat):
    """Blocks ``left_i Diag(diag_ij) right_j``: ``R (M + N + I J)`` parameters (BLAST: Lee et al. 2024, section 2).

    The factors are stored two-dimensional, ``left (I P, R)``, ``diag (I J, R)``, ``right (J R, Q)``, and viewed as
    ``(I, P, R)``, ``(I, J, R)``, ``(J, R, Q)``.

    Attributes:
        M: The number of out features.
        N: The number of in features.
        blocks: The block counts ``(I, J)``, or one count for both.
        rank: ``R``, any positive integer.

    Raises:
        ValueError: If the blocks do not divide the shape or the rank is not positive.

    Example:
        >>> Blast.for_budget(4096, 4096, keep=0.5, blocks=16)
        Blast(M=4096, N=4096, blocks=(16, 16), rank=992)
    """

    blocks: tuple[int, int]
    rank: int

    name: ClassVar[str] = "blast"
    label: ClassVar[str] = "BLAST"
    no_decay: ClassVar[tuple[str, ...]] = ("diag",)  # decaying bases keep the matrix small already
    component_axes: ClassVar[dict[str, int]] = {"left": 1, "diag": 1, "right": 0}
    component_size: ClassVar[Literal["norm", "root mean square"]] = "root mean square"
    drawn_by: ClassVar[tuple[str, ...]] = ("left", "diag", "right")
    algorithms: ClassVar[tuple[str, ...]] = tuple(ALGORITHMS)
    scale_exponents: ClassVar[dict[str, float]] = {"left": 1 / 3, "diag": 1 / 3, "right": 1 / 3}

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "blocks", _checks.block_counts(self.blocks, self.M, self.N))
        _checks.positive_int(self.rank, "rank")

    @property
    def block_shape(self) -> tuple[int, int]:
        """``(P, Q)``."""
        return self.M // self.blocks[0], self.N // self.blocks[1]

    @property
    def parameters_per_rank(self) -> int:
        """``M + N + I J``."""
        return self.M + self.N + self.blocks[0] * self.blocks[1]

    @property
    def max_rank(self) -> int:
        """The rank at which every block can be anything: a slot of ``min(P, Q)`` components for each of them."""
        return max(self.blocks) * min(self.block_shape)

    @classmethod
    def for_budget(cls, M: int, N: int, *, keep: float, blocks: Any) -> Blast:
        """The largest rank with at most ``keep M N`` parameters.

        Args:
            M: The number of out features.
            N: The number of in features.
            keep: The share of the dense parameters, in ``(0, 1]``.
            blocks: The block counts ``(I, J)``, or one count for both.

        Returns:
            The format; its rank is a multiple of 8 where that loses under 2 %.

        Raises:
            ValueError: If not even rank 1 fits, or the blocks do not divide the shape.
        """
        smallest = cls(M, N, blocks, 1)
        return cls(M, N, smallest.blocks, cls._largest_rank(smallest, keep))

    def factor_specs(self) -> dict[str, FactorSpec]:
        """``left (I P, R)``, ``diag (I J, R)``, ``right (J R, Q)``."""
        (I, J), Q, R = self.blocks, self.block_shape[1], self.rank
        return {"left": FactorSpec((self.M, R)), "diag": FactorSpec((I * J, R)), "right": FactorSpec((J * R, Q))}

    def views(self, factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
        """The factors as ``left (I, P, R)``, ``diag (I, J, R)`` and ``right (J, R, Q)``."""
        (I, J), (P, Q), R = self.blocks, self.block_shape, self.rank
        return factors["left"].view(I, P, R), factors["diag"].view(I, J, R), factors["right"].view(J, R, Q)

    def to_dense(self, factors: Factors) -> Tensor:
        """Block ``(i, j)`` is ``left_i Diag(diag_ij) right_j``."""
        left, diag, right = self.views(factors)
        return torch.einsum("ipr,ijr,jrq->ipjq", left, diag, right).reshape(self.M, self.N)

    def part(self, factors: Factors, axis: int, index: int, count: int) -> tuple[Blast, dict[str, Tensor]]:
        """Some rows or columns of blocks, which are made smaller where there are too few to share out."""
        (_, diag, right), blocks = self.views(factors), list(self.blocks)
        split = count // math.gcd(blocks[axis], count)
        blocks[axis] = blocks[axis] * split // count
        diag = diag.repeat_interleave(split, axis).chunk(count, axis)[index]
        if axis:
            right = right.unflatten(2, (split, -1)).transpose(1, 2).flatten(0, 1).chunk(count)[index]
        rows = factors["left"] if axis else factors["left"].chunk(count)[index]
        format = Blast(len(rows), blocks[1] * right.shape[2], (blocks[0], blocks[1]), self.rank)
        return format, {"left": rows, "diag": diag.flatten(0, 1), "right": right.flatten(0, 1)}

    def unrolled(self, factors: Factors, sums: bool = True) -> nn.Module:
        """A linear layer for each column of blocks and one for each row, with the couplings between them."""
        return (Coupled if sums else CoupledByTerms)(*self.views(factors))

    def matmul(self, x: Tensor, factors: Factors, algorithm: str = "") -> Tensor:
        """Bases of the columns, couplings, bases of the rows (Algorithm 1)."""
        return blast_matmul(x, *self.views(factors), algorithm)

    def couplings(self, factors: Factors) -> Tensor:
        """The couplings ``diag``, in units of what each component contributes to a block on average."""
        left, diag, right = self.views({name: factor.detach().float() for name, factor in factors.items()})
        diag = diag * (left.square().sum((0, 1)) * right.square().sum((0, 2))).sqrt()
        return diag / diag.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)

    def _random_factors(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        (I, J), Q, R = self.blocks, self.block_shape[1], self.rank
        return {
            "left": torch.randn(self.M, R, generator=generator) / math.sqrt(3 * R * J),
            "diag": torch.randn(I * J, R, generator=generator),
            "right": torch.randn(J * R, Q, generator=generator) / math.sqrt(Q),
        }
