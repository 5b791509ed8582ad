"""Product with a low-rank matrix."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structmat.ops.common import (
    cast,
    linear,
    plain,
    plain_backward,
    plain_gradients,
    save_with_kept,
    shaped_like,
    unwatched,
)


def low_rank_matmul(x: Tensor, left: Tensor, right: Tensor, algorithm: str = "") -> Tensor:
    """Compute ``x @ (left @ right).T`` in ``R (M + N)`` multiplications per token.

    The operator is ``torch.ops.structmat.low_rank_matmul``; it returns ``x @ right.T`` too, for the backward.

    Args:
        x: Input ``(..., N)``.
        left: ``(M, R)``.
        right: ``(R, N)``.
        algorithm: One of ``common.LINEAR``; empty for the one that suits the tokens, the dtype and the device.

    Returns:
        Output ``(..., M)``.
    """
    x, left, right = cast(x, left, right)
    if plain():
        return _definition(x, left, right)
    tokens = x.reshape(-1, x.shape[-1])
    product = _product if unwatched(tokens, left, right) else torch.ops.structmat.low_rank_matmul
    y, _ = product(tokens, left, right, algorithm)
    return y.view(*x.shape[:-1], left.shape[0])


def _definition(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return F.linear(F.linear(x, right), left)


def _product(x: Tensor, left: Tensor, right: Tensor, algorithm: str) -> tuple[Tensor, Tensor]:
    z = linear(x, right, algorithm)
    return linear(z, left, algorithm), z


_matmul = torch.library.custom_op("structmat::low_rank_matmul", _product, mutates_args=())


@_matmul.register_fake
def _(x: Tensor, left: Tensor, right: Tensor, algorithm: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], left.shape[0]), x.new_empty(x.shape[0], right.shape[0])


@torch.library.custom_op("structmat::low_rank_matmul_backward", mutates_args=())
def _matmul_backward(
    upstream: Tensor, x: Tensor, z: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    z_gradient = upstream @ left
    return z_gradient @ right, upstream.mT @ z, z_gradient.mT @ x


_matmul_backward.register_fake(lambda upstream, x, z, left, right: shaped_like(x, left, right))


def _backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 4
    x, left, right, z = ctx.saved_tensors
    if plain_backward():
        return *plain_gradients(_definition, ctx.needs_input_grad, upstream, x, left, right), None
    if not any(ctx.needs_input_grad[1:3]):  # frozen factors: the product with the transposed matrix
        return torch.ops.structmat.low_rank_matmul(upstream, right.mT, left.mT, "linear")[0], None, None, None
    return *torch.ops.structmat.low_rank_matmul_backward(upstream, x, z, left, right), None


_matmul.register_autograd(_backward, setup_context=save_with_kept)


@register_flop_formula(torch.ops.structmat.low_rank_matmul)
def _flops(x_shape: Any, left_shape: Any, right_shape: Any, *args: Any, **kwargs: Any) -> int:
    (M, R), (_, N) = left_shape, right_shape
    return 2 * x_shape[0] * R * (M + N)


@register_flop_formula(torch.ops.structmat.low_rank_matmul_backward)
def _backward_flops(
    upstream_shape: Any, x_shape: Any, z_shape: Any, left_shape: Any, right_shape: Any, *args: Any, **kwargs: Any
) -> int:
    return 2 * _flops(x_shape, left_shape, right_shape)
