"""How long a compression takes, from the cost model and a few seconds of measurement."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from structmat.compress.curves import kind_of
from structmat.compress.efforts import EFFORTS, Effort
from structmat.compress.flow import Flow
from structmat.compress.sequential import FORWARD_COST
from structmat.compress.spectra import spectrum, spectrum_cost
from structmat.compress.tasks import MethodChoice, method_for
from structmat.fit import Method
from structmat.fit.moments import Moments
from structmat.formats import Format, LowRank
from structmat.network.sites import find_sites

AWARE = ("metric_iterations", "iterations")
"""The settings that count what a fit repeats with a second moment alone."""

COUNTS = ("sweeps", *AWARE, "steps", "rounds")
"""The settings of methods that count what a fit repeats."""

FINDING_COST = 2
"""About how many calls of the whole network on one batch it takes to find its blocks."""

BACKWARD_COST = 2.5
"""About how many forward passes it takes to gather gradients: one forward, and one back to the outputs of layers."""

TYPICAL_SHARES = (0.2, 0.9)
"""About which shares of the parameters the smallest and the largest structures have that an allocation fits."""

MEASURED = 2
"""How many kinds of layers are measured, the most costly ones; the times of others follow from their costs."""

MOST_COST = 2e10
"""The most multiplications of a fit of one repetition that is measured; larger layers are measured smaller."""

SHORT = 0.2
"""The least seconds that repetitions have to add; a smaller difference would be noise, so that more are measured."""

FEW = 8
"""The repetitions of one kind that precede those of another, at least: a descent has to begin near to a fit."""

LONG = 1.0
"""About how many seconds the repetitions take that precede those of another kind, where there are as many."""

VECTORS = 1024
"""The number of vectors in the product that is timed for the passes through the network."""


@dataclass(frozen=True)
class Estimate:
    """How long the layers of a plan take.

    Attributes:
        fits: The seconds of all fits.
        passes: The seconds of all passes of data through the network; 0 without data.
        sharing: The seconds that it takes to share the budget among the layers; 0 where that is not done.
        beside: The seconds of everything else, such as loading the model.
    """

    fits: float
    passes: float
    sharing: float = 0.0
    beside: float = 0.0

    @property
    def seconds(self) -> float:
        """The seconds of everything."""
        return self.fits + self.passes + self.sharing + self.beside

    def __str__(self) -> str:
        return duration(self.seconds)


@dataclass(frozen=True)
class DataSize:
    """How much calibration data there is, and how fast it flows through the network.

    Attributes:
        tokens: The number of tokens (or of vectors that layers see) without padding.
        units: The number of tokens with padding, or of other examples.
        flow: The seconds that one of these takes; None where that is not known.
        held_out: The number of units on which the network is measured before and after.
        batches: The number of batches, of which an allocation takes whole ones.
    """

    tokens: int
    units: int = 0
    flow: Flow | None = None
    held_out: int = 0
    batches: int = 1

    def about(self, tokens: int) -> float:
        """The number of units in as many whole batches as have a number of tokens."""
        each = max(1.0, self.tokens / self.batches)
        return min(self.batches, math.ceil(tokens / each)) / self.batches * self.units


def estimate(
    plan: Mapping[str, Format],
    *,
    method: MethodChoice = None,
    data: DataSize | None = None,
    refined: float = 0.0,
    shared: bool = False,
    effort: str = "default",
    device: torch.device | str = "cpu",
) -> Estimate:
    """Estimate how long ``compress_`` takes.

    Short fits of random weights are timed for the layers that cost most, and one product of matrices. The cost model
    does the rest.

    Args:
        plan: The format of each layer by name.
        method: The method of the fits, as for ``compress_``.
        data: The calibration data; None for none.
        refined: The number of passes over the data of a refinement, backward ones included.
        shared: Whether ``allocate`` shares the budget among the layers before.
        effort: The effort, as for ``compress_``.
        device: The device that computes.

    Returns:
        The estimate.
    """
    planned = {name: format for name, format in plan.items() if format.replaces}
    if not planned:
        return Estimate(0.0, 0.0)
    formats, aware = Counter(planned.values()), data is not None
    method = method or EFFORTS[effort].method
    timed = _timed(formats, method, aware, device)
    fits = sum(number * _scaled(timed, format, method, aware) for format, number in formats.items())
    if data is None:
        return Estimate(fits, 0.0)
    sharing = _sharing(planned, data, timed, EFFORTS[effort], device) if shared else 0.0
    if data.flow is not None:
        beside = 2 * data.held_out + FINDING_COST * data.units / data.batches
        passes = data.units * data.flow.in_sequence(list(planned), refined) + beside * data.flow.forward
        return Estimate(fits, passes, sharing)
    largest = max(planned.values(), key=lambda format: format.M * format.N)
    work = sum((FORWARD_COST + refined) * format.M * format.N + 2 * format.N**2 for format in planned.values())
    return Estimate(fits, data.tokens * work * product_seconds(largest, device), sharing)


@dataclass(frozen=True)
class Timed:
    """Fits of one format whose time was measured.

    Attributes:
        format: The format.
        seconds: The seconds of one fit.
        cost: Its cost in the cost model.
    """

    format: Format
    seconds: float
    cost: float


def _timed(formats: Mapping[Format, int], choice: MethodChoice, aware: bool, device: torch.device | str) -> list[Timed]:
    """Time fits of the formats that cost most, each of which is needed as often as its number says."""
    methods = {format: method_for(format, choice) for format in formats}
    costs = {format: methods[format].cost(format, aware=aware) for format in formats}
    ranked = sorted(formats, key=lambda format: -costs[format] * formats[format])
    return [
        Timed(one, fit_seconds(methods[one], one, aware=aware, device=device), costs[one]) for one in ranked[:MEASURED]
    ]


def _scaled(timed: Sequence[Timed], format: Format, choice: MethodChoice, aware: bool) -> float:
    """The seconds of a fit, from those of the fit that was timed and is most like it."""
    cost = method_for(format, choice).cost(format, aware=aware)
    alike = min(timed, key=lambda one: (type(one.format) is not type(format), abs(one.cost - cost)))
    return alike.seconds * cost / alike.cost


def _sharing(
    planned: Mapping[str, Format], data: DataSize, timed: Sequence[Timed], effort: Effort, device: torch.device | str
) -> float:
    """The seconds in which an allocation gathers gradients and moments, decomposes weights, and fits stand-ins."""
    kinds = {name if effort.each else kind_of(name, format.shape): format for name, format in planned.items()}
    low, high = TYPICAL_SHARES
    shares = [low + (high - low) * k / (effort.sizes - 1) for k in range(effort.sizes)]
    sized = (_sized(format, keep) for format in kinds.values() for keep in shares)
    fitted = [format for format in sized if format is not None and not isinstance(format, LowRank)]
    fits = sum(_scaled(timed, format, effort.curve_method, True) for format in fitted)
    largest = max(planned.values(), key=lambda format: format.M * format.N)
    decomposed = sum(spectrum_cost(*format.shape) for format in planned.values()) * _spectrum_seconds(largest, device)
    with_gradients, with_moments = data.about(effort.gradients), data.about(effort.moments)
    outer = sum(format.M**2 for format in planned.values()) * product_seconds(largest, device)
    gathered = with_gradients * outer
    if data.flow is not None:
        forward = data.flow.forward
        gathered += with_gradients * BACKWARD_COST * forward
        gathered += with_moments * (forward + data.flow.moments(list(planned)))
    return fits + decomposed + gathered


def _spectrum_seconds(format: Format, device: torch.device | str) -> float:
    """The seconds of one multiplication in the decomposition of a weight, which is measured smaller if it is large."""
    M, N = format.shape
    while spectrum_cost(M, N) > MOST_COST / 4:
        M, N = (M + 1) // 2, (N + 1) // 2
    site = next(iter(find_sites(nn.Sequential(nn.Linear(N, M, bias=False, device=device))).values()))
    moment = torch.eye(N, dtype=torch.float64, device=device) + 0.5
    moments = Moments(N, moment, moment.new_zeros(N))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        spectrum(site, moments, None)
        times.append(time.perf_counter() - start)
    return min(times) / spectrum_cost(M, N)


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
    first = _time(single, smaller, weight, moment)
    if first < LONG:  # of which some prepares libraries
        first = min(_time(single, smaller, weight, moment) for _ in range(2))
    total = first
    for name, number in counts.items():
        extra, more = 0, first
        while extra < number - 1 and more - first < max(SHORT, first / 4):
            extra = min(number - 1, max(2, 3 * extra))
            more = _time(replace(method, **{**once, name: 1 + extra}), smaller, weight, moment)
        each = max(1e-9, more - first) / extra
        total += (number - 1) * each
        once[name] = min(number, max(FEW, int(LONG / each)))  # what comes next begins where these end
        first = _time(replace(method, **once), smaller, weight, moment) if name != list(counts)[-1] else first
    return total * scale


def _half(format: Format) -> Format | None:
    """The format of a layer half as large in both directions, with the same share; None where there is none."""
    return _sized(format, format.keep, (format.M // 2, format.N // 2))


def _sized(format: Format, keep: float, shape: tuple[int, int] | None = None) -> Format | None:
    """A format like another one, with a share of the parameters, perhaps of another shape; None where there is none."""
    blocks = getattr(format, "blocks", None)
    options = {"blocks": blocks} if isinstance(blocks, tuple) and all(isinstance(one, int) for one in blocks) else {}
    try:
        return type(format).for_budget(*(shape or format.shape), keep=keep, **options)
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
