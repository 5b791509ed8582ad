"""The plan: which modules of a network get which format, fully resolved."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from structmat import _checks
from structmat.formats import Dense, Format, format_from_json
from structmat.network.sites import Site, find_sites
from structmat.nn import StructuredModule

SCHEMA_VERSION = 1
"""Of the JSON form of a plan."""

Selector = str | type[nn.Module]
"""A regular expression that must match a module's whole name, or a module type."""


@dataclass(frozen=True)
class Rule:
    """What to make of the layers that a selector picks.

    Attributes:
        format: The format.
        keep: Share of the dense parameters; None for the plan's.
        blocks: Block counts; None for the plan's.
        options: Further arguments of the format's ``for_budget``.

    Example:
        >>> from structmat import Blast
        >>> Rule(Blast, keep=0.3, blocks=(4, 8)).keep
        0.3
    """

    format: type[Format]
    keep: float | None = None
    blocks: int | tuple[int, int] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (isinstance(self.format, type) and issubclass(self.format, Format)):
            raise TypeError(f"expected a format class such as Blast, got {self.format!r}")
        if not hasattr(self.format, "for_budget"):
            raise ValueError(
                f"expected a format that a budget can size, got {self.format.__name__}, which is made from another"
            )
        if self.keep is not None:
            _checks.fraction(self.keep, "keep")
        if self.blocks is not None and not self.format.takes_blocks:
            raise ValueError(
                f"expected no blocks for {self.format.__name__}, whose budget alone decides, got {self.blocks}"
            )

    def format_for(self, M: int, N: int) -> Format:
        """The largest member of the format that this rule allows for a matrix.

        Args:
            M: Its rows.
            N: Its columns.

        Returns:
            The format.

        Raises:
            ValueError: If the rule says no ``keep``, or no ``blocks`` where they are needed, the budget allows no
                member, or it would not save parameters.
        """
        if self.keep is None:
            raise ValueError(f"expected a keep in the rule for {self.format.__name__}, got none")
        options = dict(self.options)
        if self.format.takes_blocks:
            if self.blocks is None:
                raise ValueError(f"expected blocks in the rule for {self.format.__name__}, got none")
            options["blocks"] = self.blocks
        format = self.format.for_budget(M, N, keep=self.keep, **options)
        format.check_saves()
        return format


@dataclass(frozen=True)
class Plan(Mapping[str, Format]):
    """``{module name: format}``, with the layers that were asked for and left out.

    Attributes:
        layers: The format of each layer.
        skipped: Why a layer that a selector picked is not among them.
    """

    layers: Mapping[str, Format]
    skipped: Mapping[str, str] = field(default_factory=dict)

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
        width = max((len(name) for name in (*self.layers, *self.skipped)), default=0)
        lines = [f"{name:<{width}}  {format}  keep {format.keep:.3f}" for name, format in self.layers.items()]
        lines += [f"{name:<{width}}  skipped: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The plan as JSON text."""
        layers = {name: format.to_json() for name, format in self.layers.items()}
        return json.dumps({"schema": SCHEMA_VERSION, "layers": layers, "skipped": dict(self.skipped)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what ``to_json`` wrote.

        Args:
            text: The JSON text.

        Returns:
            The plan.

        Raises:
            ValueError: If the text is not the JSON of a plan, or of a schema this version does not know.
        """
        try:
            data = json.loads(text)
            schema, layers, skipped = data["schema"], dict(data["layers"]), dict(data["skipped"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"expected the JSON of a plan with 'schema', 'layers' and 'skipped': {error!r}") from error
        if schema != SCHEMA_VERSION:
            raise ValueError(f"expected a plan of schema {SCHEMA_VERSION}, got {schema}; update structmat")
        wrong = next((name for name, value in layers.items() if not isinstance(value, dict)), None)
        if wrong is not None:
            raise ValueError(f"expected the JSON of a format for layer {wrong!r}, got {layers[wrong]!r}")
        return cls({name: format_from_json(value) for name, value in layers.items()}, skipped)


def make_plan(
    model: nn.Module,
    rules: Mapping[Selector, type[Format] | Rule],
    *,
    keep: float = 0.5,
    blocks: int | tuple[int, int] | None = None,
    exclude: Selector | Iterable[Selector] = (),
    misfits: str = "error",
) -> Plan:
    """Resolve selectors to the layers of a network, and budgets to ranks.

    The candidates are the linear layers and convolutions that hold a dense weight; a weight that several modules share
    is one candidate under its first name. The first rule that matches a layer decides.

    Args:
        model: The network; it is only looked at, and may live on the meta device.
        rules: What to make of the layers each selector picks.
        keep: Share of the dense parameters that a layer keeps where its rule does not say.
        blocks: Block counts, for the formats that have them, where the rule does not say.
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
        >>> from structmat import Blast, LowRank
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 10))
        >>> print(make_plan(model, {"0": Blast, nn.Linear: LowRank}, keep=0.5, blocks=4, exclude=["3"]))
        0  Blast(M=64, N=64, blocks=(4, 4), rank=14)  keep 0.492
        2  LowRank(M=32, N=64, rank=10)  keep 0.469
    """
    _checks.one_of(misfits, ("error", "skip"), "misfits")
    resolved = {selector: _as_rule(rule, keep, blocks) for selector, rule in rules.items()}
    exclude = [exclude] if isinstance(exclude, (str, type)) else list(exclude)
    sites = find_sites(model)
    deciders = {name: _decider(site, resolved, exclude) for name, site in sites.items()}
    for selector in (*resolved, *exclude):
        if not any(_matches(selector, site) for site in sites.values()):
            raise ValueError(
                f"expected {_spell(selector)} to pick a dense linear layer or convolution, but it picks none; "
                f"there are: {', '.join(sites) or 'none'}"
            )
    for selector in resolved:
        if selector not in deciders.values():
            raise ValueError(
                f"expected {_spell(selector)} to decide a layer, but all that it picks are excluded or taken by an "
                "earlier rule; put special rules before general ones"
            )
    layers: dict[str, Format] = {}
    skipped: dict[str, str] = {}
    for name, site in sites.items():
        selector = deciders[name]
        if selector is None:
            continue
        rule = resolved[selector]
        if rule.format is Dense:
            if not site.problem:
                layers[name] = Dense(*site.matrix.shape)
            continue
        try:
            if site.problem:
                raise ValueError(site.problem)
            M, N = site.matrix.shape
            layers[name] = rule.format_for(M, N)
        except ValueError as error:
            if misfits == "error":
                raise ValueError(
                    f"layer {name!r} does not fit: {error}. Give it another rule, exclude it, or pass misfits='skip'"
                ) from error
            skipped[name] = str(error)
    return Plan(layers, skipped)


def _as_rule(rule: type[Format] | Rule, keep: float, blocks: int | tuple[int, int] | None) -> Rule:
    if isinstance(rule, type) and issubclass(rule, Format):
        rule = Rule(rule)
    if not isinstance(rule, Rule):
        raise TypeError(f"expected a format class or a Rule, got {rule!r}")
    _checks.fraction(keep, "keep")
    if rule.format.takes_blocks and rule.blocks is None and blocks is None:
        raise ValueError(f"expected blocks for {rule.format.__name__}, in make_plan or in a Rule, got none")
    return Rule(
        rule.format,
        keep if rule.keep is None else rule.keep,
        blocks if rule.blocks is None and rule.format.takes_blocks else rule.blocks,
        rule.options,
    )


def _decider(site: Site, rules: Mapping[Selector, Rule], exclude: Iterable[Selector]) -> Selector | None:
    """The selector of the rule that decides a site, if any does."""
    if any(_matches(selector, site) for selector in exclude):
        return None
    return next((selector for selector in rules if _matches(selector, site)), None)


def _matches(selector: Selector, site: Site) -> bool:
    if isinstance(selector, str):
        return any(re.fullmatch(selector, name) for name in site.names)
    return isinstance(site.module, selector)


def _spell(selector: Selector) -> str:
    return repr(selector) if isinstance(selector, str) else selector.__name__


def plan_of(model: nn.Module) -> Plan:
    """The plan that the structured layers of a network follow.

    Args:
        model: The network.

    Returns:
        Format of each structured layer; one that several names share is there under the first.
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
