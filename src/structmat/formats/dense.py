"""The dense matrix as a format, for layers that a plan leaves alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat import _checks
from structmat.formats.base import Factors, FactorSpec, Format
from structmat.formats.unrolled import Chain


@dataclass(frozen=True)
class Dense(Format):
    """A dense matrix with the one factor ``weight (M, N)``.

    Attributes:
        M: The number of out features.
        N: The number of in features.
    """

    name: ClassVar[str] = "dense"
    scale_exponents: ClassVar[dict[str, float]] = {"weight": 1.0}
    must_save: ClassVar[bool] = False
    replaces: ClassVar[bool] = False

    def factor_specs(self) -> dict[str, FactorSpec]:
        """``weight (M, N)``."""
        return {"weight": FactorSpec((self.M, self.N))}

    @classmethod
    def for_budget(cls, M: int, N: int, *, keep: float, **options: Any) -> Dense:
        """The dense format, which fits only the whole budget.

        Args:
            M: The number of out features.
            N: The number of in features.
            keep: The share of the dense parameters, which must be 1.
            **options: Any option is an error.

        Returns:
            The format.

        Raises:
            ValueError: If ``keep`` is below 1 or an option is given.
        """
        if _checks.fraction(keep, "keep") < 1 or options:
            raise ValueError(f"expected keep=1 and no options for a dense matrix, got keep={keep}, {options}")
        return cls(M, N)

    def to_dense(self, factors: Factors) -> Tensor:
        """The weight itself."""
        return factors["weight"]

    def part(self, factors: Factors, axis: int, index: int, count: int) -> tuple[Dense, dict[str, Tensor]]:
        """Some rows or columns of the weight."""
        weight = factors["weight"].chunk(count, axis)[index]
        return Dense(*weight.shape), {"weight": weight}

    def unrolled(self, factors: Factors, sums: bool = True) -> nn.Module:
        """One linear layer."""
        return Chain(factors["weight"])

    def matmul(self, x: Tensor, factors: Factors, algorithm: str = "") -> Tensor:
        """``x @ weight.T``."""
        return F.linear(x, factors["weight"])

    def _random_factors(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        return {"weight": torch.randn(self.M, self.N, generator=generator) / math.sqrt(3 * self.N)}
