"""The candidates of an allocation: what each layer may become, with its cost and the error that is expected of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from structmat import _checks
from structmat.formats import Dense, Format
from structmat.plan import Rule, Selector, make_plan

RANK_MULTIPLE = 8
"""What ranks are rounded down to multiples of, where they are twice as large: products of such ranks are fastest."""

LEVELS = tuple(0.05 * k for k in range(3, 20))
"""The shares of a layer's parameters that are considered."""

UNITS = ("parameters", "multiplications", "bytes")
"""What a budget may count that has a name."""

Unit = str | Callable[[Format], float]
"""``"parameters"``, ``"multiplications"``, ``"bytes"``, or a function of a format, such as its time in seconds."""


@dataclass(frozen=True)
class Candidate:
    """What a layer may become.

    Attributes:
        format: The format; ``Dense`` for a layer that stays dense.
        cost: What it costs, in the unit of the budget.
        error: The squared relative error that is expected, in the metric of the layer.
    """

    format: Format
    cost: float
    error: float


def considered(
    model: nn.Module,
    rules: Sequence[Rule],
    layers: Sequence[Selector],
    *,
    blocks: int | tuple[int, int] | None,
    exclude: Selector | Iterable[Selector],
) -> tuple[list[dict[str, list[Format]]], dict[str, str]]:
    """Find the sizes of each structure that each layer could have.

    Args:
        model: The network.
        rules: The structures.
        layers: The selectors of the layers.
        blocks: The block counts of structures that have them, where a rule does not say.
        exclude: The selectors of layers to leave alone.

    Returns:
        The formats by layer for each structure, the smallest first; and why other layers fit none.
    """
    every: list[dict[str, list[Format]]] = []
    skipped: dict[str, str] = {}
    for rule in rules:
        own = blocks if rule.format.takes_blocks else None
        every.append({})
        for level in LEVELS:
            one = Rule(rule.format, level, rule.blocks, rule.options)
            plan = make_plan(model, dict.fromkeys(layers, one), keep=level, blocks=own, exclude=exclude, misfits="skip")
            skipped |= plan.skipped
            for name, format in plan.items():
                sizes = every[-1].setdefault(name, [])
                if _even(format) not in sizes:
                    sizes.append(_even(format))
        every[-1] = {name: sorted(sizes, key=lambda f: f.num_parameters()) for name, sizes in every[-1].items()}
    found = {name for one in every for name in one}
    return every, {name: why for name, why in skipped.items() if name not in found}


def _even(format: Format) -> Format:
    """The format with a rank that is a multiple of 8, where it has one of 16 or more."""
    rank = getattr(format, "rank", None)
    if not isinstance(rank, int) or rank < 2 * RANK_MULTIPLE:
        return format
    return replace(format, rank=rank // RANK_MULTIPLE * RANK_MULTIPLE)  # pyright: ignore - a dataclass with a rank


def price_of(unit: Unit, dtype_bytes: int = 4) -> Callable[[Format], float]:
    """What a format costs.

    Args:
        unit: What the budget counts.
        dtype_bytes: The size of a number of the network's weights, in bytes.

    Returns:
        The function of a format.
    """
    if callable(unit):
        return unit
    _checks.one_of(unit, UNITS, "unit")
    if unit == "multiplications":
        return lambda format: format.multiplications()
    if unit == "parameters":
        return lambda format: format.num_parameters()
    return lambda format: bytes_of(format, dtype_bytes)


def bytes_of(format: Format, dtype_bytes: int) -> float:
    """The bytes that the factors of a format take, with ``dtype_bytes`` for each number of the layer's dtype."""
    specs = format.factor_specs().values()
    return sum(math.prod(spec.shape) * (dtype_bytes if spec.dtype is None else spec.dtype.itemsize) for spec in specs)


def candidates(formats: Sequence[Format], errors: Sequence[float], price: Callable[[Format], float]) -> list[Candidate]:
    """What a layer may become.

    Args:
        formats: The formats, all of one shape.
        errors: The squared relative error that is expected in each.
        price: What a format costs.

    Returns:
        The candidates of which no other is both cheaper and better, the cheapest first and dense the last.
    """
    dense = Dense(formats[0].M, formats[0].N)
    found = [Candidate(one, price(one), error) for one, error in zip(formats, errors, strict=True)]
    return [*_worthwhile(found, price(dense)), Candidate(dense, price(dense), 0.0)]


def _worthwhile(candidates: Sequence[Candidate], most: float) -> list[Candidate]:
    """The candidates of which no other is both cheaper and better, the cheapest first."""
    kept: list[Candidate] = []
    for one in sorted(candidates, key=lambda one: (one.cost, one.error)):
        if one.cost < most and (not kept or one.error < kept[-1].error):
            kept.append(one)
    return kept
