"""Block-sparse matrices on a flat block butterfly or any other block mask, with an optional low-rank term."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat.formats.base import Factors, FactorSpec, RankedFormat
from structmat.formats.unrolled import Rows
from structmat.ops import block_sparse_matmul, low_rank_matmul
from structmat.ops.block_sparse import ALGORITHMS


def flat_butterfly(blocks: tuple[int, int], stride: int) -> tuple[str, ...]:
    """The flat block butterfly mask (Pixelfly: Dao et al. 2022, arXiv 2112.00029).

    On a square grid of blocks, ``(i, j)`` is on when ``i == j`` or ``i xor j`` is a power of two of at most
    ``stride``. Where the counts differ, the square pattern of the larger count is laid over the rectangle: a block is
    on when a block of the pattern that it covers is.

    Args:
        blocks: ``(I, J)``.
        stride: 0 for the diagonal alone, else a power of two.

    Returns:
        ``I`` strings of ``J`` characters, ``"1"`` where a block is on.

    Raises:
        ValueError: If ``stride`` is neither 0 nor a power of two, or a count is not positive.

    Example:
        >>> flat_butterfly((4, 4), 1)
        ('1100', '1100', '0011', '0011')
    """
    I, J = (_checks.positive_int(count, "a block count") for count in blocks)
    _checks.natural_int(stride, "stride")
    if stride & (stride - 1):
        raise ValueError(f"expected a stride of 0 or a power of two, got {stride}")
    n = max(blocks)

    def covered(index: int, count: int) -> range:
        return range(index * n // count, -(-(index + 1) * n // count))

    def on(a: int, b: int) -> bool:
        distance = a ^ b
        return distance == 0 or (distance & (distance - 1) == 0 and distance <= stride)

    return tuple(
        "".join("1" if any(on(a, b) for a in covered(i, I) for b in covered(j, J)) else "0" for j in range(J))
        for i in range(I)
    )


@dataclass(frozen=True)
class BlockSparse(RankedFormat):
    """Dense ``P x Q`` blocks where ``mask`` is on, plus a low-rank term: ``n P Q + R (M + N)`` parameters.

    The factor ``blocks (n P, Q)`` holds the blocks that are on, row by row, each row's from left to right; with a
    rank there are ``left (M, R)`` and ``right (R, N)`` too.

    Attributes:
        M: The number of out features.
        N: The number of in features.
        mask: ``I`` strings of ``J`` characters each, ``"1"`` for a block that is kept and ``"0"`` for one that is not.
        rank: ``R`` of the low-rank term; 0 for none.

    Raises:
        ValueError: If the mask is not a rectangle of 0 and 1 that divides the shape, or the rank is out of range.

    Example:
        >>> BlockSparse(64, 64, flat_butterfly((4, 4), stride=2)).keep
        0.75
    """

    mask: tuple[str, ...]
    rank: int = 0

    name: ClassVar[str] = "block_sparse"
    label: ClassVar[str] = "block-sparse"
    algorithms: ClassVar[tuple[str, ...]] = tuple(ALGORITHMS)
    scale_exponents: ClassVar[dict[str, float]] = {"blocks": 1.0, "left": 0.5, "right": 0.5}

    def __post_init__(self) -> None:
        super().__post_init__()
        mask = tuple(self.mask) if isinstance(self.mask, (tuple, list)) else ()
        rows_are_text = all(isinstance(row, str) and row and set(row) <= {"0", "1"} for row in mask)
        if not mask or not rows_are_text or len({len(row) for row in mask}) != 1 or "1" not in "".join(mask):
            raise ValueError(
                "expected the mask as equally long strings of '0' and '1', at least one '1', one string for each block "
                f"row, got {self.mask!r}; BlockSparse.from_mask takes a tensor"
            )
        _checks.block_counts((len(mask), len(mask[0])), self.M, self.N)
        object.__setattr__(self, "mask", mask)
        columns = tuple(tuple(j for j, on in enumerate(row) if on == "1") for row in mask)
        object.__setattr__(self, "_columns", columns)  # no field: parsed once, since every product needs it
        _checks.natural_int(self.rank, "rank")
        if self.rank > self.max_rank:
            raise ValueError(f"expected a rank of at most min(M, N) = {self.max_rank}, got {self.rank}")

    @classmethod
    def from_mask(cls, M: int, N: int, mask: Tensor | Sequence[Sequence[Any]], rank: int = 0) -> BlockSparse:
        """The format for a mask given as a tensor or as nested sequences.

        Args:
            M: The number of out features.
            N: The number of in features.
            mask: ``(I, J)``, true or non-zero where a block is kept.
            rank: ``R`` of the low-rank term.

        Returns:
            The format.

        Raises:
            ValueError: If the mask is not two-dimensional or does not divide the shape.
        """
        rows = torch.as_tensor(mask)
        if rows.ndim != 2:
            raise ValueError(f"expected a two-dimensional block mask, got shape {tuple(rows.shape)}")
        return cls(M, N, tuple("".join("1" if on else "0" for on in row) for row in rows.bool().tolist()), rank)

    @classmethod
    def from_magnitude(cls, weight: Tensor, *, keep: float, blocks: Any) -> BlockSparse:
        """The mask of the blocks of largest Frobenius norm: the best block-sparse approximation of ``weight``.

        Args:
            weight: ``(M, N)``.
            keep: The share of the blocks that may be kept, in ``(0, 1]``.
            blocks: The block counts ``(I, J)``, or one count for both.

        Returns:
            The format, without a low-rank term.

        Raises:
            TypeError: If the weight is not a floating-point tensor.
            ValueError: If not even one block fits, the blocks do not divide the shape, or the weight is not a finite
                matrix.
        """
        if weight.ndim != 2:
            raise ValueError(f"expected a two-dimensional weight, got shape {tuple(weight.shape)}")
        M, N = weight.shape
        _checks.matrix(weight, (M, N), "the weight")
        I, J = _checks.block_counts(blocks, M, N)
        count = _checks.budget(keep, I * J)
        if count < 1:
            raise ValueError(f"expected a keep of at least 1/{I * J} for {I} x {J} blocks, got {keep}")
        energy = weight.double().view(I, M // I, J, N // J).square().sum((1, 3)).flatten()
        mask = torch.zeros(I * J)
        mask[energy.argsort(descending=True, stable=True)[:count]] = 1
        return cls.from_mask(M, N, mask.view(I, J))

    @classmethod
    def for_budget(cls, M: int, N: int, *, keep: float, blocks: Any, rank: int | None = None) -> BlockSparse:
        """The flat block butterfly of the largest stride, and the largest low-rank term, that the budget allows.

        Args:
            M: The number of out features.
            N: The number of in features.
            keep: The share of the dense parameters, in ``(0, 1]``.
            blocks: The block counts ``(I, J)``, or one count for both.
            rank: The rank of the low-rank term: 0 for none, None for what the blocks leave of the budget.

        Returns:
            The format.

        Raises:
            ValueError: If not even the diagonal fits, or the blocks do not divide the shape.
        """
        counts = _checks.block_counts(blocks, M, N)
        budget = _checks.budget(keep, M * N)
        strides = [0] + [2**k for k in range((max(counts) - 1).bit_length())]
        members = [cls(M, N, flat_butterfly(counts, stride), rank or 0) for stride in strides]
        fitting = [member for member in members if member.num_parameters() <= budget]
        if not fitting:
            raise ValueError(
                f"expected a keep of at least {_checks.rounded_up(members[0].keep)} for a {M} x {N} "
                f"block-sparse matrix with {counts[0]} x {counts[1]} blocks, got {keep}; raise keep or take more blocks"
            )
        if rank is not None:
            return fitting[-1]
        return cls(M, N, fitting[-1].mask, cls._largest_rank(fitting[-1], keep, least=0))

    @property
    def blocks(self) -> tuple[int, int]:
        """``(I, J)``."""
        return len(self.mask), len(self.mask[0])

    @property
    def block_shape(self) -> tuple[int, int]:
        """``(P, Q)``."""
        return self.M // self.blocks[0], self.N // self.blocks[1]

    @property
    def columns(self) -> tuple[tuple[int, ...], ...]:
        """For each block row the columns of the blocks that are on."""
        return self.__dict__["_columns"]

    @property
    def positions(self) -> list[tuple[int, int]]:
        """``(i, j)`` of every block that is on, in the order of the factor."""
        return [(i, j) for i, row in enumerate(self.columns) for j in row]

    @property
    def parameters_per_rank(self) -> int:
        """``M + N``."""
        return self.M + self.N

    @property
    def max_rank(self) -> int:
        """``min(M, N)``."""
        return min(self.M, self.N)

    def factor_specs(self) -> dict[str, FactorSpec]:
        """``blocks (n P, Q)`` and, with a rank, ``left (M, R)`` and ``right (R, N)``."""
        P, Q = self.block_shape
        specs = {"blocks": FactorSpec((len(self.positions) * P, Q))}
        if self.rank:
            specs["left"] = FactorSpec((self.M, self.rank))
            specs["right"] = FactorSpec((self.rank, self.N))
        return specs

    def to_dense(self, factors: Factors) -> Tensor:
        """Zeros with the blocks in their places, plus the low-rank term."""
        (I, J), (P, Q) = self.blocks, self.block_shape
        rows, columns = zip(*self.positions, strict=True)
        blocks = factors["blocks"].view(-1, P, Q)
        grid = blocks.new_zeros(I, J, P, Q).index_put(
            (torch.tensor(rows, device=blocks.device), torch.tensor(columns, device=blocks.device)), blocks
        )
        W = grid.transpose(1, 2).reshape(self.M, self.N)
        return W + factors["left"] @ factors["right"] if self.rank else W

    def unrolled(self, factors: Factors, sums: bool = True) -> nn.Module:
        """One linear layer for each row of blocks, plus the two of the low-rank term."""
        counts = [len(row) for row in self.columns]
        blocks = factors["blocks"].view(-1, *self.block_shape).split(counts)
        chain = [factors["right"], factors["left"]] if self.rank else []
        return Rows(blocks, self.columns, self.blocks[1], chain)

    def matmul(self, x: Tensor, factors: Factors, algorithm: str = "") -> Tensor:
        """One batched product for each number of blocks in a row, plus the low-rank product."""
        y = block_sparse_matmul(
            x, factors["blocks"].view(-1, *self.block_shape), self.columns, self.blocks[1], algorithm
        )
        return y + low_rank_matmul(x, factors["left"], factors["right"]) if self.rank else y

    def _setting(self, name: str, value: Any) -> str:
        if name != "mask":
            return super()._setting(name, value)
        return f"{sum(row.count('1') for row in value)} of {len(value)} x {len(value[0])} blocks"

    def _random_factors(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        P, Q = self.block_shape
        share = 2 if self.rank else 1  # a low-rank term takes half of the variance, and all of it in an empty row
        counts = torch.tensor([len(row) for row in self.columns for _ in row], dtype=torch.float32)
        blocks = torch.randn(len(counts), P, Q, generator=generator)
        factors = {"blocks": (blocks / (3 * Q * share * counts).sqrt()[:, None, None]).view(-1, Q)}
        if self.rank:
            shares = torch.tensor([share if row else 1 for row in self.columns]).repeat_interleave(P)[:, None]
            factors["left"] = torch.randn(self.M, self.rank, generator=generator) / (3 * shares * self.rank).sqrt()
            factors["right"] = torch.randn(self.rank, self.N, generator=generator) / math.sqrt(self.N)
        return factors
