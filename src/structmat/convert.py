"""Surgery: put structured layers into a network, and take them out again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from structmat import _doors
from structmat.formats import Dense, Format
from structmat.nn import DENSE_KINDS, Site, StructuredModule, find_sites, put_module


def apply_plan_(
    model: nn.Module,
    plan: Mapping[str, Format],
    *,
    factors: Mapping[str, Mapping[str, Tensor]] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replace the planned layers of a network, in place.

    Biases, training mode, ``requires_grad`` of the weight, dtype and device carry over; a weight that several modules
    share stays shared. The network is checked against the whole plan before anything changes. A layer that already
    has the planned format stays as it is, and so does one planned as ``Dense``.

    Args:
        model: The network; it may live on the meta device.
        plan: Format of each layer by name.
        factors: Factors of each layer by name; None, or a missing layer, for a random init.
        generator: Source of randomness for the init, on the CPU.

    Returns:
        The same network.

    Raises:
        ValueError: If the plan names layers that are not there or cannot be replaced, a shape differs, a format would
            not save parameters, or factors do not fit their format.
    """
    sites = planned_sites(model, plan)
    factors = factors or {}
    unknown = [name for name in factors if name not in sites]
    if unknown:
        raise ValueError(f"expected factors only of layers that the plan replaces, got some of {unknown}")
    for name, given in factors.items():
        plan[name].check_factors(given)
    replacements: dict[str, StructuredModule] = {}
    for name, site in sites.items():
        replacements |= _structured(model, site, plan[name], factors.get(name), generator)
    for name, module in replacements.items():  # nothing that can fail is left to do
        put_module(model, name, module)
    _doors.record(model)
    return model


def planned_sites(model: nn.Module, plan: Mapping[str, Format]) -> dict[str, Site]:
    """The sites that the plan wants replaced, in its order, after checking all of it."""
    by_name = {name: site for site in find_sites(model).values() for name in site.names}
    present = dict(model.named_modules(remove_duplicate=False))
    planned: dict[str, Site] = {}
    for name, format in plan.items():
        if not isinstance(format, Format):
            raise TypeError(f"expected a format for layer {name!r}, got {format!r}")
        if name not in present:
            raise ValueError(f"expected a module named {name!r}, which the plan wants as {format}; the model has none")
        module = present[name]
        if isinstance(module, StructuredModule):
            if module.format != format:
                raise ValueError(f"expected {name!r} dense or already {format}, got {module.format}; densify_ it first")
            continue
        if isinstance(format, Dense):
            continue
        site = by_name.get(name)
        if site is None or site.problem:
            reason = site.problem if site else f"it is of type {type(module).__name__}"
            raise ValueError(f"layer {name!r} cannot be structured: {reason}")
        if tuple(site.matrix.shape) != format.shape:
            raise ValueError(f"layer {name!r} has shape {tuple(site.matrix.shape)}, but the plan says {format}")
        twice = next((other for other, used in planned.items() if used is site), None)
        if twice is not None:
            raise ValueError(f"the plan names {twice!r} and {name!r}, which share one weight; keep one of them")
        try:
            format.check_saves()
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        planned[name] = site
    return planned


def _structured(
    model: nn.Module,
    site: Site,
    format: Format,
    factors: Mapping[str, Tensor] | None,
    generator: torch.Generator | None,
) -> dict[str, StructuredModule]:
    """The structured modules of a site by the names under which they are to hang."""
    hung: dict[int, list[str]] = {id(module): [] for module in site.modules}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in hung:
            hung[id(module)].append(name)
    replacements: dict[str, StructuredModule] = {}
    first: StructuredModule | None = None
    for old in site.modules:
        new = DENSE_KINDS[type(old)].structured(old, format, factors, generator)
        if new.bias is not None:
            new.bias = old._parameters["bias"]
        for name in format.factor_specs():
            if first is not None:
                setattr(new, name, getattr(first, name))
            elif isinstance(getattr(new, name), nn.Parameter):
                getattr(new, name).requires_grad_(old.get_parameter("weight").requires_grad)
        first = first or new
        new.train(old.training)
        replacements |= dict.fromkeys(hung[id(old)], new)
    return replacements


def densify_(model: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """Turn structured layers back into dense ones, in place: their matrices become real parameters.

    Args:
        model: The network.
        names: Which layers; None for all. Layers that share the factors of one of them come along.

    Returns:
        The same network.

    Raises:
        ValueError: If a name is not that of a structured layer, or it is the whole model.
    """
    hung: dict[int, list[str]] = {}
    layers: dict[str, StructuredModule] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, StructuredModule):
            hung.setdefault(id(module), []).append(name)
            layers[name] = module
    wanted = list(names) if names is not None else list(layers)
    unknown = [name for name in wanted if name not in layers]
    if unknown:
        raise ValueError(
            f"expected names of structured layers, got {unknown}; there are: {', '.join(layers) or 'none'}"
        )
    if "" in wanted:
        raise ValueError("expected layers inside the model, but it is one layer itself; use its to_dense()")
    ties = {_tie(layers[name]) for name in wanted}
    wanted = [name for name, layer in layers.items() if _tie(layer) in ties]
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    for old in {id(layers[name]): layers[name] for name in wanted}.values():
        new = old.dense_layer()
        shared = _tie(old)
        if shared not in weights:
            learns = any(factor.requires_grad for factor in old.factors.values())
            weight = old.in_dense_layout(old.to_dense().detach()).clone(memory_format=torch.contiguous_format)
            weights[shared] = nn.Parameter(weight, requires_grad=learns)
        new.weight = weights[shared]
        new.register_parameter("bias", old.bias)
        new.train(old.training)
        for name in hung[id(old)]:
            put_module(model, name, new)
    _doors.record(model)
    return model


def _tie(layer: StructuredModule) -> tuple[int, ...]:
    """What layers that share their factors have in common."""
    return tuple(id(factor) for factor in layer.factors.values())
