"""Another structure plus a matrix of low rank: what an adapter leaves behind when it is merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.formats.base import Factors, FactorSpec, Format
from structmat.formats.blast import Blast
from structmat.formats.low_rank import LowRank
from structmat.formats.registry import format_from_json
from structmat.ops.low_rank import low_rank_matmul

TERM = ("merged_left", "merged_right")
"""The factors of the low-rank term."""


@dataclass(frozen=True)
class Merged(Format):
    """``W = base + merged_left @ merged_right``, for a structure that has no room for a change of low rank itself.

    Attributes:
        M: The number of out features.
        N: The number of in features.
        base: The other format, whose factors keep their names; its JSON form is taken too.
        rank: ``R`` of the term.

    Raises:
        ValueError: If the other format has another shape, still learns its structure or has such a term already, or
            the rank is out of range.
    """

    base: Format
    rank: int

    name: ClassVar[str] = "merged"
    label: ClassVar[str] = "merged"
    scale_exponents: ClassVar[dict[str, float]] = {}
    must_save: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.base, Mapping):
            object.__setattr__(self, "base", format_from_json(self.base))
        if not isinstance(self.base, Format) or self.base.shape != self.shape:
            raise ValueError(f"expected a base of shape {self.shape}, got {self.base}")
        if self.base.learns or isinstance(self.base, Merged):
            remedy = "harden_ the network first" if self.base.learns else "it has a low-rank term already"
            raise ValueError(f"expected a base with a final structure, got {self.base}; {remedy}")
        _checks.positive_int(self.rank, "rank")
        if self.rank > min(self.shape):
            raise ValueError(f"expected a rank of at most min(M, N) = {min(self.shape)}, got {self.rank}")

    def factor_specs(self) -> dict[str, FactorSpec]:
        """The factors of the other format, ``merged_left (M, R)`` and ``merged_right (R, N)``."""
        left, right = FactorSpec((self.M, self.rank)), FactorSpec((self.rank, self.N))
        return {**self.base.factor_specs(), **dict(zip(TERM, (left, right), strict=True))}

    def check_factors(self, factors: Factors) -> None:
        """Check the factors of both parts."""
        super().check_factors(factors)
        self.base.check_factors(self._base_factors(factors))

    def _base_factors(self, factors: Factors) -> dict[str, Tensor]:
        return {name: factor for name, factor in factors.items() if name not in TERM}

    def to_dense(self, factors: Factors) -> Tensor:
        """The sum of both matrices."""
        return self.base.to_dense(self._base_factors(factors)) + factors[TERM[0]] @ factors[TERM[1]]

    def matmul(self, x: Tensor, factors: Factors, algorithm: str = "") -> Tensor:
        """The sum of both products."""
        base = self.base.matmul(x, self._base_factors(factors), algorithm)
        return base + low_rank_matmul(x, factors[TERM[0]], factors[TERM[1]])

    def num_parameters(self, factors: Factors | None = None) -> int:
        """The number of parameters of both parts."""
        own = None if factors is None else self._base_factors(factors)
        return self.base.num_parameters(own) + self.rank * (self.M + self.N)

    def multiplications(self, tokens: int = 1, factors: Factors | None = None) -> int:
        """The number of multiplications of both products."""
        own = None if factors is None else self._base_factors(factors)
        return self.base.multiplications(tokens, own) + tokens * self.rank * (self.M + self.N)

    def scaled(self, factors: Factors, scale: float | Tensor) -> dict[str, Tensor]:
        """Factors of ``scale * W``."""
        term = LowRank(self.M, self.N, self.rank)
        scaled = term.scaled({"left": factors[TERM[0]], "right": factors[TERM[1]]}, scale)
        base = self.base.scaled(self._base_factors(factors), scale)
        return {**base, TERM[0]: scaled["left"], TERM[1]: scaled["right"]}

    def _random_factors(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        term = LowRank(self.M, self.N, self.rank)._random_factors(generator)
        return {**self.base._random_factors(generator), TERM[0]: term["left"], TERM[1]: term["right"]}

    def settings(self) -> str:
        """The other format, and the rank that was added."""
        return f"{self.base.label} {self.base.settings()}, plus rank {self.rank}"

    def to_json(self) -> dict[str, Any]:
        """The format as JSON-compatible data, with the other format under ``"base"``."""
        return {"format": self.name, "M": self.M, "N": self.N, "base": self.base.to_json(), "rank": self.rank}


def plus_low_rank(format: Format, factors: Factors, left: Tensor, right: Tensor) -> tuple[Format, dict[str, Tensor]]:
    """Add ``left @ right`` to a structured matrix, exactly.

    A low-rank matrix and a BLAST matrix take it into their own factors; others get a term beside them.

    Args:
        format: The structure, which no longer learns.
        factors: Its factors.
        left: ``(M, r)``.
        right: ``(r, N)``.

    Returns:
        The new format and its factors.

    Raises:
        ValueError: If the structure is still learned.

    Example:
        >>> format = LowRank(8, 8, rank=2)
        >>> plus_low_rank(format, format.init(), torch.ones(8, 1), torch.ones(1, 8))[0]
        LowRank(M=8, N=8, rank=3)
    """
    r = left.shape[1]
    if isinstance(format, LowRank) and format.rank + r <= format.max_rank:
        both = {"left": torch.cat([factors["left"], left], 1), "right": torch.cat([factors["right"], right])}
        return LowRank(format.M, format.N, format.rank + r), both
    if isinstance(format, Blast):
        return _plus_blast(format, factors, left, right)
    if isinstance(format, Merged):
        rank = min(format.rank + r, *format.shape)
        both = (torch.cat([factors[TERM[0]], left], 1), torch.cat([factors[TERM[1]], right]))
        if rank < format.rank + r:
            return plus_low_rank(format.base, format._base_factors(factors), *_narrowed(*both))
        return Merged(format.M, format.N, format.base, rank), {**factors, **dict(zip(TERM, both, strict=True))}
    return Merged(format.M, format.N, format, r), {**factors, TERM[0]: left, TERM[1]: right}


def _plus_blast(format: Blast, factors: Factors, left: Tensor, right: Tensor) -> tuple[Blast, dict[str, Tensor]]:
    """A BLAST matrix with more components, whose couplings are 1."""
    (_, J), r = format.blocks, left.shape[1]
    Q = format.block_shape[1]
    columns = right.view(r, J, Q).transpose(0, 1)  # (J, r, Q)
    diag = factors["diag"]
    rows = torch.cat([factors["right"].view(J, format.rank, Q), columns], 1)
    new = {
        "left": torch.cat([factors["left"], left], 1),
        "diag": torch.cat([diag, diag.new_ones(len(diag), r)], 1),
        "right": rows.reshape(-1, Q),
    }
    return Blast(format.M, format.N, format.blocks, format.rank + r), new


def _narrowed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product through the shorter axis."""
    return (
        (left @ right, torch.eye(right.shape[1]).to(right))
        if len(left) >= right.shape[1]
        else (
            torch.eye(len(left)).to(left),
            left @ right,
        )
    )
