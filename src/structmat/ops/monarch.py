"""Product with a Monarch (block low-rank) matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structmat.ops.common import cast, is_half, plain, tokens_within

BUFFER = 4
"""MiB of an intermediate on a CPU; half as much for dtypes of 16 bits."""

MANY_TOKENS = 256
"""From this many on, and for ranks up to ``SMALL_RANK``, a CPU computes one block row after the other in float32."""

SMALL_RANK = 64
"""Of the blocks."""


def monarch_matmul(x: Tensor, left: Tensor, right: Tensor, permute_output: bool = False) -> Tensor:
    """Compute ``x @ W.T`` for a Monarch matrix in ``t (J M + I N)`` multiplications per token.

    The operator is ``torch.ops.structmat.monarch_matmul``; its backward computes the intermediate again.

    Args:
        x: Input ``(..., J Q)``.
        left: ``(I, P, J, t)``.
        right: ``(J, I, t, Q)``.
        permute_output: Emit entry ``p`` of output block ``i`` at ``p I + i`` (Dao et al. 2022) instead of ``i P + p``.

    Returns:
        Output ``(..., I P)``.
    """
    I, P = left.shape[:2]
    x, left, right = cast(x, left, right)
    product = _whole if plain() else torch.ops.structmat.monarch_matmul
    return product(x.reshape(-1, x.shape[-1]), left, right, permute_output).view(*x.shape[:-1], I * P)


@torch.library.custom_op("structmat::monarch_matmul", mutates_args=())
def _matmul(x: Tensor, left: Tensor, right: Tensor, permute_output: bool) -> Tensor:
    (I, P, J, t), T = left.shape, len(x)
    if x.device.type != "cpu" or T == 0:
        return _whole(x, left, right, permute_output)
    y = x.new_empty(T, I * P)
    shape = (P, I) if permute_output else (I, P)
    segments_out = y.unflatten(1, shape).permute((2, 0, 1) if permute_output else (1, 0, 2))  # (I, T, P)
    if T >= MANY_TOKENS and t <= SMALL_RANK and not is_half(x):
        _by_rows(x, left, right, segments_out)
        return y
    step = tokens_within(BUFFER / 2 if is_half(x) else BUFFER, I * J * t, x)
    matrices = left.flatten(2).mT  # (I, J t, P)
    for some, out in zip(x.split(step), segments_out.split(step, 1), strict=True):
        torch.bmm(_regrouped(some, right), matrices, out=out)
    return y


@_matmul.register_fake
def _(x: Tensor, left: Tensor, right: Tensor, permute_output: bool) -> Tensor:
    return x.new_empty(len(x), left.shape[0] * left.shape[1])


def _whole(x: Tensor, left: Tensor, right: Tensor, permute_output: bool) -> Tensor:
    y = torch.bmm(_regrouped(x, right), left.flatten(2).mT)  # (I, T, P)
    return (y.permute(1, 2, 0) if permute_output else y.transpose(0, 1)).flatten(1).contiguous()


def _by_rows(x: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    """One block row after the other: what the columns give it is side by side already."""
    J, I, t, Q = right.shape
    segments = x.unflatten(1, (J, Q)).permute(1, 2, 0)  # (J, Q, T)
    z = x.new_empty(J, t, len(x))
    for i in range(I):
        torch.bmm(right[:, i], segments, out=z)
        out[i].copy_(torch.mm(z.flatten(0, 1).mT, left[i].flatten(1).mT))


def _regrouped(x: Tensor, right: Tensor) -> Tensor:
    """What each block column makes of its segment, sorted by block row: ``(I, T, J t)``."""
    J, I, t, Q = right.shape
    segments = x.unflatten(1, (J, Q)).transpose(0, 1)  # (J, T, Q)
    z = torch.bmm(segments, right.flatten(1, 2).mT)  # (J, T, I t)
    return z.unflatten(2, (I, t)).permute(2, 1, 0, 3).flatten(2)


@torch.library.custom_op("structmat::monarch_matmul_backward", mutates_args=())
def _matmul_backward(
    upstream: Tensor, x: Tensor, left: Tensor, right: Tensor, permute_output: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (I, P, J, t), Q = left.shape, right.shape[-1]
    segments = x.unflatten(1, (J, Q)).transpose(0, 1)  # (J, T, Q)
    shape = (P, I) if permute_output else (I, P)
    upstream_segments = upstream.unflatten(1, shape).permute((2, 0, 1) if permute_output else (1, 0, 2))  # (I, T, P)
    z = _regrouped(x, right)
    left_gradient = torch.bmm(upstream_segments.mT, z).unflatten(2, (J, t))
    z_gradient = torch.bmm(upstream_segments, left.flatten(2))  # (I, T, J t)
    z_gradient = z_gradient.unflatten(2, (J, t)).permute(2, 1, 0, 3).flatten(2)  # (J, T, I t)
    right_gradient = torch.bmm(z_gradient.mT, segments).unflatten(1, (I, t))
    x_gradient = torch.bmm(z_gradient, right.flatten(1, 2)).transpose(0, 1).flatten(1)
    return x_gradient.contiguous(), left_gradient, right_gradient


@_matmul_backward.register_fake
def _(upstream: Tensor, x: Tensor, left: Tensor, right: Tensor, permute_output: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), left.new_empty(left.shape), right.new_empty(right.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.permute_output = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.structmat.monarch_matmul_backward(upstream, *ctx.saved_tensors, ctx.permute_output)
    return *gradients, None


_matmul.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.structmat.monarch_matmul)
def _flops(x_shape: Any, left_shape: Any, right_shape: Any, *args: Any, **kwargs: Any) -> int:
    (I, P, J, t), Q = left_shape, right_shape[-1]
    return 2 * x_shape[0] * I * J * t * (P + Q)


@register_flop_formula(torch.ops.structmat.monarch_matmul_backward)
def _backward_flops(
    upstream_shape: Any, x_shape: Any, left_shape: Any, right_shape: Any, *args: Any, **kwargs: Any
) -> int:
    (I, P, J, t), Q = left_shape, right_shape[-1]
    return 2 * x_shape[0] * I * J * t * (2 * P + 3 * Q)
