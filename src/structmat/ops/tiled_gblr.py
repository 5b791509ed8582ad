"""Product with a sum of rank-1 blocks that is stored in tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structmat.ops.common import (
    TRITON,
    cast,
    plain,
    plain_backward,
    plain_gradients,
    save_inputs,
    shaped_like,
    side_by_side,
    triton_kernels,
)
from structmat.ops.tiling import (
    Inputs,
    Outputs,
    outer_products,
    rows_to_components,
    sorted_rows,
    tile_matmul,
    tile_matmul_in_chunks,
    tile_matmul_plainly,
    tile_project,
    tile_spread,
)


def tiled_gblr_matmul(x: Tensor, inputs: Inputs, outputs: Outputs, M: int, algorithm: str = "") -> Tensor:
    """Compute ``x @ W.T`` for a GBLR matrix in tiles; the operator is ``torch.ops.structmat.tiled_gblr_matmul``.

    Args:
        x: Input ``(..., N)``.
        inputs: The input axis: tiles ``(rows, B)``, ``S`` and ``H`` of each group of them, their blocks, the rows
            sorted by component, and where the rows of each component begin.
        outputs: The output axis: tiles, groups, blocks, and the component of each row.
        M: The number of entries of the output axis.
        algorithm: One of ``ALGORITHMS``; empty for the one that suits the device.

    Returns:
        Output ``(..., M)``.
    """
    x, right, left = cast(x, inputs[0], outputs[0])
    tokens = x.reshape(-1, x.shape[-1])
    if plain():
        y = tile_matmul_plainly(tokens, (right, *inputs[1:]), (left, *outputs[1:]), M)
    else:
        y = torch.ops.structmat.tiled_gblr_matmul(tokens, right, *inputs[1:], left, *outputs[1:], M, algorithm)
    return y.view(*x.shape[:-1], M)


def _tiled_triton(x: Tensor, inputs: Inputs, outputs: Outputs, M: int) -> Tensor:
    """Kernels of our own, for a GPU."""
    kernels = triton_kernels("gblr")

    return kernels.tile_matmul_forward(x.contiguous(), _side_by_side(inputs), _side_by_side(outputs), M)


def _side_by_side(axis: Any) -> Any:
    """The same tiles and indices, contiguous."""
    return tuple(part.contiguous() if isinstance(part, Tensor) else part for part in axis)


ALGORITHMS = {"tiles": tile_matmul, "chunks": tile_matmul_in_chunks, TRITON: _tiled_triton}
"""Ways to compute the product with tiles: triton's is for GPUs."""


@torch.library.custom_op("structmat::tiled_gblr_matmul", mutates_args=())
def _tiled(
    x: Tensor,
    right: Tensor,
    right_groups: Sequence[int],
    right_place: Tensor,
    right_rows: Tensor,
    right_offsets: Tensor,
    left: Tensor,
    left_groups: Sequence[int],
    left_place: Tensor,
    left_index: Tensor,
    M: int,
    algorithm: str,
) -> Tensor:
    inputs = right, right_groups, right_place, right_rows, right_offsets
    outputs = left, left_groups, left_place, left_index
    name = algorithm or ("chunks" if x.device.type == "cpu" else "tiles")
    return ALGORITHMS["tiles" if x.shape[0] == 0 else name](x, inputs, outputs, M)


@_tiled.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    *_, M, _ = rest
    return x.new_empty(x.shape[0], M)


@torch.library.custom_op("structmat::tiled_gblr_matmul_backward", mutates_args=())
def _tiled_backward(
    upstream: Tensor,
    x: Tensor,
    right: Tensor,
    right_groups: Sequence[int],
    right_place: Tensor,
    right_rows: Tensor,
    right_offsets: Tensor,
    left: Tensor,
    left_groups: Sequence[int],
    left_place: Tensor,
    left_index: Tensor,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = right, right_groups, right_place, right_rows, right_offsets
    outputs = left, left_groups, left_place, left_index
    if algorithm == TRITON and x.shape[0]:
        kernels = triton_kernels("gblr")

        upstream, x = side_by_side(upstream, x)
        return kernels.tile_matmul_backward(upstream, x, _side_by_side(inputs), _side_by_side(outputs))
    return _gradients(upstream, x, inputs, outputs)


def _gradients(upstream: Tensor, x: Tensor, inputs: Inputs, outputs: Outputs) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the input, and of the tiles of the input and the output axis."""
    right, right_groups, right_place, right_rows, right_offsets = inputs
    left, left_groups, left_place, left_index = outputs
    left_rows, left_offsets = sorted_rows(left_index.long(), len(right_offsets))
    right_index = rows_to_components(right_rows, right_offsets)
    z = tile_project(x, *inputs)
    z_gradient = tile_project(upstream, left, left_groups, left_place, left_rows, left_offsets)
    x_gradient = tile_spread(z_gradient, right, right_groups, right_place, right_index, x.shape[1]).contiguous()
    right_gradient = outer_products(x, z_gradient, right_groups, right_place, right_index, right.shape[1])
    left_gradient = outer_products(upstream, z, left_groups, left_place, left_index, left.shape[1])
    return x_gradient, right_gradient, left_gradient


@_tiled_backward.register_fake
def _(upstream: Tensor, x: Tensor, right: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return shaped_like(x, right, rest[4])


def _tiled_autograd(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    x, right, place, rows, offsets, left, *left_indices = ctx.saved_tensors
    groups, left_groups, M, algorithm = ctx.options
    inputs, outputs = (right, groups, place, rows, offsets), (left, left_groups, *left_indices)
    if plain_backward():
        return _plain_gradients(ctx, upstream, x, inputs, outputs, M)
    x, right, left = torch.ops.structmat.tiled_gblr_matmul_backward(upstream, x, *inputs, *outputs, algorithm)
    return x, right, None, None, None, None, left, None, None, None, None, None


def _plain_gradients(
    ctx: Any, upstream: Tensor, x: Tensor, inputs: Inputs, outputs: Outputs, M: int
) -> tuple[Tensor | None, ...]:
    def product(x: Tensor, right: Tensor, left: Tensor) -> Tensor:
        return tile_matmul_plainly(x, (right, *inputs[1:]), (left, *outputs[1:]), M)

    needs = ctx.needs_input_grad
    found = plain_gradients(product, (needs[0], needs[1], needs[6]), upstream, x, inputs[0], outputs[0])
    return found[0], found[1], None, None, None, None, found[2], None, None, None, None, None


_tiled.register_autograd(_tiled_autograd, setup_context=save_inputs)


@register_flop_formula(torch.ops.structmat.tiled_gblr_matmul)
def _tiled_flops(x_shape: Any, right_shape: Any, *args: Any, **kwargs: Any) -> int:
    left_shape = args[4]
    return 2 * x_shape[0] * (math.prod(right_shape) + math.prod(left_shape))


@register_flop_formula(torch.ops.structmat.tiled_gblr_matmul_backward)
def _tiled_backward_flops(upstream_shape: Any, x_shape: Any, right_shape: Any, *args: Any, **kwargs: Any) -> int:
    left_shape = args[4]
    return 2 * x_shape[0] * (3 * math.prod(right_shape) + 2 * math.prod(left_shape))
