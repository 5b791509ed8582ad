"""LoRA and its relatives on a structured network, with peft.

An adapter goes onto the factors, which are ordinary parameters: ``LoraConfig(target_modules=[],
target_parameters=factor_targets(model))``. It then trains, is saved, is loaded by ``PeftModel.from_pretrained`` without
an import of this library, and merges into the factors exactly. Peft refuses an adapter that goes beside a structured
layer, by its module name. One that was registered for it anyway cannot be merged: the dense ``weight`` into which it
would be folded does not exist, and writing to it is an error.
"""

from __future__ import annotations

import re

from torch import nn

from structmat.integrations import doors
from structmat.network import structured_layers

BaseTuner: type[nn.Module] = doors.checked_module("peft.tuners.tuners_utils").BaseTuner
"""The class of every network with an adapter."""


def factor_targets(model: nn.Module, layers: str = ".*") -> list[str]:
    """List the names of the factors that an adapter can go onto.

    Args:
        model: The structured network, before it gets its adapter.
        layers: A regular expression that must match a structured layer's whole name.

    Returns:
        The names of all trainable factors with two or three dimensions, for ``target_parameters`` of a ``LoraConfig``.

    Raises:
        ValueError: If the expression picks no structured layer, or the network has its adapter already.

    Example:
        >>> from structmat import LowRank, apply_plan_
        >>> model = apply_plan_(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), {"0": LowRank(64, 64, 8)})
        >>> factor_targets(model)
        ['0.left', '0.right']
    """
    if any(isinstance(module, BaseTuner) for module in model.modules()):
        raise ValueError("expected a network without an adapter, got one with; take the names before get_peft_model")
    found = structured_layers(model)
    picked = {name: module for name, module in found.items() if re.fullmatch(layers, name)}
    if not picked:
        raise ValueError(
            f"expected {layers!r} to pick a structured layer, but it picks none; "
            f"there are: {', '.join(found) or 'none'}"
        )
    return [
        f"{name}.{own}"
        for name, module in picked.items()
        for own, factor in module.factors.items()
        if isinstance(factor, nn.Parameter) and factor.ndim in (2, 3)
    ]
