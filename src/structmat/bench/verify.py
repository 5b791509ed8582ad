"""Whether what is about to be timed is right: products and gradients against the dense definition in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from structmat.formats import Format
from structmat.nn import StructuredLinear, StructuredModule

HALF_EPS = (4, 16)
"""The largest deviations in 16 bits, in units of the dtype's eps: that of a whole result relative to its norm, and that
of an entry relative to the entry and the root mean square of all entries."""

EPS = (32, 1024)
"""The largest deviations in float32 and float64, in which sums are rounded at every term."""

FEW_TOKENS = 3
"""The number of tokens with which the gradients are checked at the size of a layer that is timed."""

ROWS = 4
"""The number of outputs that are compared, of a layer that is timed."""


class IncorrectResultError(RuntimeError):
    """What was to be timed does not compute what its dense definition says."""


def check_format(
    format: Format,
    dtype: torch.dtype,
    device: torch.device,
    tokens: Iterable[int],
    *,
    gradients: bool = False,
    algorithms: Iterable[str] = ("",),
) -> None:
    """Check the products of a format with random factors.

    Args:
        format: The format.
        dtype: The dtype of the factors and the input.
        device: The device on which to compute.
        tokens: The numbers of vectors to check with.
        gradients: Whether to check the gradients of the factors and of the input too.
        algorithms: The algorithms of the format to check.

    Raises:
        IncorrectResultError: If a result deviates from the dense definition in float64.
    """
    layer = StructuredLinear(format, bias=False, dtype=dtype, device=device)
    for count, algorithm in itertools.product(tokens, algorithms):
        _check(layer, torch.randn(count, format.N, device=device).to(dtype), algorithm, gradients)


@torch.no_grad()
def check_layer(layer: StructuredModule, x: Tensor, weight: Tensor) -> None:
    """Check some outputs of a layer that will be timed.

    Args:
        layer: The layer.
        x: The input ``(T, N)``.
        weight: The dense weight of the layer in float64.

    Raises:
        IncorrectResultError: If they deviate.
    """
    found = layer(x)
    rows = torch.linspace(0, len(x) - 1, min(len(x), ROWS), device=x.device).long()
    expected = x[rows].double() @ weight.mT
    if layer.bias is not None:
        expected = expected + layer.bias.double()
    _compare(found[rows], expected, layer.format, x, "the product")


@torch.no_grad()
def exact_weight(layer: StructuredModule) -> Tensor:
    """The dense weight of a layer in float64."""
    return layer.format.to_dense({n: _double(factor) for n, factor in layer.factors.items()})


def _check(layer: StructuredModule, x: Tensor, algorithm: str, gradients: bool) -> None:
    format = layer.format
    trainable = [name for name, spec in format.factor_specs().items() if spec.trainable]
    factors = {n: f.detach().requires_grad_(gradients and n in trainable) for n, f in layer.factors.items()}
    x = x.requires_grad_(gradients)
    y = format.matmul(x, factors, algorithm)
    exact = {n: _double(f.detach()).requires_grad_(gradients and n in trainable) for n, f in factors.items()}
    exact_x = x.detach().double().requires_grad_(gradients)
    exact_y = exact_x @ format.to_dense(exact).mT
    way = f" by {algorithm!r}" if algorithm else ""
    _compare(y.detach(), exact_y.detach(), format, x, f"the product{way}")
    if gradients:
        upstream = torch.randn_like(y)
        found = torch.autograd.grad(y, [x, *(factors[n] for n in trainable)], upstream)
        expected = torch.autograd.grad(exact_y, [exact_x, *(exact[n] for n in trainable)], upstream.double())
        for name, one, other in zip(("the input", *trainable), found, expected, strict=True):
            _compare(one, other, format, x, f"the gradient of {name}{way}")


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _compare(found: Tensor, expected: Tensor, format: Format, x: Tensor, what: str) -> None:
    """Compare the norms, and entry by entry."""
    finfo = torch.finfo(x.dtype)
    scale = expected.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    difference = found.double() - expected
    mean = float((difference.square().mean().sqrt() / scale).nan_to_num(torch.inf, torch.inf))
    largest = float((difference.abs() / (scale + expected.abs())).nan_to_num(torch.inf, torch.inf).max())
    bounds = [units * finfo.eps for units in (HALF_EPS if finfo.bits == 16 else EPS)]
    if mean > bounds[0] or largest > bounds[1]:
        raise IncorrectResultError(
            f"no times are shown, since they would be those of a wrong result: {what} of {format} in "
            f"{str(x.dtype).removeprefix('torch.')} on {x.device} with {len(x)} tokens deviates from the dense "
            f"definition by {mean:.1e} as a whole and {largest:.1e} in an entry, expected at most {bounds[0]:.1e} and "
            f"{bounds[1]:.1e}; please report this"
        )
