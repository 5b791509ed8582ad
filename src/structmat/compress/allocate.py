"""One budget for the whole network: which layer gets which format, by what that does to the network's output."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from structmat import _checks
from structmat._tables import table_text
from structmat.compress.candidates import UNITS as UNITS
from structmat.compress.candidates import Candidate, Unit, fitted_library, library_method, plans_at, price_of
from structmat.compress.effects import Effect
from structmat.compress.search import Picks, Search
from structmat.compress.states import count_tokens
from structmat.compress.tasks import MethodChoice
from structmat.network.calls import device_of, evaluating, moved, undisturbed
from structmat.network.chain import find_chain
from structmat.network.sites import find_sites
from structmat.plan import FormatChoice, Plan, Rule, Selector, as_rule

LEVELS: dict[str, tuple[float, ...]] = {
    "quick": (0.3, 0.5, 0.7, 0.85),
    "default": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "best": (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
}
"""The shares of a layer's parameters at which it is fitted, by effort."""

ROUNDS = {"quick": 0, "default": 1, "best": 3}
"""How often layers are probed again within the compressed network, by effort."""

EXCHANGES = {"quick": 0, "default": 0, "best": 3}
"""How many exchanges are tried for each layer, by effort."""

PROBE_VECTORS = 4096
"""About how many tokens (or examples) an effect is measured on; whole batches are taken until there are as many."""


@dataclass(frozen=True)
class Choice:
    """What one layer got, and why.

    Attributes:
        sensitivity: The effect on the network's output for a squared relative error of 1 of this layer's output alone,
            as far as the effect grows with it.
        considered: The share of the dense cost and the predicted effect of everything that was considered.
        kept: The share of the dense cost that it got.
        predicted: The predicted effect of this layer alone.
    """

    sensitivity: float
    considered: tuple[tuple[str, float, float], ...]
    kept: float
    predicted: float


@dataclass(frozen=True)
class Allocation(Plan):
    """A plan that tells how it came about.

    Attributes:
        choices: What each layer got, and why, by name.
        unit: What the budget counts.
        kept: The share of the planned layers' dense cost that is left.
        effect: What was measured at the network's output.
        predicted: The sum of the effects that were predicted for the layers.
        measured: The effect of all layers together, with the fits that were made for the search.
    """

    choices: Mapping[str, Choice] = field(default_factory=dict)
    unit: str = "parameters"
    kept: float = 1.0
    effect: str = ""
    predicted: float = 0.0
    measured: float = 0.0

    def why(self) -> str:
        """Explain every layer: how sensitive it is, what was considered, what it got, and the predicted effect."""
        rows = [
            (
                name,
                f"{choice.sensitivity:.3g}",
                str(len(choice.considered)),
                str(self[name]),
                f"{choice.kept:.3f}",
                f"{choice.predicted:.3g}",
            )
            for name, choice in self.choices.items()
        ]
        total = ("all", "", "", f"{self.unit} kept", f"{self.kept:.3f}", f"{self.predicted:.3g}")
        head = ("layer", "sensitivity", "considered", "gets", "share", f"predicted {self.effect}")
        text = table_text(head, [*rows, ("",) * 6, total], right=(1, 2, 4, 5))
        return f"{text}\n\nmeasured with all layers together: {self.effect} {self.measured:.4g}"


def allocate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    keep: float = 0.5,
    structures: FormatChoice | Sequence[FormatChoice] = ("blast", "low_rank"),
    blocks: int | tuple[int, int] | None = 16,
    layers: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] = (),
    unit: Unit = "parameters",
    whole: bool = False,
    effort: str = "default",
    effect: Effect = "auto",
    method: MethodChoice = None,
    cache: Any = None,
    seed: int = 0,
    progress: bool = True,
) -> Allocation:
    """Share one budget among the layers of a network by what compressing them does to its output.

    Each layer is fitted at several sizes in every structure, with the second moments of its inputs. One size of each
    layer alone is put into the network, and the change of the output gives its sensitivity, since the change grows
    about as the squared error of the layer's output. Sizes are then chosen so that the sum of the predicted changes is
    least within the budget, a dense layer being one of the choices. Since errors of several layers
    interact, layers are probed again within the compressed network, and sizes chosen again; last, with the effort
    ``"best"``, exchanges between layers are tried on the joint effect.

    Args:
        model: The dense network; it is as before afterwards.
        batches: The calibration data, as for ``compress_``.
        keep: The share of the cost of the planned layers that is kept; with ``whole``, of all of the model.
        structures: What layers may become beside dense: formats, names or rules.
        blocks: The block counts of structures that have them, where a rule does not say.
        layers: Selectors of the layers that share the budget. None for those in the blocks of the network, without
            embeddings and head; or for all, where the network is no chain of blocks.
        exclude: Selectors of layers to leave alone.
        unit: What the budget counts: ``"parameters"``, ``"multiplications"``, or a function of a format, such as the
            seconds that its product takes.
        whole: Whether the budget is for all parameters of the model, those of other layers being spent already.
        effort: ``"quick"``, ``"default"`` or ``"best"``: how many sizes are fitted, how often layers are probed, and
            how many exchanges are tried.
        effect: What is measured at the output: see ``OutputEffect``.
        method: The method of the fits, as for ``compress_``; None for the default ones with fewer sweeps.
        cache: The folder for finished fits, as for ``compress_``; a second call with another budget takes them from it.
        seed: The seed of the exchanges.
        progress: Whether to show progress bars, with time estimates.

    Returns:
        The plan; ``print(plan.why())`` explains it.

    Raises:
        ValueError: If there are no batches, a setting is unknown, or the budget is below what the smallest sizes cost.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> plan = allocate(model, [torch.randn(256, 64) for _ in range(4)], keep=0.5, blocks=4, progress=False)
        >>> plan.kept <= 0.5
        True
    """
    _checks.one_of(effort, LEVELS, "effort")
    _checks.fraction(keep, "keep")
    given = list(batches)
    if not given:
        raise ValueError("expected at least one batch of calibration data, got none")
    with undisturbed(), evaluating(model):
        wanted = _selected(model, given[0], layers)
        rules = [as_rule(one) for one in ([structures] if isinstance(structures, (str, type, Rule)) else structures)]
        plans = plans_at(model, rules, wanted, LEVELS[effort], blocks=blocks, exclude=exclude)
        price = price_of(unit)
        library, skipped = fitted_library(model, given, plans, price, method or library_method, cache, progress)
        dense = sum(options[-1].cost for options in library.values())
        budget = _budget(model, library, keep, dense, unit, whole)
        search = Search(model, _few(given), library, budget, effect)
        found = search.run(ROUNDS[effort], EXCHANGES[effort] * len(library), seed, progress)
    return _allocation(search, found, skipped, unit if isinstance(unit, str) else "cost")


def _selected(model: nn.Module, batch: Any, layers: Selector | Iterable[Selector] | None) -> list[Selector]:
    """The selectors of the layers that share the budget."""
    if layers is not None:
        return [layers] if isinstance(layers, (str, type)) else list(layers)
    names = {name: site.names for name, site in find_sites(model).items() if not site.problem}
    chain = find_chain(model, names, moved(batch, device_of(model)))
    return [".*"] if chain is None else [rf"(?:{'|'.join(map(re.escape, chain.names))})\..*"]


def _budget(
    model: nn.Module, library: Mapping[str, Sequence[Candidate]], keep: float, dense: float, unit: Unit, whole: bool
) -> float:
    """The cost that all layers together may have."""
    budget = keep * dense * (1 + 1e-12)
    if whole:
        if unit != "parameters":
            raise ValueError(f"expected the unit 'parameters' for a budget of the whole model, got {unit!r}")
        total = sum(parameter.numel() for parameter in model.parameters())
        budget = keep * total - (total - dense)
    least = sum(min(one.cost for one in options) for options in library.values())
    if budget < least:
        raise ValueError(
            f"expected a budget of at least {least:,.0f}, which the smallest sizes of all layers cost, got "
            f"{budget:,.0f}; raise keep"
        )
    return budget


def _few(batches: Sequence[Any]) -> list[Any]:
    """Batches from all over the data, with about as many tokens or examples as an effect is measured on."""
    order = list(range(len(batches)))
    random.Random(0).shuffle(order)
    taken: list[int] = []
    vectors = 0
    for i in order:
        taken.append(i)
        vectors += count_tokens(batches[i], example=1)
        if vectors >= PROBE_VECTORS:
            break
    return [batches[i] for i in sorted(taken)]


def _allocation(search: Search, picks: Picks, skipped: Mapping[str, str], unit: str) -> Allocation:
    """The plan, with the reasons."""
    choices: dict[str, Choice] = {}
    for name, options in search.library.items():
        weight, whole = search.sensitivity[name], options[-1].cost
        considered = tuple((str(one.format), one.cost / whole, weight * one.error) for one in options)
        _, kept, predicted = considered[picks[name]]
        choices[name] = Choice(weight, considered, kept, predicted)
    return Allocation(
        {name: search.library[name][pick].format for name, pick in picks.items()},
        skipped,
        choices,
        unit,
        search.cost(picks) / sum(options[-1].cost for options in search.library.values()),
        search.output.name,
        sum(choice.predicted for choice in choices.values()),
        search.measured,
    )
