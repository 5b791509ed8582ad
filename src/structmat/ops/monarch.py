"""Product with a Monarch (block low-rank) matrix.

The numbers were tuned by measurement on a CPU; ``benchmarks/cpu.py`` times the layers in which a change of them shows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structmat.ops.common import (
    TRITON,
    cast,
    is_half,
    keeps_intermediates,
    plain,
    plain_backward,
    plain_gradients,
    save_inputs,
    save_with_kept,
    shaped_like,
    side_by_side,
    tokens_within,
    triton_kernels,
    unwatched,
    workspace,
)

BUFFER = 48
"""The MiB of an intermediate on a CPU; half as much for dtypes of 16 bits (tuned with ``benchmarks/cpu.py``)."""

MANY_TOKENS = 256
"""From this many tokens on, a CPU works in parts in float32: one block row after the other for ranks up to
``SMALL_RANK`` (tuned with ``benchmarks/cpu.py``)."""

SMALL_RANK = 64
"""The largest rank of blocks for which it goes so (tuned with ``benchmarks/cpu.py``)."""


def monarch_matmul(x: Tensor, left: Tensor, right: Tensor, permute_output: bool = False, algorithm: str = "") -> Tensor:
    """Compute ``x @ W.T`` for a Monarch matrix in ``t (J M + I N)`` multiplications per token.

    The operator is ``torch.ops.structmat.monarch_matmul``. Its backward computes the intermediate again; where factors
    learn on a CPU from many tokens, ``monarch_matmul_keeping`` keeps it, ``I J t`` numbers per token.

    Args:
        x: Input ``(..., J Q)``.
        left: ``(I, P, J, t)``.
        right: ``(J, I, t, Q)``.
        permute_output: Whether entry ``p`` of output block ``i`` comes at ``p I + i`` (Dao et al. 2022).
        algorithm: One of ``ALGORITHMS``; empty for the one that suits the tokens, the dtype and the device.

    Returns:
        Output ``(..., I P)``.
    """
    x, left, right = cast(x, left, right)
    tokens = x.reshape(-1, x.shape[-1])
    if plain():
        y = _whole(tokens, left, right, permute_output)
    elif not algorithm and keeps_intermediates(tokens, left, right):
        y = torch.ops.structmat.monarch_matmul_keeping(tokens, left, right, permute_output)[0]
    else:
        product = _product if unwatched(tokens, left, right) else torch.ops.structmat.monarch_matmul
        y = product(tokens, left, right, permute_output, algorithm)
    return y.view(*x.shape[:-1], y.shape[-1])


def _product(x: Tensor, left: Tensor, right: Tensor, permute_output: bool, algorithm: str) -> Tensor:
    name = "whole" if x.shape[0] == 0 else algorithm or _automatic(x, left)
    return ALGORITHMS[name](x, left, right, permute_output)


_matmul = torch.library.custom_op("structmat::monarch_matmul", _product, mutates_args=())


@_matmul.register_fake
def _(x: Tensor, left: Tensor, right: Tensor, permute_output: bool, algorithm: str) -> Tensor:
    return x.new_empty(x.shape[0], left.shape[0] * left.shape[1])


def _automatic(x: Tensor, left: Tensor) -> str:
    if is_half(x) and x.device.type == "cpu":
        return "tokens"
    if x.device.type != "cpu" or x.shape[0] < MANY_TOKENS:
        return "whole"
    return "rows" if left.shape[3] <= SMALL_RANK else "tokens"


def _whole(x: Tensor, left: Tensor, right: Tensor, permute_output: bool) -> Tensor:
    """All tokens at once."""
    y = torch.bmm(_regrouped(x, right), left.flatten(2).mT)  # (I, T, P)
    return (y.permute(1, 2, 0) if permute_output else y.transpose(0, 1)).flatten(1).contiguous()


def _tokens(x: Tensor, left: Tensor, right: Tensor, permute_output: bool) -> Tensor:
    """Some of the tokens at a time."""
    I, P, J, t = left.shape
    y = x.new_empty(x.shape[0], I * P)
    step = tokens_within(BUFFER / 2 if is_half(x) else BUFFER, I * J * t, x)
    matrices = left.flatten(2).mT  # (I, J t, P)
    for some, out in zip(x.split(step), _out_segments(y, I, permute_output).split(step, 1), strict=True):
        torch.bmm(_regrouped(some, right), matrices, out=out)
    return y


def _by_rows(x: Tensor, left: Tensor, right: Tensor, permute_output: bool) -> Tensor:
    """One block row after the other: what the columns give it is side by side already."""
    (I, P, _, _), (J, _, t, Q) = left.shape, right.shape
    y = x.new_empty(x.shape[0], I * P)
    out = _out_segments(y, I, permute_output)
    segments = x.unflatten(1, (J, Q)).permute(1, 2, 0)  # (J, Q, T)
    z = x.new_empty(J, t, x.shape[0])
    for i in range(I):
        torch.bmm(right[:, i], segments, out=z)
        out[i].copy_(torch.mm(z.flatten(0, 1).mT, left[i].flatten(1).mT))
    return y


def _triton(x: Tensor, left: Tensor, right: Tensor, permute_output: bool) -> Tensor:
    """Kernels of our own, for a GPU."""
    kernels = triton_kernels("monarch")

    x, left, right = side_by_side(x, left, right)
    return kernels.monarch_forward(x, left, right, permute_output)


ALGORITHMS: dict[str, Callable[[Tensor, Tensor, Tensor, bool], Tensor]] = {
    "tokens": _tokens,
    "rows": _by_rows,
    "whole": _whole,
    TRITON: _triton,
}
"""Ways to compute the product: right for every shape, dtype and device, but for triton's, which are for GPUs."""


def _out_segments(y: Tensor, I: int, permute_output: bool) -> Tensor:
    """``(T, I P)`` as ``(I, T, P)``."""
    if permute_output:
        return y.unflatten(1, (-1, I)).permute(2, 0, 1)
    return y.unflatten(1, (I, -1)).transpose(0, 1)


def _regrouped(x: Tensor, right: Tensor) -> Tensor:
    """What each block column makes of its segment, sorted by block row: ``(I, T, J t)``."""
    J, I, t, Q = right.shape
    segments = x.unflatten(1, (J, Q)).transpose(0, 1)  # (J, T, Q)
    z = torch.bmm(segments, right.flatten(1, 2).mT)  # (J, T, I t)
    return z.unflatten(2, (I, t)).permute(2, 1, 0, 3).flatten(2)


@torch.library.custom_op("structmat::monarch_matmul_keeping", mutates_args=())
def _keeping(x: Tensor, left: Tensor, right: Tensor, permute_output: bool) -> tuple[Tensor, Tensor]:
    """The product, and what lies between its two for the backward product, sorted by block row ``(I, T, J t)``."""
    (I, P, J, t), Q, T = left.shape, right.shape[-1], len(x)
    y, z = x.new_empty(T, I * P), x.new_empty(I, T, J * t)
    step = min(T, tokens_within(BUFFER / 2 if is_half(x) else BUFFER, I * J * t, x))
    (memory,) = workspace(x, I * J * t * step)
    out, matrices, columns = _out_segments(y, I, permute_output), left.flatten(2).mT, right.flatten(1, 2).mT
    for begin in range(0, T, max(step, 1)):
        some = slice(begin, begin + step)
        segments = x[some].unflatten(1, (J, Q)).transpose(0, 1)  # (J, n, Q)
        n = segments.shape[1]
        by_column = torch.bmm(segments, columns, out=memory[: I * J * t * n].view(J, n, I * t))
        z[:, some].unflatten(2, (J, t)).copy_(by_column.unflatten(2, (I, t)).permute(2, 1, 0, 3))
        torch.bmm(z[:, some], matrices, out=out[:, some])
    return y, z


@_keeping.register_fake
def _(x: Tensor, left: Tensor, right: Tensor, permute_output: bool) -> tuple[Tensor, Tensor]:
    I, P, J, t = left.shape
    return x.new_empty(x.shape[0], I * P), x.new_empty(I, x.shape[0], J * t)


@torch.library.custom_op("structmat::monarch_matmul_backward", mutates_args=())
def _matmul_backward(
    upstream: Tensor, x: Tensor, left: Tensor, right: Tensor, kept: Tensor | None, permute_output: bool, algorithm: str
) -> tuple[Tensor, Tensor, Tensor]:
    if algorithm == TRITON and x.shape[0]:
        kernels = triton_kernels("monarch")

        upstream, x, left, right = side_by_side(upstream, x, left, right)
        return kernels.monarch_backward(upstream, x, left, right, permute_output)
    (I, _, J, t), Q, T = left.shape, right.shape[-1], len(x)
    segments = x.unflatten(1, (J, Q)).transpose(0, 1)  # (J, T, Q)
    upstream_segments = _out_segments(upstream, I, permute_output)  # (I, T, P)
    z = _regrouped(x, right) if kept is None else kept
    left_gradient = torch.bmm(upstream_segments.mT, z).unflatten(2, (J, t))
    by_row, by_column = workspace(x, I * J * t * T, I * J * t * T)
    by_row = torch.bmm(upstream_segments, left.flatten(2), out=by_row.view(I, T, J * t))
    z_gradient = by_column.view(J, T, I * t)
    z_gradient.unflatten(2, (I, t)).copy_(by_row.unflatten(2, (J, t)).permute(2, 1, 0, 3))
    right_gradient = torch.bmm(z_gradient.mT, segments).unflatten(1, (I, t))
    x_gradient = x.new_empty(T, J * Q)
    torch.bmm(z_gradient, right.flatten(1, 2), out=x_gradient.unflatten(1, (J, Q)).transpose(0, 1))
    return x_gradient, left_gradient, right_gradient


_matmul_backward.register_fake(lambda upstream, x, left, right, *_: shaped_like(x, left, right))


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    if plain_backward():
        return *_plain_gradients(ctx, upstream), None
    if not any(ctx.needs_input_grad[1:3]):  # frozen factors: the product with the transposed matrix
        _, left, right = ctx.saved_tensors
        permute_output, algorithm = ctx.options
        if permute_output:
            upstream = upstream.unflatten(1, (-1, left.shape[0])).transpose(1, 2).flatten(1)
        factors = right.permute(0, 3, 1, 2).contiguous(), left.permute(0, 2, 3, 1).contiguous()
        return torch.ops.structmat.monarch_matmul(upstream, *factors, False, algorithm), None, None, None, None
    gradients = torch.ops.structmat.monarch_matmul_backward(upstream, *ctx.saved_tensors, None, *ctx.options)
    return *gradients, None, None


_matmul.register_autograd(_backward, setup_context=save_inputs)


def _plain_gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    permute_output = ctx.options[0]
    product = functools.partial(_whole, permute_output=permute_output)
    return *plain_gradients(product, ctx.needs_input_grad, upstream, *ctx.saved_tensors[:3]), None


def _keeping_backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 4
    if plain_backward():
        return _plain_gradients(ctx, upstream)
    gradients = torch.ops.structmat.monarch_matmul_backward(upstream, *ctx.saved_tensors, *ctx.options, "")
    return *gradients, None


_keeping.register_autograd(_keeping_backward, setup_context=save_with_kept)


@register_flop_formula([torch.ops.structmat.monarch_matmul, torch.ops.structmat.monarch_matmul_keeping])
def _flops(x_shape: Any, left_shape: Any, right_shape: Any, *args: Any, **kwargs: Any) -> int:
    (I, P, J, t), Q = left_shape, right_shape[-1]
    return 2 * x_shape[0] * I * J * t * (P + Q)


@register_flop_formula(torch.ops.structmat.monarch_matmul_backward)
def _backward_flops(
    upstream_shape: Any, x_shape: Any, left_shape: Any, right_shape: Any, kept_shape: Any, *args: Any, **kwargs: Any
) -> int:
    (I, P, J, t), Q = left_shape, right_shape[-1]
    return 2 * x_shape[0] * I * J * t * (2 * P + (3 if kept_shape is None else 2) * Q)
