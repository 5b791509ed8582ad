"""Formats whose structure is learned by gradient descent: what training needs of them."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from structmat.formats.base import Format

Unit = Literal["parameters", "multiplications", "width"]
"""What a budget counts; multiplications are those for one vector."""


@dataclass(frozen=True)
class LearnedSegments(Format):
    """A sum of ``K`` components on segments of both axes, whose widths and locations are learned.

    Among the factors are the parameters ``width`` and ``location``, both ``(2, K)`` in float32 and in units of the axis
    (row 0 the output, row 1 the input), and the buffer ``sigma (1,)``, the smoothing of the segments' edges, which a
    schedule sets. ``training.structure_step_`` keeps them within a budget, and ``hardened`` gives the format that
    remains in the end.

    Attributes:
        components: ``K``.
        least_width: The least width on the input axis, as a share of it, that a component keeps while it learns.
    """

    learns: ClassVar[bool] = True
    must_save: ClassVar[bool] = False
    counted_by: ClassVar[tuple[str, ...]] = ("location", "width", "sigma")
    drawn_by: ClassVar[tuple[str, ...]] = ("location", "width", "sigma")

    components: int

    @property
    @abc.abstractmethod
    def least_width(self) -> float:
        """The least width on the input axis, as a share of it, that a component keeps while it learns."""

    @abc.abstractmethod
    def rounded_widths(self, width: Tensor) -> Tensor:
        """Widths ``(2, K)`` in units of the axes as whole numbers of entries, ``(2, K)``."""

    @abc.abstractmethod
    def cost(self, width: Tensor, unit: Unit) -> Tensor:
        """The cost of components of these widths ``(2, K)``, without dimensions; one without a block costs nothing."""

    @abc.abstractmethod
    def dense_cost(self, unit: Unit) -> float:
        """The cost that the share of a budget is relative to."""
