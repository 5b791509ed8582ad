"""Weights in integers: the factors of structured layers, and the weights of dense ones, in 8 or 4 bits."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat.compress.calibration import calibrate
from structmat.compress.spectra import memory_parts
from structmat.fit.rounding import round_factors
from structmat.formats import Dense, Format, Quantized
from structmat.network.calls import undisturbed
from structmat.network.sites import find_sites
from structmat.network.surgery import apply_plan_, convert_, densify_
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
        names: Which layers; None for all, structured and dense ones.
        batches: Calibration data, as for ``compress_``; None for none. With it a dense copy of the network is made for
            a while.
        progress: Whether to show a progress bar while data runs through the network.

    Returns:
        How far each matrix is from what it was, ``|W - W_rounded|_F / |W|_F``, by name.

    Raises:
        ValueError: If the kind is another, a name is not that of a layer that can be quantised, there is none, or a
            layer still learns its structure.
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
    formats = {name: _quantized(name, format, kind) for name, format in _formats(model, wanted).items()}
    rounding = _Rounding(formats, {})
    if batches is None:
        rounding.round_(model, list(formats))
        return rounding.errors
    twin = densify_(copy.deepcopy(model))
    sites = {name: site for name, site in find_sites(twin).items() if name in wanted}
    for part in memory_parts(twin, batches, sites):
        found = calibrate(twin, batches, {name: formats[name] for name in part}, progress=progress)
        rounding.moments = {name: found[name].second_moment for name in part}
        rounding.round_(model, part)
    return rounding.errors


def _formats(model: nn.Module, wanted: set[str]) -> dict[str, Format]:
    """The formats of layers by name, dense ones included."""
    sites = find_sites(model)
    found: dict[str, Format] = {name: Dense(*site.matrix.shape) for name, site in sites.items() if name in wanted}
    modules = model.named_modules()
    return found | {n: module.format for n, module in modules if n in wanted and isinstance(module, StructuredModule)}


def _quantized(name: str, format: Format, kind: str) -> Quantized:
    try:
        return Quantized(*format.shape, format, *KINDS[kind])
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error


class _Rounding:
    """The rounding of layers of a network.

    Args:
        formats: The format that each layer gets.
        moments: The second moments of the inputs of layers, where they are known.
    """

    def __init__(self, formats: Mapping[str, Quantized], moments: Mapping[str, Tensor]) -> None:
        self.formats, self.moments = formats, moments
        self.errors: dict[str, float] = {}

    def round_(self, model: nn.Module, names: Sequence[str]) -> None:
        """Round these layers of the network, in place."""
        structured = [name for name in names if not isinstance(self.formats[name].base, Dense)]
        if structured:
            convert_(
                model,
                structured,
                "structured layers",
                _is_float,
                lambda name, layer: self._rounded(name, layer.factors),
            )
        sites = find_sites(model)
        matrices = {name: sites[name].matrix for name in names if name not in structured}
        plain = {name: self._rounded(name, {"weight": matrix})[1] for name, matrix in matrices.items()}
        apply_plan_(model, {name: self.formats[name] for name in plain}, factors=plain)

    def _rounded(self, name: str, factors: Mapping[str, Tensor]) -> tuple[Format, dict[str, Tensor]]:
        """The quantised format and factors of a layer; the error of its matrix is kept."""
        new = self.formats[name]
        own = {key: factor.detach().clone() for key, factor in factors.items()}
        balance_factors_(new.base, own)
        found = round_factors(new, own, self.moments.get(name))
        before, after = (one.double() for one in (new.base.to_dense(factors), new.to_dense(found)))
        self.errors[name] = float((before - after).norm() / before.norm().clamp_min(1e-300))
        return new, found


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
