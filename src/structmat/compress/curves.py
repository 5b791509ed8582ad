"""How the errors of layers fall with the size of a structure, before any of them is fitted for good."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from structmat.compress.spectra import TYPICAL, Spectrum
from structmat.compress.store import FitStore
from structmat.compress.tasks import FitBar, MethodChoice, Task, WorkList, fit_batches, method_for
from structmat.formats import Format, LowRank
from structmat.network.sites import Site

LEAST_ERROR = 1e-12
"""The least squared relative error that is told from 0."""

Sizes = Mapping[str, Sequence[Format]]
"""The sizes of one structure that each layer could have, by name, the smallest first."""


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """What layers that are alike in all blocks of a network share: the name without numbers, and the shape."""
    return f"{re.sub('[0-9]+', '#', name)} {shape}"


def stand_ins(sites: Mapping[str, Site], each: bool) -> dict[str, str]:
    """The layer that stands for each one: the middle one of its kind, or each for itself."""
    kinds: dict[str, list[str]] = {}
    for name, site in sites.items():
        kinds.setdefault(name if each else kind_of(name, tuple(site.matrix.shape)), []).append(name)
    return {name: names[len(names) // 2] for names in kinds.values() for name in names}


@dataclass(frozen=True)
class Curves:
    """The errors of all layers in all sizes.

    A low-rank error is in the layer's own spectrum. Other structures are fitted to one layer of each kind, in a few
    sizes; another layer of the kind has that layer's curve, times the ratio of their low-rank errors at one size. On
    SmolLM2-135M such ratios are within 20 % of fitted ones.

    Attributes:
        sites: The layers that stand for others, by name.
        spectra: The spectra of all layers; those of layers that stand for others have moments.
        gradients: The second moments of the gradients at the outputs.
        standing: The layer that stands for each.
        method: The method of the fits.
        store: Where fits are kept; None for nowhere.
    """

    sites: Mapping[str, Site]
    spectra: Mapping[str, Spectrum]
    gradients: Mapping[str, Tensor]
    standing: Mapping[str, str]
    method: MethodChoice
    store: FitStore | None

    def errors(self, structures: Sequence[Sizes], samples: int, progress: bool) -> list[dict[str, list[float]]]:
        """Find the squared relative errors, in the metric of each layer.

        Args:
            structures: The sizes of each structure.
            samples: How many sizes of each structure are fitted to the layers that stand for others.
            progress: Whether to show a progress bar.

        Returns:
            The errors by layer for each structure, in the order of the sizes.
        """
        points = self._points(structures, samples, progress)
        return [
            {
                name: [self._error(name, format, points.get((number, self.standing[name]), [])) for format in sizes]
                for name, sizes in structure.items()
            }
            for number, structure in enumerate(structures)
        ]

    def _error(self, name: str, format: Format, curve: Sequence[tuple[float, float]]) -> float:
        """The squared relative error that is expected of a layer in a format."""
        own = self.spectra[name]
        if isinstance(format, LowRank):
            return own.tails[min(format.rank, len(own.tails) - 1)]
        other = self.spectra[self.standing[name]].tail(TYPICAL)
        ratio = own.tail(TYPICAL) / other if other > LEAST_ERROR else 1.0
        return min(1.0, ratio * interpolated(curve, format.keep))

    def _points(
        self, structures: Sequence[Sizes], samples: int, progress: bool
    ) -> dict[tuple[int, str], list[tuple[float, float]]]:
        """Shares and squared relative errors of the fits, by the structure's number and the layer."""
        tasks = [
            (number, self._task(name, format))
            for number, structure in enumerate(structures)
            for name in dict.fromkeys(self.standing.values())
            for format in _spread(structure.get(name, ()), samples)
            if not isinstance(format, LowRank)
        ]
        found: dict[tuple[int, str], list[tuple[float, float]]] = {}
        with FitBar({"fits": sum(task.cost for _, task in tasks)}, progress) as bar:
            fits = fit_batches([[task] for _, task in tasks], bar, self.store)
            for (number, task), (fit,) in zip(tasks, fits, strict=True):
                error = (fit.loss_error or 0.0) ** 2
                found.setdefault((number, task.name), []).append((task.format.keep, error))
        return found

    def _task(self, name: str, format: Format) -> Task:
        method = method_for(format, self.method)
        work = WorkList({name: self.sites[name]}, {name: format}, {name: method}, self.gradients)
        return work.task(name, moments=self.spectra[name].moments)


def _spread(formats: Sequence[Format], count: int) -> list[Format]:
    """A few of the formats: the second smallest, the second largest, and others evenly between."""
    if len(formats) <= count:
        return list(formats)
    first, last = 1, len(formats) - 2
    return [formats[round(first + (last - first) * k / max(count - 1, 1))] for k in range(count)]


def interpolated(curve: Sequence[tuple[float, float]], share: float) -> float:
    """The squared error at a share, on straight lines through the logarithms of those that are known.

    Args:
        curve: Shares and squared errors.
        share: The share.

    Returns:
        The error; the first and the last line go on beyond the ends.
    """
    points = sorted((s, math.log(max(error, LEAST_ERROR))) for s, error in curve)
    if len(points) == 1:
        return math.exp(points[0][1])
    k = next((k for k in range(1, len(points) - 1) if share <= points[k][0]), len(points) - 1)
    (a, low), (b, high) = points[k - 1], points[k]
    return math.exp(low + (high - low) * (share - a) / (b - a))
