"""How long a compression takes, from the cost model and a few seconds of measurement."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from structmat.compress.sequential import FORWARD_COST
from structmat.compress.tasks import MethodChoice, method_for
from structmat.fit import Method
from structmat.formats import Format

AWARE = ("metric_iterations", "iterations")
"""The settings that count what a fit repeats with a second moment alone."""

COUNTS = ("sweeps", *AWARE, "steps", "rounds")
"""The settings of methods that count what a fit repeats."""

MEASURED = 2
"""How many kinds of layers are measured, the most costly ones; the times of others follow from their costs."""

MOST_COST = 2e10
"""The most multiplications of a fit of one repetition that is measured; larger layers are measured smaller."""

SHORT = 0.2
"""The seconds below which a fit is measured with more repetitions, since a difference of a few would be noise."""

VECTORS = 1024
"""The number of vectors in the product that is timed for the passes through the network."""


@dataclass(frozen=True)
class Estimate:
    """How long the layers of a plan take.

    Attributes:
        fits: The seconds of all fits.
        passes: The seconds of all passes of data through the network; 0 without data.
    """

    fits: float
    passes: float

    @property
    def seconds(self) -> float:
        """The seconds of both."""
        return self.fits + self.passes

    def __str__(self) -> str:
        return duration(self.seconds)


def estimate(
    plan: Mapping[str, Format],
    *,
    method: MethodChoice = None,
    tokens: int = 0,
    refined: float = 0.0,
    device: torch.device | str = "cpu",
) -> Estimate:
    """Estimate how long ``compress_`` takes.

    Short fits of random weights are timed for the layers that cost most, and one product of matrices. The cost model
    does the rest.

    Args:
        plan: The format of each layer by name.
        method: The method of the fits, as for ``compress_``.
        tokens: The number of tokens of calibration data; 0 for none.
        refined: The number of passes over the data of a refinement, backward ones included.
        device: The device that computes.

    Returns:
        The estimate.
    """
    kinds: dict[Format, int] = {}
    for format in plan.values():
        if format.replaces:
            kinds[format] = kinds.get(format, 0) + 1
    if not kinds:
        return Estimate(0.0, 0.0)
    methods = {format: method_for(format, method) for format in kinds}
    costs = {format: methods[format].cost(format, aware=tokens > 0) for format in kinds}
    ranked = sorted(kinds, key=lambda format: -costs[format] * kinds[format])
    known = {f: fit_seconds(methods[f], f, aware=tokens > 0, device=device) for f in ranked[:MEASURED]}
    fits = 0.0
    for format, number in kinds.items():
        alike = min(known, key=lambda other: (type(other) is not type(format), abs(costs[other] - costs[format])))
        fits += number * known[alike] * costs[format] / costs[alike]
    work = sum(
        number * tokens * ((FORWARD_COST + refined) * format.M * format.N + 2 * format.N**2)
        for format, number in kinds.items()
    )
    return Estimate(fits, work * product_seconds(ranked[0], device) if work else 0.0)


def fit_seconds(method: Method[Any], format: Format, *, aware: bool, device: torch.device | str) -> float:
    """Measure how long one fit takes, from fits of few repetitions.

    Args:
        method: The method.
        format: The format.
        aware: Whether the second moment of the inputs is given.
        device: The device that computes.

    Returns:
        The seconds.
    """
    counts = {
        field.name: getattr(method, field.name)
        for field in dataclasses.fields(method)
        if field.name in COUNTS and (aware or field.name not in AWARE)
    }
    counts = {name: number for name, number in counts.items() if isinstance(number, int) and number > 1}
    once: dict[str, Any] = dict.fromkeys(counts, 1)
    single = replace(method, **once)
    smaller = format
    while single.cost(smaller, aware=aware) > MOST_COST and (half := _half(smaller)) is not None:
        smaller = half
    scale = method.cost(format, aware=aware) / method.cost(smaller, aware=aware)
    weight = torch.randn(smaller.shape, device=device, generator=_generator(device))
    moment = torch.eye(smaller.N, device=device, dtype=torch.float64) + 0.5 if aware else None
    _time(single, smaller, weight, moment)  # the first one prepares libraries
    first = _time(single, smaller, weight, moment)
    total = first
    for name, number in counts.items():
        extra = 2 if first > SHORT else min(number - 1, 20)
        more = _time(replace(method, **{**once, name: 1 + extra}), smaller, weight, moment)
        total += (number - 1) * max(0.0, more - first) / extra
    return total * scale


def _half(format: Format) -> Format | None:
    """The format of a layer half as large in both directions, with the same share; None where there is none."""
    blocks = getattr(format, "blocks", None)
    options = {"blocks": blocks} if isinstance(blocks, tuple) and all(isinstance(one, int) for one in blocks) else {}
    try:
        return type(format).for_budget(format.M // 2, format.N // 2, keep=format.keep, **options)
    except (TypeError, ValueError):
        return None


def _generator(device: torch.device | str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _time(method: Method[Any], format: Format, weight: torch.Tensor, moment: torch.Tensor | None) -> float:
    """The seconds of one fit."""
    start = time.perf_counter()
    method(weight, format, second_moment=moment)
    return time.perf_counter() - start


def product_seconds(format: Format, device: torch.device | str) -> float:
    """The seconds of one multiplication in a product of vectors with the dense matrix of a layer."""
    x = torch.randn(VECTORS, format.N, device=device)
    weight = torch.randn(format.N, format.M, device=device)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        float((x @ weight)[0, 0])  # waits for a GPU
        times.append(time.perf_counter() - start)
    return min(times[1:]) / (VECTORS * format.M * format.N)


def duration(seconds: float) -> str:
    """A time as text, rounded as an estimate is: ``40 s``, ``6 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{max(1, round(seconds, -1 if seconds >= 20 else 0)):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
