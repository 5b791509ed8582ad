"""Gaudi-GBLR matrices: sums of rank-1 blocks whose position and size are learned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.formats.base import Factors, FactorSpec
from structmat.formats.gblr import Gblr, even, from_segments
from structmat.formats.learned import LearnedSegments, Unit
from structmat.ops import gaudi_mask, low_rank_matmul
from structmat.ops.common import plain


@dataclass(frozen=True)
class GaudiGblr(LearnedSegments):
    """``K`` rank-1 blocks under differentiable masks (Gaudi-GBLR: Lee & Kim 2024, arXiv 2310.18882, section 3).

    ``W = sum_k (m_out_k * left_k) (m_in_k * right_k)^T``, where the masks of component ``k`` are those of
    ``ops.gaudi_mask`` at its two widths and locations, rounded to whole entries; gradients go straight through the
    rounding. Factors: the contents ``left (M, K)`` and ``right (K, N)`` in full length, ``location`` and ``width``
    ``(2, K)`` in units of the axis (row 0 the output, row 1 the input), always float32, and the buffer ``sigma (1,)``,
    which a schedule sets; infinite where the masks are plain boxcars.

    It is large while it learns; ``harden`` makes it a ``Gblr``, which holds what is inside the segments alone. Its
    parameters and multiplications are counted as those of that.

    Attributes:
        M: The number of out features.
        N: The number of in features.
        components: ``K``.
        initial_width: The mean width of a fresh init, as a share of each axis, in (0, 1].
        multiple: The grid on which segments begin and end, for hardware.

    Raises:
        ValueError: If a number is out of range, or ``multiple`` does not divide both axes.

    Example:
        >>> GaudiGblr.for_budget(512, 512, keep=0.25)
        GaudiGblr(M=512, N=512, components=512, initial_width=0.125, multiple=1)
    """

    initial_width: float = 1.0
    multiple: int = 1

    name: ClassVar[str] = "gaudi_gblr"
    label: ClassVar[str] = "Gaudi-GBLR"
    scale_exponents: ClassVar[dict[str, float]] = {"left": 1 / 2, "right": 1 / 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.positive_int(self.components, "components", _checks.MOST_COMPONENTS)
        _checks.fraction(self.initial_width, "initial_width")
        _checks.positive_int(self.multiple, "multiple")
        if self.M % self.multiple or self.N % self.multiple:
            known = _checks.listed_divisors(math.gcd(self.M, self.N), "; those are ")
            raise ValueError(f"expected a multiple that divides {self.M} and {self.N}, got {self.multiple}{known}")

    @classmethod
    def for_budget(cls, M: int, N: int, *, keep: float, components: int | None = None, multiple: int = 1) -> GaudiGblr:
        """The format whose fresh init has about ``keep M N`` parameters inside its segments, and at most those.

        Args:
            M: The number of out features.
            N: The number of in features.
            keep: The share of the dense parameters, in ``(0, 1]``.
            components: ``K``; None for ``min(M, N)``, as in the paper.
            multiple: The multiple of the format.

        Returns:
            The format.

        Raises:
            ValueError: If the budget gives the components less than one entry on each axis.
        """
        budget = _checks.budget(keep, M * N)
        K = min(M, N) if components is None else components
        _checks.positive_int(K, "components")
        format = cls(M, N, K, min(1.0, budget / (K * (M + N))), multiple)
        if not bool((format._initial_widths() > 0).all()):
            raise ValueError(
                f"expected a keep that gives each of {K} components at least one step of {multiple} entries on each "
                f"axis of a {M} x {N} matrix, got {keep}; raise keep or take fewer components"
            )
        return format

    def factor_specs(self) -> dict[str, FactorSpec]:
        """``left (M, K)``, ``right (K, N)``, ``location`` and ``width`` ``(2, K)``, ``sigma (1,)``."""
        K = self.components
        return {
            "left": FactorSpec((self.M, K)),
            "right": FactorSpec((K, self.N)),
            "location": FactorSpec((2, K), dtype=torch.float32),
            "width": FactorSpec((2, K), dtype=torch.float32),
            "sigma": FactorSpec((1,), trainable=False, dtype=torch.float32),
        }

    def segments(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """The segments in whole entries: ``start`` and ``width``, both ``(2, K)``, int64."""
        starts = [self._rounded_start(row.detach(), n) for row, n in zip(factors["location"], self.shape, strict=True)]
        return torch.stack(starts).long(), self.rounded_widths(factors["width"].detach()).long()

    def rounded_widths(self, width: Tensor) -> Tensor:
        """Widths ``(2, K)`` in entries, as real numbers: multiples of ``multiple``."""
        return torch.stack([self._rounded_width(row, n) for row, n in zip(width, self.shape, strict=True)])

    @property
    def least_width(self) -> float:
        """One step of the grid; a component without any width has no gradient."""
        return min(1.0, self.multiple / self.N)

    def hardened(self, factors: Factors) -> tuple[Gblr, dict[str, Tensor]]:
        """The GBLR matrix of what lies inside the segments, as ``harden`` makes it."""
        self.check_factors(factors)
        left, right = self.masked(factors)
        return from_segments(self.shape, left, right, *self.segments(factors))

    def overlap(self, factors: Factors) -> Tensor:
        """The map of the hardened matrix."""
        format, hardened = self.hardened(factors)
        return format.overlap(hardened)

    def _rounded_width(self, width: Tensor, n: int) -> Tensor:
        return (width * (n / self.multiple)).round().mul(self.multiple).clamp(0, n)

    def _rounded_start(self, location: Tensor, n: int) -> Tensor:
        start = ((location - location.floor()) * (n / self.multiple)).round().mul(self.multiple)
        return torch.where(start >= n, 0, start)

    def cost(self, width: Tensor, unit: Unit) -> Tensor:
        """The cost of components of these widths ``(2, K)``, without dimensions.

        Components without a block cost nothing, but count in the mean of ``"width"``.

        Args:
            width: The widths, in units of the axes.
            unit: The quantity to count.

        Returns:
            The number of entries inside the segments, or ``K`` times the mean width.
        """
        if unit == "width":
            return width.sum(dtype=torch.float64) / 2
        entries = self.rounded_widths(width).double()
        return (entries.sum(0) * (entries > 0).all(0)).sum()

    def dense_cost(self, unit: Unit) -> float:
        """The cost that the share of a budget is relative to: dense entries, or components of full width."""
        return self.components if unit == "width" else self.M * self.N

    def masks(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """The masks ``(K, M)`` and ``(K, N)`` at the rounded widths and locations, differentiable in both."""
        masks = []
        for axis, n in enumerate(self.shape):
            location, width = factors["location"][axis], factors["width"][axis]
            with torch.no_grad():
                start, entries = self._rounded_start(location, n), self._rounded_width(width, n)
            location = location + (start / n - location).detach()
            width = width + (entries / n - width).detach()
            masks.append(gaudi_mask(width, location, factors["sigma"], n))
        return masks[0], masks[1]

    def masked(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """The contents under their masks: ``left (M, K)`` and ``right (K, N)``."""
        left, right = factors["left"], factors["right"]
        out_mask, in_mask = self.masks(factors)
        return left * out_mask.mT.to(left.dtype), right * in_mask.to(right.dtype)

    def to_dense(self, factors: Factors) -> Tensor:
        """The sum of the masked components."""
        left, right = self.masked(factors)
        return left @ right

    def matmul(self, x: Tensor, factors: Factors, algorithm: str = "") -> Tensor:
        """Two products with the masked contents, or one with the dense matrix, whichever multiplies less."""
        left, right = self.masked(factors)
        if plain() or self._two_are_less(math.prod(x.shape[:-1])):  # a graph for all lengths has one way
            return low_rank_matmul(x, left, right)
        return x @ (left @ right).mT

    def _two_are_less(self, tokens: int) -> bool:
        """Whether two products multiply less than one with the dense matrix, which has to be made first."""
        return tokens * self.components * (self.M + self.N) <= (self.components + tokens) * self.M * self.N

    def num_parameters(self, factors: Factors | None = None) -> int:
        """The number of entries inside the segments, those of components without a block left out.

        Args:
            factors: None, or on the meta device, for those of a fresh init.

        Returns:
            The count.
        """
        if factors is None or factors["width"].is_meta:
            return int(self.cost(self._initial_widths() / torch.tensor(self.shape)[:, None], "parameters"))
        return int(self.cost(factors["width"].detach(), "parameters"))

    def multiplications(self, tokens: int = 1, factors: Factors | None = None) -> int:
        """The number of multiplications of the hardened matrix; training runs on full axes and takes more.

        Args:
            tokens: The number of input vectors.
            factors: None, or on the meta device, for those of a fresh init.

        Returns:
            The count.
        """
        return tokens * self.num_parameters(factors)

    def _initial_widths(self) -> Tensor:
        """Widths ``(2, K)`` in entries whose mean is ``initial_width``, rounded down, as equal as can be."""
        steps = [int(self.components * self.initial_width * n / self.multiple + 1e-9) for n in self.shape]
        return torch.stack([even(count, self.components) for count in steps]) * self.multiple

    def _random_factors(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        K, share = self.components, self.initial_width
        return {
            "left": torch.randn(self.M, K, generator=generator) / math.sqrt(3 * K * share),
            "right": torch.randn(K, self.N, generator=generator) / math.sqrt(self.N * share),
            "location": torch.rand(2, K, generator=generator),
            "width": self._initial_widths() / torch.tensor(self.shape)[:, None],
            "sigma": torch.full((1,), torch.inf),
        }
