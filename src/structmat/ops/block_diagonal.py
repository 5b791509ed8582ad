"""Product with a block-diagonal matrix."""

from __future__ import annotations

from collections.abc import Callable
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
    unwatched,
)


def block_diagonal_matmul(x: Tensor, blocks: Tensor, algorithm: str = "") -> Tensor:
    """Compute ``x @ W.T`` for ``W`` with ``blocks`` on its diagonal, in ``I P Q`` multiplications per token.

    The operator is ``torch.ops.structmat.block_diagonal_matmul``.

    Args:
        x: Input ``(..., I Q)``.
        blocks: ``(I, P, Q)``.
        algorithm: One of ``ALGORITHMS``; empty for the one that suits the device.

    Returns:
        Output ``(..., I P)``.
    """
    I, P, _ = blocks.shape
    x, blocks = cast(x, blocks)
    tokens = x.reshape(-1, x.shape[-1])
    if plain():
        y = _whole(tokens, blocks)
    else:
        product = _product if unwatched(tokens, blocks) else torch.ops.structmat.block_diagonal_matmul
        y = product(tokens, blocks, algorithm)
    return y.view(*x.shape[:-1], I * P)


def _whole(x: Tensor, blocks: Tensor) -> Tensor:
    segments = x.unflatten(1, (blocks.shape[0], blocks.shape[2])).transpose(0, 1)  # (I, T, Q)
    return torch.bmm(segments, blocks.mT).transpose(0, 1).flatten(1).contiguous()


def _in_place(x: Tensor, blocks: Tensor) -> Tensor:
    """The products written where they belong."""
    I, P, Q = blocks.shape
    y = x.new_empty(x.shape[0], I * P)
    segments = x.unflatten(1, (I, Q)).transpose(0, 1)  # (I, T, Q)
    torch.bmm(segments, blocks.mT, out=y.unflatten(1, (I, P)).transpose(0, 1))
    return y


def _triton(x: Tensor, blocks: Tensor) -> Tensor:
    """Kernels of our own, for a GPU."""
    kernels = triton_kernels("block_diagonal")

    return kernels.block_diagonal_forward(*side_by_side(x, blocks))


ALGORITHMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"in_place": _in_place, "whole": _whole, TRITON: _triton}
"""Ways to compute the product: right for every shape, dtype and device, but for triton's, which are for GPUs."""


def _product(x: Tensor, blocks: Tensor, algorithm: str) -> Tensor:
    name = "whole" if x.shape[0] == 0 else algorithm or ("in_place" if x.device.type == "cpu" else "whole")
    return ALGORITHMS[name](x, blocks)


_matmul = torch.library.custom_op("structmat::block_diagonal_matmul", _product, mutates_args=())


@_matmul.register_fake
def _(x: Tensor, blocks: Tensor, algorithm: str) -> Tensor:
    return x.new_empty(x.shape[0], blocks.shape[0] * blocks.shape[1])


@torch.library.custom_op("structmat::block_diagonal_matmul_backward", mutates_args=())
def _matmul_backward(upstream: Tensor, x: Tensor, blocks: Tensor, algorithm: str) -> tuple[Tensor, Tensor]:
    if algorithm == TRITON and x.shape[0]:
        kernels = triton_kernels("block_diagonal")

        return kernels.block_diagonal_backward(*side_by_side(upstream, x, blocks))
    I, P, Q = blocks.shape
    segments = x.unflatten(1, (I, Q)).transpose(0, 1)  # (I, T, Q)
    upstream_segments = upstream.unflatten(1, (I, P)).transpose(0, 1)  # (I, T, P)
    return _whole(upstream, blocks.mT), torch.bmm(upstream_segments.mT, segments)


_matmul_backward.register_fake(lambda upstream, x, blocks, algorithm: shaped_like(x, blocks))


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    if plain_backward():
        return *plain_gradients(_whole, ctx.needs_input_grad, upstream, *ctx.saved_tensors), None
    gradients = torch.ops.structmat.block_diagonal_matmul_backward(upstream, *ctx.saved_tensors, *ctx.options)
    return *gradients, None


_matmul.register_autograd(_backward, setup_context=save_inputs)


@register_flop_formula(torch.ops.structmat.block_diagonal_matmul)
def _flops(x_shape: Any, blocks_shape: Any, *args: Any, **kwargs: Any) -> int:
    I, P, Q = blocks_shape
    return 2 * x_shape[0] * I * P * Q


@register_flop_formula(torch.ops.structmat.block_diagonal_matmul_backward)
def _backward_flops(upstream_shape: Any, x_shape: Any, blocks_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(x_shape, blocks_shape)
