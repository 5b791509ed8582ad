"""Product with a low-rank matrix."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structmat.ops.common import cast, linear, plain


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
        return F.linear(F.linear(x, right), left)
    y, _ = torch.ops.structmat.low_rank_matmul(x.reshape(-1, x.shape[-1]), left, right, algorithm)
    return y.view(*x.shape[:-1], left.shape[0])


@torch.library.custom_op("structmat::low_rank_matmul", mutates_args=())
def _matmul(x: Tensor, left: Tensor, right: Tensor, algorithm: str) -> tuple[Tensor, Tensor]:
    z = linear(x, right, algorithm)
    return linear(z, left, algorithm), z


@_matmul.register_fake
def _(x: Tensor, left: Tensor, right: Tensor, algorithm: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], left.shape[0]), x.new_empty(x.shape[0], right.shape[0])


@torch.library.custom_op("structmat::low_rank_matmul_backward", mutates_args=())
def _matmul_backward(
    upstream: Tensor, x: Tensor, z: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    z_gradient = upstream @ left
    return z_gradient @ right, upstream.mT @ z, z_gradient.mT @ x


@_matmul_backward.register_fake
def _(upstream: Tensor, x: Tensor, z: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), left.new_empty(left.shape), right.new_empty(right.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, left, right, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], left, right)


def _backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    if not any(ctx.needs_input_grad[1:3]):  # frozen factors: the product with the transposed matrix
        _, _, left, right = ctx.saved_tensors
        return torch.ops.structmat.low_rank_matmul(upstream, right.mT, left.mT, "linear")[0], None, None, None
    return *torch.ops.structmat.low_rank_matmul_backward(upstream, *ctx.saved_tensors), None


_matmul.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.structmat.low_rank_matmul)
def _flops(x_shape: Any, left_shape: Any, right_shape: Any, *args: Any, **kwargs: Any) -> int:
    (M, R), (_, N) = left_shape, right_shape
    return 2 * x_shape[0] * R * (M + N)


@register_flop_formula(torch.ops.structmat.low_rank_matmul_backward)
def _backward_flops(
    upstream_shape: Any, x_shape: Any, z_shape: Any, left_shape: Any, right_shape: Any, *args: Any, **kwargs: Any
) -> int:
    return 2 * _flops(x_shape, left_shape, right_shape)
