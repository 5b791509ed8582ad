"""Weights in integers: the factors of structured layers, and the weights of dense ones, in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat.formats import Dense, Format, Quantized
from structmat.network.calls import undisturbed
from structmat.network.sites import find_sites
from structmat.network.surgery import apply_plan_, convert_
from structmat.nn import StructuredModule
from structmat.training.balancing import balance_factors_

KINDS = {"int8": (8, 0), "int4": (4, 32)}
"""The number of bits, and the entries of a row that share a scale (0 for all), of each kind of integers."""


@undisturbed()
@torch.no_grad()
def quantize_(model: nn.Module, kind: str = "int8", names: Iterable[str] | None = None) -> dict[str, float]:
    """Store the weights of linear layers as integers, in place, with one scale for each row or group of a row.

    The factors of structured layers are balanced first, so that no component suffers more than others, and each group
    is cut off where its error is least. ``save_model`` and ``save_pretrained`` store the integers, and loading gives
    the same ones. A product makes the factors in floating point first: this saves memory, not time. A weight that is
    also used elsewhere, such as by an embedding, stays. Quantised layers cannot be trained.

    Args:
        model: The network.
        kind: ``"int8"``, one scale for each row, or ``"int4"``, one for 32 entries.
        names: Which layers; None for all, structured and dense ones.

    Returns:
        How far each matrix is from what it was, ``|W - W_rounded|_F / |W|_F``, by name.

    Raises:
        ValueError: If the kind is another, a name is not that of a layer that can be quantised, there is none, or a
            layer still learns its structure.
    """
    _checks.one_of(kind, KINDS, "kind")
    bits, group = KINDS[kind]
    structured, dense = _layers(model)
    wanted = set(structured + dense if names is None else names)
    unknown = sorted(wanted - {*structured, *dense})
    if unknown or not wanted:
        raise ValueError(
            f"expected names of layers that can be quantised, got {unknown or 'none'}; there are: "
            f"{', '.join(structured + dense) or 'none'}"
        )
    errors: dict[str, float] = {}

    def rounded(name: str, format: Format, factors: Mapping[str, Tensor]) -> tuple[Format, dict[str, Tensor]]:
        new, found, errors[name] = _rounded(name, format, factors, bits, group)
        return new, found

    plans = {
        name: rounded(name, Dense(*site.matrix.shape), {"weight": site.matrix})
        for name, site in find_sites(model).items()
        if name in dense and name in wanted
    }
    chosen = [name for name in structured if name in wanted]
    if chosen:
        convert_(
            model, chosen, "structured layers", _is_float, lambda n, layer: rounded(n, layer.format, layer.factors)
        )
    apply_plan_(
        model,
        {name: format for name, (format, _) in plans.items()},
        factors={name: factors for name, (_, factors) in plans.items()},
    )
    return errors


def _rounded(
    name: str, format: Format, factors: Mapping[str, Tensor], bits: int, group: int
) -> tuple[Format, dict[str, Tensor], float]:
    """The quantised format and factors of a layer, and the error of its matrix."""
    try:
        new = Quantized(*format.shape, format, bits, group)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    own = {key: factor.detach().clone() for key, factor in factors.items()}
    balance_factors_(format, own)
    found = new.rounded(own)
    before, after = (one.double() for one in (format.to_dense(factors), new.to_dense(found)))
    return new, found, float((before - after).norm() / before.norm().clamp_min(1e-300))


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
