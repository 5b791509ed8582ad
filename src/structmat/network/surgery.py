"""Surgery: put structured layers into a network, and take them out again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat.fit import Fit
from structmat.formats import Format, hardening_gap
from structmat.network.adapters import record
from structmat.network.calls import undisturbed
from structmat.network.sites import DENSE_KINDS, Site, find_sites, structured_layers
from structmat.network.splitting import joined_, put_module, split_, split_modules
from structmat.network.ties import layers_by_name, tie_of, with_ties
from structmat.nn import StructuredModule

LARGE_GAP = 0.05
"""Above this relative change of a matrix hardening warns."""


@undisturbed()
def apply_plan_(
    model: nn.Module,
    plan: Mapping[str, Format],
    *,
    factors: Mapping[str, Mapping[str, Tensor]] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replace the planned layers of a network, in place.

    A module that holds several matrices, such as ``nn.MultiheadAttention`` or ``nn.LSTM``, is replaced by one with a
    layer for each when the plan names one of them. Biases, training mode, ``requires_grad`` of the weight, dtype and
    device carry over; a weight that several modules share stays shared. The network is checked against the whole plan
    before anything changes. A layer that already has the planned format does not change, and neither does one planned
    as ``Dense``.

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
    split_(model, {id(site.holder): site.holder for site in sites.values() if site.holder is not None}.values())
    replacements: dict[str, StructuredModule] = {}
    for name, site in sites.items():
        replacements |= _structured(model, site, plan[name], factors.get(name), generator)
    for name, module in replacements.items():  # nothing that can fail is left to do
        put_module(model, name, module)
    record(model)
    return model


def planned_sites(model: nn.Module, plan: Mapping[str, Format]) -> dict[str, Site]:
    """The sites that the plan wants replaced, in its order, after checking all of it."""
    by_name = {name: site for site in find_sites(model).values() for name in site.names}
    present = dict(model.named_modules(remove_duplicate=False))
    planned: dict[str, Site] = {}
    for name, format in plan.items():
        if not isinstance(format, Format):
            raise TypeError(f"expected a format for layer {name!r}, got {format!r}")
        if name not in present and name not in by_name:
            raise ValueError(f"expected a module named {name!r}, which the plan wants as {format}; the model has none")
        module = present.get(name)
        if isinstance(module, StructuredModule):
            if module.format != format:
                raise ValueError(f"expected {name!r} dense or already {format}, got {module.format}; densify_ it first")
            continue
        if not format.replaces:
            continue
        site = by_name.get(name)
        if site is None or site.problem:
            parts = [one for own in by_name.values() if own.holder and name in own.holder.names for one in own.names]
            reason = f"it is of type {type(module).__name__}"
            reason += f", which holds several matrices; plan {', '.join(parts)} instead" if parts else ""
            reason = site.problem if site and site.problem else reason
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
    """Make the structured modules of a site, by the names under which they are to hang."""
    hung = _names_of(model, site.modules)
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


def _names_of(model: nn.Module, modules: Iterable[nn.Module]) -> dict[int, list[str]]:
    """The names under which modules hang in the network, by their ``id``."""
    hung: dict[int, list[str]] = {id(module): [] for module in modules}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in hung:
            hung[id(module)].append(name)
    return hung


def harden_(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, float]:
    """Turn Gaudi-GBLR layers into GBLR ones, in place: only what is inside their segments stays.

    Run it at the end of training, whose last phase is without smoothing; the matrices then stay the same. With
    smoothing they change, and where they change by more than ``LARGE_GAP`` there is a warning.

    Args:
        model: The network.
        names: Which layers; None for all. Layers that share the factors of one of them come along.

    Returns:
        How far each hardened matrix is from the one that learned, ``|W - W_hard|_F / |W|_F``, by name.

    Raises:
        ValueError: If a name is not that of a Gaudi-GBLR layer, there is none, or a hardened one would not save
            parameters; nothing has changed then.
    """
    gaps: dict[str, float] = {}

    def hardened(name: str, layer: StructuredModule) -> tuple[Format, Mapping[str, Tensor]]:
        gaps[name] = hardening_gap(layer.format, layer.factors)
        format, factors = layer.format.hardened(_detached(layer))
        try:
            format.check_saves()
        except ValueError as error:
            raise ValueError(
                f"layer {name!r}: {error}; train with a lower target, or densify_ it and harden the others by name"
            ) from error
        return format, factors

    convert_(model, names, "GaudiGblr layers", lambda format: format.learns, hardened)
    large = {name: gap for name, gap in gaps.items() if gap > LARGE_GAP}
    if large:
        worst = max(large, key=lambda name: large[name])
        warnings.warn(
            f"hardening changed {len(large)} of {len(gaps)} matrices by more than {LARGE_GAP:.0%}, most of all "
            f"{worst!r} by {large[worst]:.1%}; end the training with a phase at infinite sigma (hard_share)",
            stacklevel=2,
        )
    return gaps


def tile_(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, float]:
    """Lay the contents of GBLR layers out in tiles, as they are multiplied fastest, in place; for inference.

    The matrices stay the same. The layers hold more numbers than before, zeros where a segment ends within a tile, and
    ``TiledGblr`` says so; save the network before, or after for the speed alone.

    Args:
        model: The network.
        names: Which layers; None for all. Layers that share the factors of one of them come along.

    Returns:
        The padding of each layer relative to what it held, by name.

    Raises:
        ValueError: If a name is not that of a GBLR layer, there is none, or one has no component.
    """
    padding: dict[str, float] = {}

    def tiled(name: str, layer: StructuredModule) -> tuple[Format, Mapping[str, Tensor]]:
        found = layer.format.for_inference(_detached(layer))
        if found is None:
            raise ValueError(f"layer {name!r}: expected at least one component to tile, got {layer.format}")
        padding[name] = found[0].num_parameters() / layer.format.num_parameters() - 1
        return found

    convert_(model, names, "Gblr layers", lambda format: format.has_inference_layout, tiled)
    return padding


def _detached(layer: StructuredModule) -> dict[str, Tensor]:
    return {name: factor.detach() for name, factor in layer.factors.items()}


@undisturbed()
def convert_(
    model: nn.Module,
    names: Iterable[str] | None,
    what: str,
    fits: Callable[[Format], bool],
    convert: Callable[[str, StructuredModule], tuple[Format, Mapping[str, Tensor]]],
) -> None:
    """Give the layers whose format fits another, in place, once all are made; shared factors are converted once.

    Args:
        model: The network.
        names: Which layers; None for all that fit.
        what: The layers that fit, for messages.
        fits: Whether layers of a format are converted.
        convert: Makes the new format and its factors, given the name of a layer and the layer.

    Raises:
        ValueError: If there is no such layer, or a name is not that of one.
    """
    hung, layers = layers_by_name(model)
    found = {name: layer for name, layer in layers.items() if fits(layer.format)}
    wanted = with_ties(found, list(names) if names is not None else list(found), what)
    if not wanted:
        raise ValueError(f"expected a network with {what}, got none")
    converted: dict[tuple[int, ...], StructuredModule] = {}
    replacements: dict[str, StructuredModule] = {}
    for old in {id(found[name]): found[name] for name in wanted}.values():
        first = converted.get(tie_of(old))
        if first is None:
            new = converted[tie_of(old)] = old.with_factors(*convert(hung[id(old)][0], old))
        else:
            new = old.with_factors(first.format, first.factors)
            for key in first.factors:
                setattr(new, key, getattr(first, key))
        replacements |= dict.fromkeys(hung[id(old)], new)
    for name, module in replacements.items():
        put_module(model, name, module)
    record(model)


@undisturbed()
def densify_(model: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """Turn structured layers back into dense ones, in place: their matrices become real parameters.

    A module such as ``nn.MultiheadAttention`` that was split for them is PyTorch's own again once all of it is dense.

    Args:
        model: The network.
        names: Which layers; None for all. Layers that share the factors of one of them come along.

    Returns:
        The same network.

    Raises:
        ValueError: If a name is not that of a structured layer, or it is the whole model.
    """
    hung, layers = layers_by_name(model)
    wanted = with_ties(layers, list(names) if names is not None else list(layers), "structured layers")
    inside = {id(layers[name]) for name in wanted}
    splits = [one for one in split_modules(model).values() if not inside.isdisjoint(map(id, one.children()))]
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    for old in {id(layers[name]): layers[name] for name in wanted}.values():
        new = old.dense_layer()
        shared = tie_of(old)
        if shared not in weights:
            learns = any(factor.requires_grad for factor in old.factors.values())
            weight = old.in_dense_layout(old.to_dense().detach()).clone(memory_format=torch.contiguous_format)
            weights[shared] = nn.Parameter(weight, requires_grad=learns)
        new.weight = weights[shared]
        new.register_parameter("bias", old.bias)
        new.train(old.training)
        for name in hung[id(old)]:
            put_module(model, name, new)
    joined_(model, splits)
    record(model)
    return model


def check_layers(model: nn.Module) -> None:
    """Check that the factors of every structured layer fit its format and are finite, once they have been loaded.

    Args:
        model: The network.
    """
    for name, layer in structured_layers(model).items():
        check_layer(name, layer.format, layer.factors)


def check_layer(name: str, format: Format, factors: Mapping[str, Tensor]) -> None:
    """Check factors that were loaded.

    Args:
        name: The name of the layer.
        format: Its format.
        factors: Its factors.

    Raises:
        ValueError: If they do not fit the format, or one that is trained holds NaN or infinity.
    """
    try:
        format.check_factors(factors)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    for own, spec in format.factor_specs().items():
        if spec.trainable and not _checks.is_finite(factors[own]):
            raise ValueError(f"expected finite factors in layer {name!r}, got NaN or infinity in {own!r}")


def put_fits_(model: nn.Module, fits: Mapping[str, Fit], *, own_biases: bool = False) -> None:
    """Put fits into a network, in place: as new structured layers, or as new values of those that are there.

    Args:
        model: The network, or a block of one.
        fits: The fits by the names of the layers.
        own_biases: Whether layers get new biases where a fit has one, so that those of the dense layers, which may be
            needed again, keep their values.
    """
    present = {name for name in fits if isinstance(model.get_submodule(name), StructuredModule)}
    new = {name: fit for name, fit in fits.items() if name not in present}
    formats = {name: fit.format for name, fit in new.items()}
    apply_plan_(model, formats, factors={name: fit.factors for name, fit in new.items()})
    for name, fit in fits.items():
        module = model.get_submodule(name)
        if name in present:
            for factor, value in fit.factors.items():
                getattr(module, factor).data.copy_(value)
        if fit.bias is not None and own_biases:
            module.bias = nn.Parameter(fit.bias.clone())
        elif fit.bias is not None:
            module.get_parameter("bias").data.copy_(fit.bias)


@contextmanager
def with_fits(model: nn.Module, fits: Mapping[str, Fit]) -> Iterator[None]:
    """Replace some layers of a network by their fits while the context is entered; then all is as before."""
    by_name = {name: site for site in find_sites(model).values() for name in site.names}
    dense = {name: model.get_submodule(name) for fitted in fits for name in by_name[fitted].names}
    try:
        put_fits_(model, fits, own_biases=True)
        yield
    finally:
        for name, module in dense.items():
            put_module(model, name, module)
        record(model)
