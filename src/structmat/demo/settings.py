"""What a run of the demo does."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from structmat.fit import DEFAULT_METHODS
from structmat.formats import FORMATS, Format, sized_formats
from structmat.plan import Plan, Rule, make_plan

LAYERS = r"blocks\..*"
"""The layers that are compressed, as a regular expression."""

BLOCKS = {"monarch": 4, "block_sparse": 8, "blast": 8}
"""The numbers of block rows and columns of each format at which the demo's accuracies were taken."""

OTHER_BLOCKS = 4
"""The number of block rows and columns of any other format that has blocks."""


def structures() -> dict[str, type[Format]]:
    """The formats that the demo can compare: those that a budget sizes, by name."""
    return {name: kind for name, kind in sized_formats().items() if kind.replaces}


def usual_structures() -> tuple[str, ...]:
    """The names of the formats that are compared by default: those with a method of their own."""
    return tuple(name for name, kind in structures().items() if kind in DEFAULT_METHODS)


def rule_for(name: str, keep: float | None = None) -> Rule:
    """The rule with which a format enters the demo."""
    kind = FORMATS[name]
    return Rule(kind, keep, BLOCKS.get(name, OTHER_BLOCKS) if kind.takes_blocks else None)


@dataclass(frozen=True)
class Settings:
    """What a run of the demo does.

    Attributes:
        keep: The largest share of the parameters of the linear layers, in both tables.
        formats: The names of the structures.
        seeds: How many times everything is done, from seed 0.
        out: The folder for pictures and results.
        quick: Whether there are fewer epochs and budgets: a look, not a comparison.
    """

    keep: float = 0.3
    formats: tuple[str, ...] = field(default_factory=usual_structures)
    seeds: int = 1
    out: Path = Path("structmat-demo")
    quick: bool = False

    @property
    def epochs(self) -> tuple[int, int]:
        """The numbers of epochs of training and of retraining."""
        return (8, 2) if self.quick else (30, 10)

    @property
    def keeps(self) -> tuple[float, ...]:
        """The budgets of the trade-off curve, in ascending order."""
        return (self.keep,) if self.quick else tuple(sorted({self.keep / 2, self.keep, min(2 * self.keep, 0.9)}))

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-compatible data, without the folder."""
        return json.loads(json.dumps({**asdict(self), "out": None}))


Key = tuple[str, float]
"""A structure's name and a budget."""


def plans_for(settings: Settings, model: nn.Module) -> tuple[dict[Key, Plan], dict[Key, str]]:
    """Plan every structure and budget.

    Args:
        settings: The structures and budgets.
        model: The dense network.

    Returns:
        The plans, and the reason where a structure does not fit a budget.

    Raises:
        ValueError: If no structure fits any budget.
    """
    plans: dict[Key, Plan] = {}
    refused: dict[Key, str] = {}
    for keep in settings.keeps:
        for name in settings.formats:
            try:
                plans[name, keep] = make_plan(model, {LAYERS: rule_for(name)}, keep=keep)
            except ValueError as error:
                refused[name, keep] = str(error)
    if not plans:
        raise ValueError("no structure fits the budget: " + "; ".join(f"{n}: {why}" for (n, _), why in refused.items()))
    return plans, refused
