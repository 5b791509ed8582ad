"""Weights in integers: the factors of structured layers, and the weights of dense ones, in 8 or 4 bits."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat.compress.calibration import calibrate
from structmat.compress.spectra import memory_parts
from structmat.fit.rounding import round_factors
from structmat.formats import Dense, Format, Quantized
from structmat.network.calls import call, copied, device_of, evaluating, moved, undisturbed
from structmat.network.sites import Site, find_sites
from structmat.network.splitting import unfused
from structmat.network.surgery import apply_plan_, convert_, densify_
from structmat.network.ties import tied_layers
from structmat.nn import StructuredModule
from structmat.training.balancing import balance_factors_

KINDS = {"int8": (8, 0), "int4": (4, 32)}
"""The number of bits, and the entries of a row that share a scale (0 for all), of each kind of integers."""


@undisturbed()
@torch.no_grad()
def quantize_(
    model: nn.Module,
    kind: str = "int8",
    names: Iterable[str] | None = None,
    *,
    batches: Sequence[Any] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Store the weights of linear layers as integers, in place, with one scale for each row or group of a row.

    The factors of structured layers are balanced first, so that no component suffers more than others. The factors of
    BLAST and low-rank layers are rounded one column after the other, and what a rounding loses is made up for by what
    is rounded after it (Frantar et al. 2023, arXiv 2210.17323); with data, for the output on that data, and in dense
    layers too. ``save_model`` and ``save_pretrained`` store the integers, and loading gives the same ones. A product
    makes the factors in floating point first: this saves memory, not time. A weight that is also used elsewhere, such
    as by an embedding, stays. Quantised layers cannot be trained.

    Args:
        model: The network.
        kind: ``"int8"``, one scale for each row, or ``"int4"``, one for 32 entries.
        names: Which layers; None for all, structured and dense ones. Layers that share their factors come along.
        batches: Calibration data, as for ``compress_``; None for none. With it a dense copy of the network is made for
            a while. Layers that it does not reach are rounded without it.
        progress: Whether to show a progress bar while data runs through the network.

    Returns:
        How far each matrix is from what it was, ``|W - W_rounded|_F / |W|_F``, by name.

    Raises:
        ValueError: If the kind is another, a name is not that of a layer that can be quantised, there is none, or a
            layer still learns its structure.

    Warns:
        UserWarning: If the data does not reach a layer.
    """
    _checks.one_of(kind, KINDS, "kind")
    structured, dense = _layers(model)
    wanted = set(structured + dense if names is None else names)
    unknown = sorted(wanted - {*structured, *dense})
    if unknown or not wanted:
        raise ValueError(
            f"expected names of layers that can be quantised, got {unknown or 'none'}; there are: "
            f"{', '.join(structured + dense) or 'none'}"
        )
    factors = _factors(model, wanted)
    formats = {name: _quantized(name, format, kind) for name, (format, _) in factors.items()}
    found: dict[str, dict[str, Tensor]] = {}
    if batches is not None:
        twin = densify_(copied(model))
        with unfused(twin):
            by_name = {name: site for site in find_sites(twin).values() for name in site.names}
            sites = _reached(twin, batches, {name: by_name[name] for name in formats})
            for part in memory_parts(twin, batches, sites):
                moments = calibrate(twin, batches, {name: formats[name] for name in part}, progress=progress)
                found |= {n: _rounded(formats[n], factors[n][1], moments[n].with_ridge()) for n in part}
    found |= {n: _rounded(formats[n], own, None) for n, (_, own) in factors.items() if n not in found}
    errors = {name: _error(formats[name], factors[name][1], found[name]) for name in formats}
    _put(model, formats, found, set(dense))
    return errors


def _factors(model: nn.Module, wanted: set[str]) -> dict[str, tuple[Format, dict[str, Tensor]]]:
    """The format and the factors of layers by name, dense ones included, and once where layers share them."""
    found: dict[str, tuple[Format, dict[str, Tensor]]] = {}
    for layers in tied_layers(model):
        if any(name in wanted for name in layers):
            first = next(iter(layers))
            found[first] = layers[first].format, dict(layers[first].factors)
    for name, site in find_sites(model).items():
        if name in wanted:
            found[name] = Dense(*site.matrix.shape), {"weight": site.matrix}
    return found


def _quantized(name: str, format: Format, kind: str) -> Quantized:
    try:
        return Quantized(*format.shape, format, *KINDS[kind])
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def _reached(model: nn.Module, batches: Sequence[Any], sites: Mapping[str, Site]) -> dict[str, Site]:
    """The layers that the data reaches; the user is warned of others."""
    called: set[nn.Module] = set()
    with ExitStack() as stack, evaluating(model):
        for site in sites.values():
            hook = site.module.register_forward_pre_hook(lambda module, _: called.add(module))
            stack.callback(hook.remove)
        for batch in batches:
            call(model, moved(batch, device_of(model)))
            if all(site.module in called for site in sites.values()):
                return dict(sites)
    missing = [name for name, site in sites.items() if site.module not in called]
    warnings.warn(f"the data never reaches {missing}, which are rounded without it", stacklevel=3)
    return {name: site for name, site in sites.items() if name not in missing}


def _rounded(format: Quantized, factors: Mapping[str, Tensor], second_moment: Tensor | None) -> dict[str, Tensor]:
    """The factors of a quantised format."""
    own = {key: factor.detach().clone() for key, factor in factors.items()}
    balance_factors_(format.base, own)
    return round_factors(format, own, second_moment)


def _error(format: Quantized, factors: Mapping[str, Tensor], rounded: Mapping[str, Tensor]) -> float:
    """How far the matrix of rounded factors is from what it was."""
    before, after = (one.double() for one in (format.base.to_dense(factors), format.to_dense(rounded)))
    return float((before - after).norm() / before.norm().clamp_min(1e-300))


def _put(
    model: nn.Module, formats: Mapping[str, Quantized], factors: Mapping[str, Mapping[str, Tensor]], dense: set[str]
) -> None:
    """Give layers of a network their quantised formats and factors."""
    structured = [name for name in formats if name not in dense]
    if structured:
        names = {
            name: first for layers in tied_layers(model) for first in layers for name in layers if first in formats
        }
        convert_(model, structured, "structured layers", _is_float, lambda n, _: (formats[names[n]], factors[names[n]]))
    plain = {name: format for name, format in formats.items() if name in dense}
    apply_plan_(model, plain, factors={name: factors[name] for name in plain})


def _is_float(format: Format) -> bool:
    return not isinstance(format, Quantized)


def _layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """The names of the structured and of the dense layers that are not quantised yet."""
    modules = model.named_modules()
    structured = [
        name
        for name, module in modules
        if isinstance(module, StructuredModule) and not isinstance(module.format, Quantized)
    ]
    return structured, [name for name, site in find_sites(model).items() if name and site.problem is None]
