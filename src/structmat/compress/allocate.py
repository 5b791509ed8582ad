"""One budget for the whole network: which layer gets which format, by what that does to the network's output."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from structmat import _checks
from structmat._tables import table_text
from structmat.compress.candidates import UNITS as UNITS
from structmat.compress.candidates import Candidate, Unit, candidates, considered, price_of
from structmat.compress.effects import Effect
from structmat.compress.efforts import EFFORTS
from structmat.compress.search import Picks, Search
from structmat.compress.store import FitStore
from structmat.compress.survey import Network, Survey, WholeNetwork
from structmat.compress.tasks import MethodChoice
from structmat.fit import Fit
from structmat.network.calls import device_of, evaluating, moved, undisturbed
from structmat.network.chain import find_chain
from structmat.network.sites import find_sites
from structmat.network.splitting import unfused
from structmat.network.staying import what_stays
from structmat.plan import UNPICKED, FormatChoice, Plan, Rule, Selector, as_rule


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
    """

    choices: Mapping[str, Choice] = field(default_factory=dict)
    unit: str = "parameters"
    kept: float = 1.0
    effect: str = ""
    predicted: float = 0.0

    def why(self, fits: Mapping[str, Fit] | None = None) -> str:
        """Explain every layer: how sensitive it is, what was considered, what it got, and the predicted effect.

        Args:
            fits: What ``compress_`` returned for this plan, to set the effects of its errors beside the predictions;
                None for predictions alone.

        Returns:
            A table.
        """
        rows = []
        for name, choice in self.choices.items():
            row = (name, f"{choice.sensitivity:.3g}", str(len(choice.considered)), str(self[name]))
            rows.append((*row, f"{choice.kept:.3f}", f"{choice.predicted:.3g}", *self._measured(name, fits)))
        total = ("all", "", "", f"{self.unit} kept", f"{self.kept:.3f}", f"{self.predicted:.3g}")
        head = ("layer", "sensitivity", "considered", "gets", "share", f"predicted {self.effect}")
        if fits is not None:
            head, total = (*head, "measured"), (*total, f"{self.measured(fits):.3g}")
        return table_text(head, [*rows, ("",) * len(head), total], right=(1, 2, 4, 5, 6)[: len(head) - 2])

    def measured(self, fits: Mapping[str, Fit]) -> float:
        """The sum of the effects of the errors that fits have, by the sensitivities of the layers."""
        return sum(self._effect(name, fits) for name in self.choices)

    def _effect(self, name: str, fits: Mapping[str, Fit]) -> float:
        error = fits[name].loss_error if name in fits else None
        return self.choices[name].sensitivity * (error or 0.0) ** 2

    def _measured(self, name: str, fits: Mapping[str, Fit] | None) -> tuple[str, ...]:
        return () if fits is None else (f"{self._effect(name, fits):.3g}",)


@dataclass(frozen=True)
class AllocationSettings:
    """How a budget is shared; see ``allocate`` for what each setting means.

    Attributes:
        keep: The share of the cost that is kept.
        structures: What layers may become beside dense.
        blocks: The block counts of structures that have them.
        exclude: Selectors of layers to leave alone.
        unit: What the budget counts.
        whole: Whether the budget is for all parameters of the model.
        effort: How much is fitted and measured, as a word.
        effect: What is measured at the output.
        method: The method of the fits.
        seed: The seed of the labels that are drawn from the network.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If the effort is unknown or the share is none.
    """

    keep: float = 0.5
    structures: FormatChoice | Sequence[FormatChoice] = ("blast", "low_rank")
    blocks: int | tuple[int, int] | None = 16
    exclude: Selector | Iterable[Selector] = ()
    unit: Unit = "parameters"
    whole: bool = False
    effort: str = "default"
    effect: Effect = "auto"
    method: MethodChoice = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        _checks.one_of(self.effort, EFFORTS, "effort")
        _checks.fraction(self.keep, "keep")

    @property
    def rules(self) -> list[Rule]:
        """The structures as rules."""
        chosen = self.structures
        return [as_rule(one) for one in ([chosen] if isinstance(chosen, (str, type, Rule)) else chosen)]


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

    The effect of a layer's error is predicted from the second moments of its inputs and of the gradients at its output
    (K-FAC). How the error falls with the size comes from the layer's own spectrum, and from fits of every structure to
    one layer of each kind (``layers.#.mlp.up_proj``), or with the effort ``"best"`` to every layer. Sizes are chosen so
    that the sum of the predicted effects is least within the budget, a dense layer being one of the choices.
    Corrections by the joint effect of all layers made it worse, since compression in sequence repairs much of how
    errors interact.

    Args:
        model: The dense network; it is as before afterwards.
        batches: The calibration data, as for ``compress_``.
        keep: The share of the cost of the planned layers that is kept; with ``whole``, of all of the model.
        structures: What layers may become beside dense: formats, names or rules.
        blocks: The block counts of structures that have them, where a rule does not say.
        layers: Selectors of the layers that share the budget. None for those in the blocks of the network, without
            embeddings and head; or for all, where the network is no chain of blocks.
        exclude: Selectors of layers to leave alone.
        unit: What the budget counts: ``"parameters"``, ``"multiplications"``, ``"bytes"``, or a function of a format,
            such as ``structmat.bench.Seconds(tokens=[1])`` for the time that a product takes here.
        whole: Whether the budget is for all parameters of the model, those of other layers being spent already.
        effort: ``"quick"``, ``"default"`` or ``"best"``: to how many layers and sizes structures are fitted, and on how
            much data.
        effect: What is measured at the output: see ``OutputEffect``.
        method: The method of the fits, as for ``compress_``; None for the default ones with fewer sweeps.
        cache: The folder for finished fits, as for ``compress_``; a second call with another budget takes them, and
            the gradients' moments, from it.
        seed: The seed of the labels that are drawn from the network.
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
    settings = AllocationSettings(
        keep, structures, blocks, exclude, unit, whole, effort, effect, method, seed, progress
    )
    given = some_batches(batches)
    store = None if cache is None else FitStore(cache)
    with undisturbed(), evaluating(model), unfused(model):
        names = {name: site.names for name, site in find_sites(model).items() if not site.problem}
        chain = None if layers is not None else find_chain(model, names, moved(given[0], device_of(model)))
        chosen = selectors(layers, () if chain is None else chain.names)
        return allocated(WholeNetwork(model, given, store), chosen, settings, store)


def some_batches(batches: Iterable[Any]) -> list[Any]:
    """The batches as a list.

    Args:
        batches: The calibration data.

    Returns:
        The list.

    Raises:
        ValueError: If there are none.
    """
    given = list(batches)
    if not given:
        raise ValueError("expected at least one batch of calibration data, got none")
    return given


def selectors(layers: Selector | Iterable[Selector] | None, blocks: Sequence[str]) -> list[Selector]:
    """The selectors of the layers that share the budget.

    Args:
        layers: The caller's choice; None for the layers in the blocks of the network.
        blocks: The names of the blocks; none where the network is no chain of blocks, so that all layers are meant.

    Returns:
        The selectors.
    """
    if layers is not None:
        return [layers] if isinstance(layers, (str, type)) else list(layers)
    return [rf"(?:{'|'.join(map(re.escape, blocks))})\..*"] if blocks else [".*"]


def allocated(
    network: Network, layers: Sequence[Selector], settings: AllocationSettings, store: FitStore | None
) -> Allocation:
    """Survey a network and share its budget.

    Args:
        network: The network, in evaluation mode.
        layers: The selectors of the layers that share the budget.
        settings: How it is shared.
        store: Where fits and findings are kept; None for nowhere.

    Returns:
        The plan.
    """
    model, unit = network.model, settings.unit
    sizes, skipped = considered(model, settings.rules, layers, blocks=settings.blocks, exclude=settings.exclude)
    effort = EFFORTS[settings.effort]
    survey = Survey(network, sizes, settings.method, settings.effect, settings.seed, effort, store)
    found = survey.run(progress=settings.progress)
    price = price_of(unit, next((one.element_size() for one in model.parameters()), 4))
    formats = {name: [format for one in sizes for format in one.get(name, [])] for name in found.sensitivity}
    library = {name: candidates(formats[name], found.errors[name], price) for name in formats}
    dense = sum(one[-1].cost for one in library.values())
    search = Search(library, _budget(model, library, settings, dense), found.sensitivity)
    stays = what_stays(model, {*library, *skipped}, UNPICKED)
    counted = unit if isinstance(unit, str) else getattr(unit, "name", "cost")
    return _allocation(search, search.best(), (skipped, stays), counted, found.effect)


def _budget(
    model: nn.Module, library: Mapping[str, Sequence[Candidate]], settings: AllocationSettings, dense: float
) -> float:
    """The cost that all layers together may have."""
    budget = settings.keep * dense * (1 + 1e-12)
    if settings.whole:
        if settings.unit != "parameters":
            raise ValueError(f"expected the unit 'parameters' for a budget of the whole model, got {settings.unit!r}")
        total = sum(parameter.numel() for parameter in model.parameters())
        budget = settings.keep * total - (total - dense)
    least = sum(min(one.cost for one in options) for options in library.values())
    if budget < least:
        raise ValueError(
            f"expected a budget of at least {least:,.6g}, which the smallest sizes of all layers cost, got "
            f"{budget:,.6g}; raise keep"
        )
    return budget


def _allocation(
    search: Search, picks: Picks, reasons: tuple[Mapping[str, str], Mapping[str, str]], unit: str, effect: str
) -> Allocation:
    """The plan, with the reasons."""
    choices: dict[str, Choice] = {}
    for name, options in search.library.items():
        weight, whole = search.sensitivity[name], options[-1].cost
        considered = tuple((str(one.format), one.cost / whole, weight * one.error) for one in options)
        _, kept, predicted = considered[picks[name]]
        choices[name] = Choice(weight, considered, kept, predicted)
    return Allocation(
        {name: search.library[name][pick].format for name, pick in picks.items()},
        reasons[0],
        two_sided=True,
        stays=reasons[1],
        choices=choices,
        unit=unit,
        effect=effect,
        kept=search.cost(picks) / sum(options[-1].cost for options in search.library.values()),
        predicted=sum(choice.predicted for choice in choices.values()),
    )
