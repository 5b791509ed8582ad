"""The plan: which modules of a network get which format, fully resolved."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from structmat import _checks
from structmat._files import parse_json, read_json, write_atomically
from structmat.formats import Format, format_named
from structmat.formats.registry import formats_from_json
from structmat.network.selecting import Selector, fault, matches, spell
from structmat.network.sites import Site, find_sites
from structmat.network.staying import what_stays
from structmat.nn import StructuredModule

SCHEMA_VERSION = 1
"""The version of the JSON form of a plan."""

UNPICKED = "it is excluded, or no rule picks it"
"""Why a layer that could be structured stays dense."""


@dataclass(frozen=True, init=False)
class Rule:
    """What to make of the layers that a selector picks.

    Args:
        format: The class of the format, or its name.
        keep: The share of the dense parameters; None for the plan's.
        blocks: The block counts; None for the plan's.
        options: Further arguments of the format's ``for_budget``.

    Attributes:
        format: The class of the format.

    Raises:
        TypeError: If the format is neither a class of a format nor a name.
        ValueError: If the name is unknown, no budget can size the format, or a number is out of range.

    Example:
        >>> Rule("blast", keep=0.3, blocks=(4, 8)).format.__name__
        'Blast'
    """

    format: type[Format]
    keep: float | None
    blocks: int | tuple[int, int] | None
    options: Mapping[str, Any]

    def __init__(
        self,
        format: type[Format] | str,
        keep: float | None = None,
        blocks: int | tuple[int, int] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        kind = format_named(format) if isinstance(format, str) else format
        if not (isinstance(kind, type) and issubclass(kind, Format)):
            raise TypeError(f"expected a format class such as Blast, or its name, got {format!r}")
        if not hasattr(kind, "for_budget"):
            raise ValueError(
                f"expected a format that a budget can size, got {kind.__name__}, which is made from another"
            )
        if keep is not None:
            _checks.fraction(keep, "keep")
        if blocks is not None and not kind.takes_blocks:
            raise ValueError(f"expected no blocks for {kind.__name__}, whose budget alone decides, got {blocks}")
        for name, value in {"format": kind, "keep": keep, "blocks": blocks, "options": dict(options or {})}.items():
            object.__setattr__(self, name, value)

    def completed(self, keep: float, blocks: int | tuple[int, int] | None) -> Rule:
        """Fill in what the rule leaves to the plan.

        Args:
            keep: The plan's share of the dense parameters.
            blocks: The plan's block counts; None for none.

        Returns:
            The complete rule.

        Raises:
            ValueError: If the format needs block counts and there are none.
        """
        own = self.blocks if self.blocks is not None or not self.format.takes_blocks else blocks
        if own is None and self.needs_blocks:
            raise ValueError(f"expected blocks for {self.format.__name__}, in make_plan or in a Rule, got none")
        return Rule(self.format, keep if self.keep is None else self.keep, own, self.options)

    @property
    def needs_blocks(self) -> bool:
        """Whether the format needs block counts and the options have none."""
        option = self.format.budget_options().get("blocks")
        return option is not None and option.default is inspect.Parameter.empty and "blocks" not in self.options

    def format_for(self, M: int, N: int) -> Format:
        """Find the largest member of the format that this rule allows for a matrix.

        Args:
            M: The rows of the matrix.
            N: The columns of the matrix.

        Returns:
            The format.

        Raises:
            ValueError: If the rule says no ``keep``, or no ``blocks`` where they are needed, the budget allows no
                member, or it would not save parameters.
        """
        if self.keep is None:
            raise ValueError(f"expected a keep in the rule for {self.format.__name__}, got none")
        options = dict(self.options)
        if self.blocks is not None:
            options["blocks"] = self.blocks
        elif self.needs_blocks:
            raise ValueError(f"expected blocks in the rule for {self.format.__name__}, got none")
        format = self.format.for_budget(M, N, keep=self.keep, **options)
        format.check_saves()
        return format


FormatChoice = type[Format] | str | Rule
"""What a layer is to become: the class or the name of a format, or a rule."""


@dataclass(frozen=True)
class Plan(Mapping[str, Format]):
    """``{module name: format}``, with the layers that were asked for and left out.

    Attributes:
        layers: The format of each layer by name.
        skipped: The reason why a layer that a selector picked has no format, by name.
        stays: The reason why anything else in the network that holds parameters stays dense, by name; what is alike is
            together. Plans that were not made from a network have none.
        two_sided: Whether fits are meant to weigh errors by gradients too, as those of ``allocate`` are.
    """

    layers: Mapping[str, Format]
    skipped: Mapping[str, str] = field(default_factory=dict)
    two_sided: bool = field(default=False, compare=False)
    stays: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        wrong = [name for name, format in self.layers.items() if not isinstance(format, Format)]
        if wrong:
            raise TypeError(f"expected a format for every layer, got {self.layers[wrong[0]]!r} for {wrong[0]!r}")
        object.__setattr__(self, "layers", dict(self.layers))
        object.__setattr__(self, "skipped", dict(self.skipped))

    def __getitem__(self, name: str) -> Format:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        width = max((len(name) for name in (*self.layers, *self.skipped, *self.stays)), default=0)
        lines = [f"{name:<{width}}  {format}  keep {format.keep:.3f}" for name, format in self.layers.items()]
        lines += [f"{name:<{width}}  skipped: {reason}" for name, reason in self.skipped.items()]
        lines += [f"{name:<{width}}  stays dense: {reason}" for name, reason in self.stays.items()]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The plan as JSON text."""
        layers = {name: format.to_json() for name, format in self.layers.items()}
        facts = {"schema": SCHEMA_VERSION, "layers": layers, "skipped": dict(self.skipped)}
        facts |= {"stays": dict(self.stays)} if self.stays else {}
        return json.dumps(facts | ({"two_sided": True} if self.two_sided else {}), indent=1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a JSON file, in one step.

        Args:
            path: The file; an existing one is replaced.
        """
        text = self.to_json() + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that ``save`` wrote.

        Args:
            path: The file.

        Returns:
            The plan.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not the JSON of a plan; the message names the file.
        """
        data = read_json(path, "a plan, as Plan.save writes it,")
        with _checks.about(os.fspath(path)):
            return cls.from_data(data)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what ``to_json`` wrote; ``from_data`` says what is refused."""
        return cls.from_data(parse_json(text, "a plan"))

    @classmethod
    def from_data(cls, data: Any) -> Plan:
        """Read what the JSON of a plan holds.

        Args:
            data: The parsed JSON.

        Returns:
            The plan.

        Raises:
            ValueError: If it is not that of a plan, or of a schema this version does not know.
        """
        found = _checks.fields(data, {"schema": int, "layers": dict, "skipped": dict}, "the JSON of a plan")
        if found["schema"] != SCHEMA_VERSION:
            raise ValueError(f"expected a plan of schema {SCHEMA_VERSION}, got {found['schema']}; update structmat")
        skipped = _checks.values(found["skipped"], str, "'skipped' of the plan")
        two_sided = _checks.typed(data.get("two_sided", False), bool, "'two_sided' of the plan")
        stays = _checks.values(
            _checks.typed(data.get("stays", {}), dict, "'stays' of the plan"), str, "'stays' of the plan"
        )
        return cls(formats_from_json(found["layers"]), skipped, two_sided, stays)


def make_plan(
    model: nn.Module,
    rules: FormatChoice | Mapping[Selector, FormatChoice],
    *,
    keep: float = 0.5,
    blocks: int | tuple[int, int] | None = None,
    exclude: Selector | Iterable[Selector] = (),
    misfits: str = "error",
) -> Plan:
    """Resolve selectors to the layers of a network, and budgets to ranks.

    The candidates are the linear layers and convolutions that hold a dense weight, also those in the place of modules
    that hold several matrices, such as ``attention.q_proj`` of an ``nn.MultiheadAttention``; the name and the type of
    such a module pick all of its parts. A weight that several modules share is one candidate under its first name. The
    first rule that matches a layer decides.

    Args:
        model: The network; it is only looked at, and may live on the meta device.
        rules: What to make of the layers that each selector picks: a format's class or name, or a ``Rule``. One of
            these alone is for all layers.
        keep: The share of the dense parameters that a layer keeps where its rule does not say.
        blocks: The block counts, for the formats that have them, where the rule does not say.
        exclude: Selectors of layers to leave alone.
        misfits: ``"error"``, or ``"skip"`` for leaving layers alone that their format does not fit; they are named in
            ``Plan.skipped`` and in the report.

    Returns:
        The plan.

    Raises:
        ValueError: If a selector picks nothing, a rule decides nothing, a layer does not fit, blocks are missing, or
            ``misfits`` is unknown.
        TypeError: If a rule is neither a format nor a ``Rule``.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 10))
        >>> print(make_plan(model, {"0": "blast", nn.Linear: "low_rank"}, keep=0.5, blocks=4, exclude=["3"]))
        0  Blast(M=64, N=64, blocks=(4, 4), rank=14)  keep 0.492
        2  LowRank(M=32, N=64, rank=10)  keep 0.469
        3  stays dense: it is excluded, or no rule picks it
        >>> len(make_plan(model, "low_rank", keep=0.5))
        3
    """
    _checks.one_of(misfits, ("error", "skip"), "misfits")
    _checks.fraction(keep, "keep")
    given = rules if isinstance(rules, Mapping) else {".*": rules}
    resolved = {selector: as_rule(rule).completed(keep, blocks) for selector, rule in given.items()}
    exclude = [exclude] if isinstance(exclude, (str, type)) else list(exclude)
    sites = find_sites(model)
    deciders = {name: _decider(site, resolved, exclude) for name, site in sites.items()}
    _check_selectors(sites, resolved, exclude, deciders)
    layers: dict[str, Format] = {}
    skipped: dict[str, str] = {}
    for name, site in sites.items():
        selector = deciders[name]
        if selector is None:
            continue
        try:
            format = _format_of(site, resolved[selector])
        except ValueError as error:
            if misfits == "error":
                raise ValueError(
                    f"layer {name!r} does not fit: {error}. Give it another rule, exclude it, or pass misfits='skip'"
                ) from error
            skipped[name] = str(error)
            continue
        if format is not None:
            layers[name] = format
    return Plan(layers, skipped, stays=what_stays(model, {*layers, *skipped}, UNPICKED))


def _format_of(site: Site, rule: Rule) -> Format | None:
    """The format of one layer; None for a layer that stays as it was and is no plain matrix."""
    if not rule.format.replaces:
        return None if site.problem else rule.format(*site.matrix.shape)
    if site.problem:
        raise ValueError(site.problem)
    M, N = site.matrix.shape
    return rule.format_for(M, N)


def _check_selectors(
    sites: Mapping[str, Site],
    rules: Mapping[Selector, Rule],
    exclude: Iterable[Selector],
    deciders: Mapping[str, Selector | None],
) -> None:
    """Refuse a selector that picks no layer, and a rule that decides none."""
    for selector in (*rules, *exclude):
        if not any(matches(selector, site) for site in sites.values()):
            raise ValueError(
                f"expected {spell(selector)} to pick a dense linear layer or convolution, but it picks none"
                f"{fault(selector)}; there are: {', '.join(sites) or 'none'}"
            )
    for selector in rules:
        if selector not in deciders.values():
            raise ValueError(
                f"expected {spell(selector)} to decide a layer, but all that it picks are excluded or taken by an "
                "earlier rule; put special rules before general ones"
            )


def as_rule(choice: FormatChoice) -> Rule:
    """Turn a format's class or name into a rule.

    Args:
        choice: The class, the name, or a rule.

    Returns:
        The rule.

    Raises:
        TypeError: If it is something else.
    """
    if isinstance(choice, (str, type)):
        return Rule(choice)
    if not isinstance(choice, Rule):
        raise TypeError(f"expected a format class, the name of a format, or a Rule, got {choice!r}")
    return choice


def _decider(site: Site, rules: Mapping[Selector, Rule], exclude: Iterable[Selector]) -> Selector | None:
    """Find the selector of the rule that decides a site, if any does."""
    if any(matches(selector, site) for selector in exclude):
        return None
    return next((selector for selector in rules if matches(selector, site)), None)


def plan_of(model: nn.Module) -> Plan:
    """Find the plan that the structured layers of a network follow.

    Args:
        model: The network.

    Returns:
        The format of each structured layer; a layer that several names share is there under the first.
    """
    layers: dict[str, StructuredModule] = {}
    seen: set[tuple[int, ...]] = set()
    for name, module in model.named_modules():
        if isinstance(module, StructuredModule):
            shared = tuple(id(factor) for factor in module.factors.values())
            if shared not in seen:
                seen.add(shared)
                layers[name] = module
    return Plan({name: module.format for name, module in layers.items()})
