"""Putting modules into a network, and splitting those that hold several matrices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from structmat.network.adapters import record
from structmat.network.fused import Holder
from structmat.network.sites import find_sites
from structmat.nn import SplitModule, StructuredModule

FUSED_PATHS = ("activation_relu_or_gelu", "use_nested_tensor")
"""What ``nn.TransformerEncoderLayer`` and ``nn.TransformerEncoder`` note about their fused paths."""


def put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Hang ``module`` under ``name``."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, child, module)
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0  # its fused inference path reads the dense weights of its children
        for ancestor in model.modules():
            if isinstance(ancestor, nn.TransformerEncoder) and parent in ancestor.layers:
                ancestor.use_nested_tensor = False


def holders_of(model: nn.Module, names: Iterable[str] | None = None) -> list[Holder]:
    """Find the modules of a network that hold several matrices and can be split.

    Args:
        model: The network.
        names: Names of sites, of which one at least is in each; names of other modules are left out. None for all.

    Returns:
        The modules, each once.
    """
    wanted = None if names is None else set(names)
    found: dict[int, Holder] = {}
    for site in find_sites(model).values():
        if site.holder is not None and (wanted is None or not wanted.isdisjoint(site.names)):
            found.setdefault(id(site.holder.module), site.holder)
    return list(found.values())


def split_(model: nn.Module, holders: Iterable[Holder]) -> None:
    """Put split modules into the place of those that hold several matrices, in place and for good.

    Args:
        model: The network.
        holders: What to split.
    """
    for holder in holders:
        own_(holder.twin)
        for name in holder.names:
            put_module(model, name, holder.twin)


@torch.no_grad()
def own_(twin: SplitModule) -> None:
    """Give a split module memory of its own, so that what it stood in for can go.

    Args:
        twin: The split module.
    """
    for parameter in twin.parameters():
        if parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


@contextmanager
def unfused(model: nn.Module, names: Iterable[str] | None = None) -> Iterator[None]:
    """Split modules that hold several matrices while the context is entered, so that each matrix is a layer.

    Those that hold a structured layer at the end stay split; the others are put back.

    Args:
        model: The network.
        names: Names of sites: what holds one of them is split. None for everything that can be.
    """
    holders = holders_of(model, names)
    kept = [
        (module, name, getattr(module, name))
        for module in (model.modules() if holders else ())
        for name in FUSED_PATHS
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and hasattr(module, name)
    ]
    for holder in holders:
        for name in holder.names:
            put_module(model, name, holder.twin.train(holder.module.training))
    changed = False
    try:
        yield
    finally:
        for holder in holders:
            if any(isinstance(part, StructuredModule) for part in holder.twin.modules()):
                own_(holder.twin)
                changed = True
                continue
            holder.module.train(holder.twin.training)
            for name in holder.names:
                put_module(model, name, holder.module)
        if not changed:
            for module, name, value in kept:
                setattr(module, name, value)
        if holders:
            record(model)


def joined_(model: nn.Module, splits: Iterable[SplitModule]) -> None:
    """Put PyTorch's own modules into the place of split ones that are dense, in place.

    Args:
        model: The network.
        splits: The split modules.
    """
    wanted = {id(split) for split in splits if split.is_dense}
    made: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in wanted and name:
            if id(module) not in made and isinstance(module, SplitModule):
                made[id(module)] = module.joined()
            put_module(model, name, made[id(module)])


def split_modules(model: nn.Module) -> dict[str, SplitModule]:
    """Find the split modules of a network.

    Args:
        model: The network.

    Returns:
        The modules by their first names.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, SplitModule)}
