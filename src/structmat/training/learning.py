"""Learning where the blocks of Gaudi-GBLR matrices are: a proximal step under one budget, a schedule of smoothing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from structmat import _checks
from structmat.formats import LearnedSegments, Unit
from structmat.nn import StructuredModule

RULES = ("switch", "continuous", "shrink")
"""The ways in which widths are held to the budget."""

BISECTIONS = 24
"""The number of halvings of the interval in which the amount lies that brings the widths within the budget."""


@dataclass(frozen=True)
class StructureLearning:
    """How the structure of Gaudi-GBLR layers is learned (Gaudi-GBLR: Lee & Kim 2024, section 4 and appendix).

    After every step of the optimizer the widths are soft-thresholded by ``strength * learning rate``, the proximal map
    of an l1 penalty, clamped to [0, 1], and the locations wrapped to [0, 1). While it learns, a component keeps at
    least one step of the grid on the input axis, since one without any width has no gradient. The strength is:

    - ``"switch"``: ``shrinkage`` while the budget is exceeded, else 0;
    - ``"continuous"``: ``shrinkage * ((share - target) / (1 - target)) ** power`` while it is exceeded;
    - ``"shrink"``: none; the same amount is taken off all widths, such that the budget is kept at every step.

    The last ``hard_share`` of the training runs without smoothing and takes off what exceeds the budget, so that it
    ends within it, ready to be hardened.

    Attributes:
        target: The budget, as a share of the dense cost: one number for the whole model, or one for each group of
            layers by a pattern that matches their whole names; the first that matches counts.
        unit: The quantity that costs: ``"parameters"``, ``"multiplications"`` (parameters times the vectors that a
            layer sees), or ``"width"``, the mean width over all components, as in the paper.
        rule: One of ``RULES``.
        shrinkage: The factor ``lambda`` of the strength.
        power: The exponent of the continuous rule.
        sigma: The smoothing at the start and at the end of its schedule, which is linear; None for none at all.
        hard_share: The share of the training, at its end, that runs without smoothing.

    Raises:
        ValueError: If a setting is out of range or unknown.
    """

    target: float | Mapping[str, float]
    unit: Unit = "parameters"
    rule: str = "switch"
    shrinkage: float = 0.04
    power: float = 1.0
    sigma: tuple[float, float] | None = (1.0, 100.0)
    hard_share: float = 0.1

    def __post_init__(self) -> None:
        for pattern, target in self.targets.items():
            _checks.fraction(target, f"the target of {pattern!r}")
        _checks.one_of(self.unit, get_args(Unit), "unit")
        _checks.one_of(self.rule, RULES, "rule")
        for name in ("shrinkage", "power"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} to be at least 0, got {getattr(self, name)}")
        if self.sigma is not None and not (len(self.sigma) == 2 and all(0 < s < math.inf for s in self.sigma)):
            raise ValueError(
                f"expected two positive, finite values of sigma, or None for no smoothing, got {self.sigma}"
            )
        if not 0 <= self.hard_share <= 1:
            raise ValueError(f"expected hard_share in [0, 1], got {self.hard_share}")

    @property
    def targets(self) -> Mapping[str, float]:
        """The target of each group by pattern."""
        return self.target if isinstance(self.target, Mapping) else {".*": self.target}

    def is_hard(self, progress: float) -> bool:
        """Whether the last phase has begun, ``progress`` being the share of the training that is done."""
        return progress >= 1 - self.hard_share

    def sigma_at(self, progress: float) -> float:
        """The smoothing once this share of the training is done; infinite for none."""
        if self.sigma is None or self.is_hard(progress):
            return float("inf")
        first, last = self.sigma
        return first + (last - first) * progress / (1 - self.hard_share)

    def strength(self, share: float, target: float) -> float:
        """The factor by which the learning rate is multiplied to give the threshold."""
        if self.rule == "shrink" or share <= target:
            return 0.0
        if self.rule == "switch":
            return self.shrinkage
        return self.shrinkage * ((share - target) / (1 - target)) ** self.power


@dataclass(frozen=True)
class StructureState:
    """The state of the learning of the structure.

    Attributes:
        share: The cost of all Gaudi-GBLR layers, as a share of the dense cost.
        layers: The cost of each layer, as a share of its dense cost.
        costs: The cost of each layer, as a share of the cost of all of them.
        dead: The share of the components without a block.
        sigma: The width of the smoothing.
        strength: The strength of the shrinkage, the largest over the groups.
    """

    share: float
    layers: Mapping[str, float]
    costs: Mapping[str, float]
    dead: float
    sigma: float
    strength: float = 0.0


def structure_layers(model: nn.Module) -> dict[str, StructuredModule]:
    """The Gaudi-GBLR layers of a network by name; layers that share their factors once.

    Args:
        model: The network.

    Returns:
        The layers.
    """
    layers: dict[str, StructuredModule] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, StructuredModule) or not isinstance(module.format, LearnedSegments):
            continue
        if id(module.width) not in seen:
            seen.add(id(module.width))
            layers[name] = module
    return layers


def set_sigma_(model: nn.Module, sigma: float) -> None:
    """Set the smoothing of every Gaudi-GBLR layer, in place.

    Args:
        model: The network.
        sigma: A positive number; infinite for no smoothing.

    Raises:
        ValueError: If it is not positive.
    """
    if not sigma > 0:
        raise ValueError(f"expected a positive sigma, got {sigma}")
    for layer in structure_layers(model).values():
        layer.get_buffer("sigma").fill_(sigma)


@torch.no_grad()
def structure_state(
    model: nn.Module, unit: Unit = "parameters", vectors: Mapping[str, float] | None = None
) -> StructureState:
    """Measure what the Gaudi-GBLR layers of a network cost now.

    Args:
        model: The network; its parameters may be sharded ``DTensor``.
        unit: The quantity that costs, as ``StructureLearning`` describes it.
        vectors: The number of vectors that each layer sees in a call, by name, for ``"multiplications"``.

    Returns:
        The state.

    Raises:
        ValueError: If there is no such layer, or the vectors of one are missing.
    """
    return _state(read_layers(model, unit, vectors), unit)


@torch.no_grad()
def structure_step_(
    model: nn.Module,
    settings: StructureLearning,
    learning_rate: float,
    progress: float,
    vectors: Mapping[str, float] | None = None,
) -> StructureState:
    """Take the proximal step that follows every step of the optimizer, in place.

    Every process of a distributed run computes the same from the whole widths.

    Args:
        model: The network; its parameters may be sharded ``DTensor``.
        settings: The settings with which the structure is learned.
        learning_rate: The learning rate of the structural parameters in this step.
        progress: The share of the training that is done, from 0 to 1; it sets the smoothing for the next step.
        vectors: The number of vectors that each layer sees in a call, by name, for ``"multiplications"``.

    Returns:
        The state after the step.

    Raises:
        ValueError: If there is no Gaudi-GBLR layer, a target's pattern matches none, or the vectors of one are missing.
    """
    layers = read_layers(model, settings.unit, vectors)
    strongest = 0.0
    for target, group in grouped(layers, settings.targets):
        share = share_of(group, settings.unit)
        strength = settings.strength(share, target)
        strongest = max(strongest, strength)
        amount = strength * learning_rate
        if settings.rule == "shrink" or settings.is_hard(progress):
            amount = max(amount, excess(group, settings.unit, target))
        for layer in group:
            layer.shrink(amount)
    sigma = settings.sigma_at(progress)
    for layer in layers:
        layer.write(sigma)
    state = _state(layers, settings.unit)
    return StructureState(state.share, state.layers, state.costs, state.dead, sigma, strongest)


class Layer:
    """The structural parameters of one layer, whole; this and everything below is for this package alone."""

    def __init__(self, name: str, module: StructuredModule, vectors: float) -> None:
        if not isinstance(module.format, LearnedSegments):
            raise TypeError(f"expected a Gaudi-GBLR layer, got {module.format}")
        self.name, self.module, self.vectors = name, module, vectors
        self.format = module.format
        self.width = _whole(module.get_parameter("width"))
        self.least = self.width.new_tensor([0.0, self.format.least_width])[:, None]

    def shrunk(self, amount: float) -> Tensor:
        """The widths after taking an amount off."""
        return torch.maximum((self.width - amount).clamp(0, 1), self.least)

    def shrink(self, amount: float) -> None:
        """Take an amount off."""
        self.width = self.shrunk(amount)

    def cost(self, unit: Unit, width: Tensor) -> Tensor:
        """The cost of the layer at these widths."""
        return self.vectors * self.format.cost(width, unit)

    def dense_cost(self, unit: Unit) -> float:
        """The cost that shares are relative to."""
        return self.vectors * self.format.dense_cost(unit)

    @property
    def entries(self) -> Tensor:
        """The widths in whole entries, ``(2, K)``."""
        return self.format.rounded_widths(self.width)

    @property
    def dead(self) -> int:
        """The number of components without a block."""
        return int((self.entries == 0).any(0).sum())

    def write(self, sigma: float) -> None:
        """Put everything back into the module, the locations wrapped."""
        location = self.module.get_parameter("location")
        location.sub_(location.floor())
        location.masked_fill_(location == 1, 0)  # -1e-9 wraps to 1 by rounding
        _overwrite_(self.module.get_parameter("width"), self.width)
        self.module.get_buffer("sigma").fill_(sigma)


def read_layers(model: nn.Module, unit: Unit, vectors: Mapping[str, float] | None) -> list[Layer]:
    """The Gaudi-GBLR layers of a network, those of which the unit can count the cost."""
    modules = structure_layers(model)
    if not modules:
        raise ValueError("expected a network with Gaudi-GBLR layers, got none; plan them with apply_plan_ first")
    if unit != "multiplications":
        return [Layer(name, module, 1) for name, module in modules.items()]
    missing = [name for name in modules if name not in (vectors or {})]
    if vectors is None or missing:
        raise ValueError(f"expected how many vectors each layer sees for multiplications, missing: {missing}")
    return [Layer(name, module, vectors[name]) for name, module in modules.items()]


def grouped(layers: list[Layer], targets: Mapping[str, float]) -> list[tuple[float, list[Layer]]]:
    """Each target and the layers that it is for."""
    groups: dict[str, list[Layer]] = {pattern: [] for pattern in targets}
    for layer in layers:
        pattern = next((pattern for pattern in targets if re.fullmatch(pattern, layer.name)), None)
        if pattern is not None:
            groups[pattern].append(layer)
    empty = [pattern for pattern, group in groups.items() if not group]
    if empty:
        raise ValueError(
            f"expected every target to match a Gaudi-GBLR layer that none before it does, but {empty} do not; "
            f"there are: {', '.join(layer.name for layer in layers)}"
        )
    return [(targets[pattern], group) for pattern, group in groups.items()]


def _costs(group: list[Layer], unit: Unit, amount: float = 0.0) -> list[float]:
    """Costs after taking an amount off all widths; one transfer from the device for all layers."""
    widths = (layer.shrunk(amount) if amount else layer.width for layer in group)
    costs = [layer.cost(unit, width) for layer, width in zip(group, widths, strict=True)]
    return torch.stack([cost.to(costs[0].device) for cost in costs]).tolist()


def share_of(group: list[Layer], unit: Unit, amount: float = 0.0) -> float:
    """The cost of a group after taking an amount off all widths, relative to the dense cost."""
    return sum(_costs(group, unit, amount)) / sum(layer.dense_cost(unit) for layer in group)


def excess(group: list[Layer], unit: Unit, target: float) -> float:
    """The least amount that, taken off all widths, brings the cost within the target; 1 if none does."""
    if share_of(group, unit) <= target:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if share_of(group, unit, middle) <= target else (middle, high)
    return high


def _state(layers: list[Layer], unit: Unit) -> StructureState:
    costs, dense = _costs(layers, unit), [layer.dense_cost(unit) for layer in layers]
    total = sum(costs)
    return StructureState(
        total / sum(dense),
        {layer.name: cost / whole for layer, cost, whole in zip(layers, costs, dense, strict=True)},
        {layer.name: cost / total if total else 0.0 for layer, cost in zip(layers, costs, strict=True)},
        sum(layer.dead for layer in layers) / sum(layer.format.components for layer in layers),
        float(layers[0].module.get_buffer("sigma")),
    )


def _whole(parameter: Tensor) -> Tensor:
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def _overwrite_(parameter: Tensor, value: Tensor) -> None:
    if isinstance(parameter, DTensor):
        local = parameter.to_local()
        rows = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        local.copy_(rows.to_local())
    else:
        parameter.copy_(value)
