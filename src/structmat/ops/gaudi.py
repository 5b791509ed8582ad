"""The Gaudi mask: a boxcar of real width and location on a cyclic axis, with gradients for both."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from structmat.ops.common import plain, plain_backward, plain_gradients, save_inputs, shaped_like, traced


def gaudi_mask(width: Tensor, location: Tensor, sigma: Tensor, n: int) -> Tensor:
    """Masks of components along one axis (Gaussian-Dirichlet; Gaudi-GBLR: Lee & Kim 2024, section 3 and Theorem 3).

    A mask covers ``[location n, location n + width n)``, cyclically. With ``sigma`` infinite and both on the grid
    ``1/n`` it is 1 inside and 0 outside; off the grid it oscillates. A finite ``sigma`` smooths it. The gradients are
    those of this very function; that of a width does not vanish at width 0, so that a component can come back.

    Args:
        width: ``(..., K)`` in [0, 1], float32 or float64.
        location: ``(..., K)``, of the same shape and dtype, in turns of the axis: any real number.
        sigma: The standard deviation of the Gaussian over frequencies, ``(1,)``, in cycles per axis; no gradient flows
            into it.
        n: The number of entries of the axis.

    Returns:
        ``(..., K, n)``, in the dtype of ``width``.
    """
    if plain():
        return _definition(width, location, sigma, n)
    return torch.ops.structmat.gaudi_mask(width, location, sigma, n)


def _definition(width: Tensor, location: Tensor, sigma: Tensor, n: int) -> Tensor:
    if not traced() and width.numel() == 0:
        return width[..., None].expand(*width.shape, n).clone()
    return torch.fft.irfft(_coefficients(width, location, sigma, n), n, norm="forward")


@torch.library.custom_op("structmat::gaudi_mask", mutates_args=())
def _mask(width: Tensor, location: Tensor, sigma: Tensor, n: int) -> Tensor:
    return _definition(width, location, sigma, n)


@_mask.register_fake
def _(width: Tensor, location: Tensor, sigma: Tensor, n: int) -> Tensor:
    return width.new_empty(*width.shape, n)


@torch.library.custom_op("structmat::gaudi_mask_backward", mutates_args=())
def _mask_backward(upstream: Tensor, width: Tensor, location: Tensor, sigma: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The gradients, by Parseval: a sum over time of two real signals is one over their frequencies."""
    if width.numel() == 0:
        return torch.empty_like(width), torch.empty_like(location)
    frequencies = _frequencies(width, n)
    weights = torch.full_like(frequencies, 2)  # a frequency stands for its negative too
    weights[:1].fill_(1)  # a copy of a number from the host cannot be recorded as a CUDA graph
    if n % 2 == 0:
        weights[-1:].fill_(1)
    spectrum = torch.fft.rfft(upstream.to(width.dtype)).conj() * weights
    # d/d width moves the right edge: a smoothed impulse at location + width
    edge = _turned(frequencies * (location.double() + width.double())[..., None] - frequencies / (2 * n), width.dtype)
    edge = edge * (_gaussian(frequencies, sigma) / torch.sinc(frequencies / n)).to(width.dtype)
    shift = _coefficients(width, location, sigma, n) * (-2j * math.pi * frequencies)
    return (edge * spectrum).real.sum(-1).to(width.dtype), (shift * spectrum).real.sum(-1).to(width.dtype)


_mask_backward.register_fake(lambda upstream, width, location, *_: shaped_like(width, location))


def _frequencies(width: Tensor, n: int) -> Tensor:
    """``0 … n//2``; in float64, since ``k`` times a location needs more digits than float32 has."""
    return torch.arange(n // 2 + 1, dtype=torch.float64, device=width.device)


def _gaussian(frequencies: Tensor, sigma: Tensor) -> Tensor:
    return torch.exp(-0.5 * (frequencies / sigma.double()).square())


def _turned(turns: Tensor, dtype: torch.dtype) -> Tensor:
    """``exp(-2 pi i turns)``, the whole turns taken off before the precision is lowered."""
    angle = (-2 * math.pi * (turns - turns.floor())).to(dtype)
    return torch.complex(angle.cos(), angle.sin())


def _coefficients(width: Tensor, location: Tensor, sigma: Tensor, n: int) -> Tensor:
    """The Fourier coefficients ``c_k``, ``(..., K, n//2 + 1)``."""
    frequencies = _frequencies(width, n)
    half = frequencies * (width.double() / 2)[..., None]  # turns
    amplitude = (2 * math.pi * (half - half.floor())).to(width.dtype).sin()
    scale = _gaussian(frequencies, sigma) / (n * torch.sin(math.pi * frequencies / n).clamp_min(1 / n))
    amplitude = amplitude * scale.to(width.dtype)
    amplitude[..., 0] = width
    centre = frequencies * location.double()[..., None] + half - frequencies / (2 * n)
    return amplitude * _turned(centre, width.dtype)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    if plain_backward():
        width, location, sigma = ctx.saved_tensors
        product = functools.partial(_definition, sigma=sigma, n=ctx.options[0])
        return *plain_gradients(product, ctx.needs_input_grad, upstream.to(width.dtype), width, location), None, None
    return *torch.ops.structmat.gaudi_mask_backward(upstream, *ctx.saved_tensors, *ctx.options), None, None


_mask.register_autograd(_backward, setup_context=save_inputs)
