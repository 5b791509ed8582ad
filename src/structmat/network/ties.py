"""Structured layers by name, and those that share their factors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from structmat.nn import StructuredModule


def layers_by_name(model: nn.Module) -> tuple[dict[int, list[str]], dict[str, StructuredModule]]:
    """Find the structured layers of a network.

    Args:
        model: The network.

    Returns:
        The names under which each layer hangs, by its ``id``; and the layers by name.
    """
    hung: dict[int, list[str]] = {}
    layers: dict[str, StructuredModule] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, StructuredModule):
            hung.setdefault(id(module), []).append(name)
            layers[name] = module
    return hung, layers


def tie_of(layer: StructuredModule) -> tuple[int, ...]:
    """Tell what layers that share their factors have in common.

    Args:
        layer: The layer.

    Returns:
        The ``id`` of each factor.
    """
    return tuple(id(factor) for factor in layer.factors.values())


def tied_layers(model: nn.Module) -> list[dict[str, StructuredModule]]:
    """Find the structured layers of a network, those that share their factors together.

    Args:
        model: The network.

    Returns:
        The layers by name, in groups; a layer that shares with no other is a group of its own.
    """
    groups: dict[tuple[int, ...], dict[str, StructuredModule]] = {}
    for name, layer in layers_by_name(model)[1].items():
        groups.setdefault(tie_of(layer), {})[name] = layer
    return list(groups.values())


def with_ties(layers: Mapping[str, StructuredModule], wanted: list[str], what: str) -> list[str]:
    """Add to layers those that share their factors.

    Args:
        layers: The layers by name.
        wanted: The names of some of them.
        what: What they are, for messages.

    Returns:
        The names.

    Raises:
        ValueError: If a name is not that of a layer, or the network is one layer itself.
    """
    unknown = [name for name in wanted if name not in layers]
    if unknown:
        raise ValueError(f"expected names of {what}, got {unknown}; there are: {', '.join(layers) or 'none'}")
    if "" in wanted:
        raise ValueError("expected layers inside the model, but it is one layer itself; convert its factors instead")
    ties = {tie_of(layers[name]) for name in wanted}
    return [name for name, layer in layers.items() if tie_of(layer) in ties]
