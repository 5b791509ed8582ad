"""Product with a sum of rank-1 blocks."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structmat.ops.common import cast, plain, plain_backward, plain_gradients, save_inputs, shaped_like
from structmat.ops.tiling import (
    in_full_length,
    tile_matmul,
    tile_matmul_in_chunks,
    tile_project,
    tile_spread,
    tiling,
)


def gblr_matmul(x: Tensor, left: Tensor, right: Tensor, start: Tensor, width: Tensor, order: Tensor, M: int) -> Tensor:
    """Compute ``x @ W.T`` for a GBLR matrix in ``entries`` multiplications per token, and some more for padding.

    Args:
        x: Input ``(..., N)``.
        left: The contents on the output axis, flat.
        right: The contents on the input axis, flat.
        start: The first entries of the segments on both axes, ``(2, K)``.
        width: The widths of the segments on both axes, ``(2, K)``.
        order: The component on the input axis that each on the output axis goes with, ``(K,)``.
        M: The number of entries of the output axis.

    Returns:
        Output ``(..., M)``.
    """
    x, left, right = cast(x, left, right)
    product = _definition if plain() else torch.ops.structmat.gblr_matmul
    y = product(x.reshape(-1, x.shape[-1]), left, right, start, width, order, M)
    return y.view(*x.shape[:-1], M)


def _definition(x: Tensor, left: Tensor, right: Tensor, start: Tensor, width: Tensor, order: Tensor, M: int) -> Tensor:
    """The product with contents in full length: tiles hang on the segments, which a graph cannot look at."""
    left = in_full_length(left, start[0], width[0], M)
    right = in_full_length(right, start[1], width[1], x.shape[1])[order.long()]
    return F.linear(F.linear(x, right), left.mT)


@torch.library.custom_op("structmat::gblr_matmul", mutates_args=())
def _matmul(x: Tensor, left: Tensor, right: Tensor, start: Tensor, width: Tensor, order: Tensor, M: int) -> Tensor:
    if x.shape[0] == 0 or len(order) == 0:
        return x.new_zeros(x.shape[0], M)
    inputs, outputs = tiling(start[1], width[1], x.shape[1]), tiling(start[0], width[0], M)
    index = order.long()[outputs.index]
    product = tile_matmul_in_chunks if x.device.type == "cpu" else tile_matmul
    return product(
        x,
        (inputs.packed(right), inputs.groups, inputs.blocks, *inputs.bags(len(order))),
        (outputs.packed(left), outputs.groups, outputs.blocks, index),
        M,
    )


@_matmul.register_fake
def _(x: Tensor, left: Tensor, right: Tensor, start: Tensor, width: Tensor, order: Tensor, M: int) -> Tensor:
    return x.new_empty(x.shape[0], M)


@torch.library.custom_op("structmat::gblr_matmul_backward", mutates_args=())
def _matmul_backward(
    upstream: Tensor, x: Tensor, left: Tensor, right: Tensor, start: Tensor, width: Tensor, order: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if x.shape[0] == 0 or len(order) == 0:
        return x.new_zeros(x.shape), left.new_zeros(left.shape), right.new_zeros(right.shape)
    (M, N), K = (upstream.shape[1], x.shape[1]), len(order)
    inputs, outputs = tiling(start[1], width[1], N), tiling(start[0], width[0], M)
    packed = inputs.packed(right)
    z = tile_project(x, packed, inputs.groups, inputs.blocks, *inputs.bags(K))[order.long()]
    z_gradient = tile_project(upstream, outputs.packed(left), outputs.groups, outputs.blocks, *outputs.bags(K))
    left_gradient = outputs.outer(upstream, z)
    z_gradient = torch.empty_like(z).index_copy(0, order.long(), z_gradient)
    x_gradient = tile_spread(z_gradient, packed, inputs.groups, inputs.blocks, inputs.index, N)
    return x_gradient.contiguous(), left_gradient, inputs.outer(x, z_gradient)


_matmul_backward.register_fake(lambda upstream, x, left, right, *_: shaped_like(x, left, right))


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    if plain_backward():
        x, left, right, *segments = ctx.saved_tensors
        start, width, order = segments
        product = functools.partial(_definition, start=start, width=width, order=order, M=ctx.options[0])
        return *plain_gradients(product, ctx.needs_input_grad, upstream, x, left, right), None, None, None, None
    gradients = torch.ops.structmat.gblr_matmul_backward(upstream, *ctx.saved_tensors)
    return *gradients, None, None, None, None


_matmul.register_autograd(_backward, setup_context=save_inputs)


@register_flop_formula(torch.ops.structmat.gblr_matmul)
def _flops(x_shape: Any, left_shape: Any, right_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x_shape[0] * (left_shape[0] + right_shape[0])


@register_flop_formula(torch.ops.structmat.gblr_matmul_backward)
def _backward_flops(
    upstream_shape: Any, x_shape: Any, left_shape: Any, right_shape: Any, *args: Any, **kwargs: Any
) -> int:
    return 2 * x_shape[0] * (2 * left_shape[0] + 3 * right_shape[0])  # the components' values once more
