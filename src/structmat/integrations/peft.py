"""LoRA and its relatives on a structured network, with peft.

After ``prepare_for_lora(model)`` an adapter goes beside a structured layer as beside a dense one, by
``target_modules``; merging it raises the rank of the layer. An adapter can also go onto the factors, which are ordinary
parameters: ``LoraConfig(target_modules=[], target_parameters=factor_targets(model))``. It then is loaded by
``PeftModel.from_pretrained`` without an import of this library, and merges into the factors without a higher rank.
"""

from __future__ import annotations

import re
from typing import TypeVar

from torch import nn

from structmat.integrations import doors
from structmat.network import structured_layers
from structmat.network.adapters import record
from structmat.network.splitting import put_module
from structmat.network.ties import layers_by_name, tied_layers
from structmat.nn.adaptable import ADAPTABLE, Adaptable, adaptable

Model = TypeVar("Model", bound=nn.Module)

BaseTuner: type[nn.Module] = doors.checked_module("peft.tuners.tuners_utils").BaseTuner
"""The class of every network with an adapter."""


def prepare_for_lora(model: Model) -> Model:
    """Let peft put adapters beside structured layers by ``target_modules``, as beside dense ones.

    The layers then pass for ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d`` (transposed ones have no adapter in peft) and
    compute the same with the same parameters. Merging an adapter of rank ``r`` adds ``r`` to the rank of a low-rank or
    BLAST layer and puts a term of rank ``r`` beside other structures, exactly up to rounding; ``unmerge_adapter``
    brings the old factors back. Save and load the network as always.

    Args:
        model: The structured network, before it gets its adapter; it is changed in place, as peft's own
            ``prepare_model_for_kbit_training`` does.

    Returns:
        The same network.

    Raises:
        ValueError: If there is no structured layer, the network has its adapter already or is one layer itself, or a
            layer still learns its structure or shares its factors with another.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from structmat import LowRank, apply_plan_
        >>> model = apply_plan_(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), {"0": LowRank(64, 64, 8)})
        >>> adapted = get_peft_model(prepare_for_lora(model), LoraConfig(r=2, target_modules=["0"]))
        >>> adapted.merge_and_unload()[0].format
        LowRank(M=64, N=64, rank=8)
    """
    _check_unadapted(model, "prepare it before get_peft_model")
    hung, layers = layers_by_name(model)
    if not layers:
        raise ValueError("expected a network with structured layers, got none; compress_ it first")
    if "" in layers:
        raise ValueError("expected layers inside the model, but it is one layer itself; wrap it in nn.Sequential")
    learning = [name for name, layer in layers.items() if layer.format.learns]
    if learning:
        raise ValueError(f"expected layers with a final structure, but {learning[0]!r} still learns; harden_ it first")
    tied = next((list(group) for group in tied_layers(model) if len({id(one) for one in group.values()}) > 1), None)
    if tied is not None:
        raise ValueError(
            f"expected layers with factors of their own, but {tied[0]!r} and {tied[1]!r} share them, so that merging "
            "one adapter would change both; put the adapters onto the factors, with factor_targets"
        )
    for layer in {id(one): one for one in layers.values()}.values():
        if type(layer) in ADAPTABLE and not isinstance(layer, Adaptable):
            new = adaptable(layer)
            for name in hung[id(layer)]:
                put_module(model, name, new)
    record(model)
    return model


def _check_unadapted(model: nn.Module, remedy: str) -> None:
    """Refuse a network that has its adapter already."""
    if any(isinstance(module, BaseTuner) for module in model.modules()):
        raise ValueError(f"expected a network without an adapter, got one with; {remedy}")


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
    _check_unadapted(model, "take the names before get_peft_model")
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
