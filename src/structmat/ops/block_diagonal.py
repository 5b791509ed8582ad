"""Product with a block-diagonal matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structmat.ops.common import cast, plain


def block_diagonal_matmul(x: Tensor, blocks: Tensor) -> Tensor:
    """Compute ``x @ W.T`` for ``W`` with ``blocks`` on its diagonal, in ``I P Q`` multiplications per token.

    The operator is ``torch.ops.structmat.block_diagonal_matmul``.

    Args:
        x: Input ``(..., I Q)``.
        blocks: ``(I, P, Q)``.

    Returns:
        Output ``(..., I P)``.
    """
    I, P, _ = blocks.shape
    x, blocks = cast(x, blocks)
    product = _whole if plain() else torch.ops.structmat.block_diagonal_matmul
    return product(x.reshape(-1, x.shape[-1]), blocks).view(*x.shape[:-1], I * P)


def _whole(x: Tensor, blocks: Tensor) -> Tensor:
    segments = x.unflatten(1, (blocks.shape[0], blocks.shape[2])).transpose(0, 1)  # (I, T, Q)
    return torch.bmm(segments, blocks.mT).transpose(0, 1).flatten(1).contiguous()


@torch.library.custom_op("structmat::block_diagonal_matmul", mutates_args=())
def _matmul(x: Tensor, blocks: Tensor) -> Tensor:
    if x.device.type != "cpu":
        return _whole(x, blocks)
    I, P, Q = blocks.shape
    y = x.new_empty(x.shape[0], I * P)
    segments = x.unflatten(1, (I, Q)).transpose(0, 1)  # (I, T, Q)
    torch.bmm(segments, blocks.mT, out=y.unflatten(1, (I, P)).transpose(0, 1))
    return y


@_matmul.register_fake
def _(x: Tensor, blocks: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], blocks.shape[0] * blocks.shape[1])


@torch.library.custom_op("structmat::block_diagonal_matmul_backward", mutates_args=())
def _matmul_backward(upstream: Tensor, x: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    I, P, Q = blocks.shape
    segments = x.unflatten(1, (I, Q)).transpose(0, 1)  # (I, T, Q)
    upstream_segments = upstream.unflatten(1, (I, P)).transpose(0, 1)  # (I, T, P)
    return _whole(upstream, blocks.mT), torch.bmm(upstream_segments.mT, segments)


@_matmul_backward.register_fake
def _(upstream: Tensor, x: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), blocks.new_empty(blocks.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.structmat.block_diagonal_matmul_backward(upstream, *ctx.saved_tensors)


_matmul.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.structmat.block_diagonal_matmul)
def _flops(x_shape: Any, blocks_shape: Any, *args: Any, **kwargs: Any) -> int:
    I, P, Q = blocks_shape
    return 2 * x_shape[0] * I * P * Q


@register_flop_formula(torch.ops.structmat.block_diagonal_matmul_backward)
def _backward_flops(upstream_shape: Any, x_shape: Any, blocks_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(x_shape, blocks_shape)
