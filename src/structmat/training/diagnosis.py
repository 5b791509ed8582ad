"""Warnings of what goes wrong while a structure is learned, before it has cost the training."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from structmat.formats import Unit
from structmat.ops import gaudi_mask
from structmat.training.learning import Layer, StructureLearning, excess, grouped, read_layers, share_of

MANY_DEAD = 0.5
"""The share of the components without a block above which there is a warning."""

CLIFF = 0.1
"""The excess over the budget, relative to it, up to which the last phase may begin without a warning."""

SMEARED = 0.1
"""The share of a matrix' energy outside its segments, at the end of the smoothing, above which there is a warning."""

STRIDES = 64
"""The number of parts in which the shrinkage until the last phase is predicted; the continuous rule changes it."""


@torch.no_grad()
def structure_warnings(
    model: nn.Module,
    settings: StructureLearning,
    rates: float,
    vectors: Mapping[str, float] | None = None,
) -> dict[str, str]:
    """Look for signs that the structure is not learned as it should be.

    - ``"dead"``: more than ``MANY_DEAD`` of the components have no block, or a layer has none that does.
    - ``"cliff"``: the shrinkage that is left until the last phase brings the cost only to more than ``1 + CLIFF`` times
      the budget, so that the last phase takes off the rest at once. What gradients do to the widths is left out, and
      so is the rule ``"shrink"``, which is never over the budget.
    - ``"smeared"``: where the schedule of the smoothing ends, masks of the present widths have more than ``SMEARED`` of
      their energy outside their segments, in the median component; the last phase cuts that off at once.

    Args:
        model: The network; its parameters may be sharded ``DTensor``, and every process then has to call this.
        settings: The settings with which the structure is learned.
        rates: The learning rates of the structural parameters, summed over the steps until the last phase; 0 in it.
        vectors: The number of vectors that each layer sees in a call, by name, for ``"multiplications"``.

    Returns:
        A sentence for each of these that is there, by its name; empty where all is well.

    Raises:
        ValueError: If there is no Gaudi-GBLR layer, a target's pattern matches none, the vectors of one are missing, or
            the rates are negative.

    Example:
        >>> from structmat import GaudiGblr, StructuredLinear
        >>> model = nn.Sequential(StructuredLinear(GaudiGblr.for_budget(64, 64, keep=0.5)))
        >>> list(structure_warnings(model, StructureLearning(0.25, shrinkage=0.04), rates=0.1))
        ['cliff']
        >>> structure_warnings(model, StructureLearning(0.25, shrinkage=4.0), rates=0.1)
        {}
    """
    if not rates >= 0:
        raise ValueError(f"expected a sum of learning rates of at least 0, got {rates}")
    layers = read_layers(model, settings.unit, vectors)
    groups = grouped(layers, settings.targets)
    found = {
        "dead": _dead(layers),
        "cliff": None if settings.rule == "shrink" else _cliff(groups, settings, rates),
        "smeared": None if settings.sigma is None else _smeared(layers, settings.sigma[1]),
    }
    return {name: text for name, text in found.items() if text is not None}


def _dead(layers: list[Layer]) -> str | None:
    dead = [layer.dead for layer in layers]
    components = [layer.format.components for layer in layers]
    empty = [layer.name for layer, count, all_ in zip(layers, dead, components, strict=True) if count == all_]
    share = sum(dead) / sum(components)
    if share <= MANY_DEAD and not empty:
        return None
    where = f", and no component of {_some(empty)} has one" if empty else ""
    return (
        f"{share:.0%} of the components have no block{where}; lower the learning rate of widths and locations or the "
        "shrinkage, or begin with fewer components"
    )


def _cliff(groups: list[tuple[float, list[Layer]]], settings: StructureLearning, rates: float) -> str | None:
    for target, group in groups:
        expected = _expected(group, settings, target, rates)
        if expected <= (1 + CLIFF) * target:
            continue
        enough = excess(group, settings.unit, target) / rates if rates else math.inf
        remedy = f"raise shrinkage to about {enough:.2g}" if settings.rule == "switch" and rates else "raise shrinkage"
        return (
            f"the layers with a budget of {target:g} are at {share_of(group, settings.unit):.3f} and expected at "
            f"{expected:.3f} when the last phase begins, which takes off the rest at once; {remedy}, raise the "
            "learning rate of the widths, or begin nearer to the budget"
        )
    return None


def _expected(group: list[Layer], settings: StructureLearning, target: float, rates: float) -> float:
    """The share of the dense cost once these learning rates are spent."""
    unit: Unit = settings.unit
    amount = 0.0
    for _ in range(STRIDES):
        amount += settings.strength(share_of(group, unit, amount), target) * rates / STRIDES
    return share_of(group, unit, amount)


def _smeared(layers: list[Layer], sigma: float) -> str | None:
    outside = {layer.name: energy_outside(layer.format.shape, layer.entries, sigma) for layer in layers}
    worst = max(outside, key=lambda name: outside[name])
    if outside[worst] <= SMEARED:
        return None
    return (
        f"masks of the present widths have {outside[worst]:.0%} of their energy outside their segments in {worst} "
        f"where the smoothing ends, at sigma {sigma:g}, and lose it when the last phase begins; let sigma end higher"
    )


def energy_outside(shape: tuple[int, int], entries: Tensor, sigma: float) -> float:
    """Measure how much of a component of median widths lies outside its segments.

    Args:
        shape: ``(M, N)``.
        entries: Widths ``(2, K)`` in whole entries.
        sigma: The width of the smoothing.

    Returns:
        The share of the squared norm of the outer product of its masks; 0 without a component that has a block.
    """
    alive = entries[:, (entries > 0).all(0)].double().cpu()
    if alive.shape[1] == 0:
        return 0.0
    inside = 1.0
    smoothing = torch.tensor([sigma], dtype=torch.float64)
    for n, widths in zip(shape, alive, strict=True):
        width = widths.median()
        mask = gaudi_mask(width[None] / n, torch.zeros(1, dtype=torch.float64), smoothing, n)[0].square()
        inside *= float(mask[: int(width)].sum() / mask.sum())
    return 1 - inside


def _some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
