"""The candidates of an allocation: what each layer may become, fitted, with its cost and its error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from structmat import _checks
from structmat.compress.calibration import calibrate
from structmat.compress.store import FitStore
from structmat.compress.tasks import FitBar, MethodChoice, WorkList, fit_tasks, with_bias
from structmat.fit import Fit, Lee2024Blast, Method, default_method
from structmat.formats import Blast, Dense, Format
from structmat.plan import Plan, Rule, Selector, make_plan

RANK_MULTIPLE = 8
"""What ranks are rounded down to multiples of, where they are twice as large: products of such ranks are fastest."""

UNITS = ("parameters", "multiplications")
"""What a budget may count that has a name."""

Unit = str | Callable[[Format], float]
"""``"parameters"``, ``"multiplications"``, or a function of a format, such as its time in seconds."""


@dataclass(frozen=True)
class Candidate:
    """What a layer may become.

    Attributes:
        format: The format; ``Dense`` for a layer that stays dense.
        cost: What it costs, in the unit of the budget.
        error: The squared relative error of the layer's output.
        fit: The fit; None for a dense layer.
    """

    format: Format
    cost: float
    error: float
    fit: Fit | None = None


def library_method(format: Format) -> Method[Any]:
    """The method of the fits that are compared: the default one, for BLAST with about a quarter of its work."""
    return Lee2024Blast(sweeps=25, metric_sweeps=10) if isinstance(format, Blast) else default_method(format)


def plans_at(
    model: nn.Module,
    rules: Sequence[Rule],
    layers: Sequence[Selector],
    levels: Sequence[float],
    *,
    blocks: int | tuple[int, int] | None,
    exclude: Selector | Iterable[Selector],
) -> list[Plan]:
    """The plan of every structure at every level, in which layers that do not fit are missing."""
    plans: list[Plan] = []
    for rule in rules:
        for level in levels:
            one = Rule(rule.format, level, rule.blocks, rule.options)
            own = blocks if rule.format.takes_blocks else None
            plan = make_plan(model, dict.fromkeys(layers, one), keep=level, blocks=own, exclude=exclude, misfits="skip")
            plans.append(Plan({name: _even(format) for name, format in plan.items()}, plan.skipped))
    return plans


def _even(format: Format) -> Format:
    """The format with a rank that is a multiple of 8, where it has one of 16 or more."""
    rank = getattr(format, "rank", None)
    if not isinstance(rank, int) or rank < 2 * RANK_MULTIPLE:
        return format
    return replace(format, rank=rank // RANK_MULTIPLE * RANK_MULTIPLE)  # pyright: ignore - a dataclass with a rank


def price_of(unit: Unit) -> Callable[[Format], float]:
    """What a format costs."""
    if callable(unit):
        return unit
    _checks.one_of(unit, UNITS, "unit")
    return (lambda format: format.num_parameters()) if unit == "parameters" else lambda format: format.multiplications()


def fitted_library(
    model: nn.Module,
    batches: Sequence[Any],
    plans: Sequence[Plan],
    price: Callable[[Format], float],
    method: MethodChoice,
    cache: Any,
    progress: bool,
) -> tuple[dict[str, list[Candidate]], dict[str, str]]:
    """Fit every layer in every plan: the candidates of each, dense the last of them, and what fits no structure."""
    formats = {name: format for plan in plans for name, format in plan.items()}
    skipped = {name: why for plan in plans for name, why in plan.skipped.items() if name not in formats}
    moments = calibrate(model, batches, formats, progress=progress)
    works = [WorkList.of(model, plan, method) for plan in plans]
    works[0].check_weights()
    store = FitStore(cache) if cache is not None else None
    library: dict[str, list[Candidate]] = {name: [] for name in formats}
    with FitBar(sum(work.cost(name, aware=True) for work in works for name in work.sites), progress) as bar:
        for work in works:
            tasks = [work.task(name, moments=moments[name]) for name in work.sites]
            for name, fit in fit_tasks(tasks, bar, store).items():
                fitted = with_bias(fit, work.sites[name], moments[name])
                library[name].append(Candidate(fit.format, price(fit.format), (fit.output_error or 0.0) ** 2, fitted))
    for name, format in formats.items():
        dense = Dense(format.M, format.N)
        library[name] = [*_worthwhile(library[name], price(dense)), Candidate(dense, price(dense), 0.0)]
    return library, skipped


def _worthwhile(candidates: Sequence[Candidate], most: float) -> list[Candidate]:
    """The candidates of which no other is both cheaper and better, the cheapest first."""
    kept: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: (one.cost, one.error)):
        if one.cost < most and (not kept or one.error < kept[-1].error):
            kept.append(one)
    return kept
