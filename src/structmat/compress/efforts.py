"""Efforts: how much work a compression takes, as a word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from structmat.fit import Lee2024Blast, Method, default_method
from structmat.formats import Blast, Format


@dataclass(frozen=True)
class Effort:
    """How much work a compression takes.

    Attributes:
        blast: The method of BLAST fits; other structures have one method for all efforts.
        curves: The method of BLAST fits that show how errors fall with the size.
        sizes: How many sizes of each structure these are.
        each: Whether they are made for each layer, and not for one of each kind.
        gradients: About how many tokens (or examples) gradients are gathered on, in whole batches.
        moments: About how many tokens (or examples) the second moments of inputs are gathered on for an allocation.
    """

    blast: Lee2024Blast
    curves: Lee2024Blast
    sizes: int
    each: bool
    gradients: int
    moments: int

    def method(self, format: Format) -> Method[Any]:
        """The method that fits a format."""
        return self.blast if isinstance(format, Blast) else default_method(format)

    def curve_method(self, format: Format) -> Method[Any]:
        """The method of the fits that show how errors fall."""
        return self.curves if isinstance(format, Blast) else default_method(format)


EFFORTS = {
    "quick": Effort(
        blast=Lee2024Blast(sweeps=25, metric_iterations=20),
        curves=Lee2024Blast(sweeps=25, metric_iterations=20),
        sizes=2,
        each=False,
        gradients=8192,
        moments=16384,
    ),
    "default": Effort(
        blast=Lee2024Blast(),
        curves=Lee2024Blast(sweeps=25, metric_iterations=40),
        sizes=3,
        each=False,
        gradients=8192,
        moments=32768,
    ),
    "best": Effort(
        blast=Lee2024Blast(sweeps=100, metric_iterations=200),
        curves=Lee2024Blast(sweeps=25, metric_iterations=40),
        sizes=4,
        each=True,
        gradients=16384,
        moments=32768,
    ),
}
"""Every effort by name. ``benchmarks/recipes.py`` shows what each costs, and what it gains."""
