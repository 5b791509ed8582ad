"""Product with a BLAST matrix: the operators and their gradients.

The couplings decide the speed: written with broadcasting they materialise an ``I J T R`` tensor. For many tokens they
are one product of ``(R, I, J)`` with ``(R, J, T)``, whose operands are strided views of the neighbouring products. The
backward computes the intermediates again; where factors learn on a CPU from many tokens, ``blast_matmul_keeping`` keeps
the first, ``J R`` numbers per token, half of what PyTorch's own operators would keep.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structmat.ops.blast_algorithms import (
    ALGORITHMS,
    automatic,
    between,
    components_at_a_time,
    components_within,
    in_segments,
    turned,
    whole,
)
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
    triton_kernels,
    unwatched,
    workspace,
)

BACKWARD_BUFFER = 12
"""The MiB of one intermediate of the backward product on a CPU, whose larger products pay for the pages (tuned with
``benchmarks/cpu.py``)."""


def blast_matmul(x: Tensor, left: Tensor, diag: Tensor, right: Tensor, algorithm: str = "") -> Tensor:
    """Compute ``x @ W.T`` for blocks ``W_ij = left_i Diag(diag_ij) right_j`` (BLAST, Algorithm 1).

    It takes ``R (M + N + I J)`` multiplications per token. The operator is ``torch.ops.structmat.blast_matmul``.

    Args:
        x: Input ``(..., J Q)``.
        left: ``(I, P, R)``.
        diag: ``(I, J, R)``.
        right: ``(J, R, Q)``.
        algorithm: One of ``ALGORITHMS``; empty for the one that suits the tokens, the dtype and the device.

    Returns:
        Output ``(..., I P)``.
    """
    M = left.shape[0] * left.shape[1]
    x, left, diag, right = cast(x, left, diag, right)
    tokens = x.reshape(-1, x.shape[-1])
    if plain():
        y = whole(tokens, left, diag, right)
    elif not algorithm and keeps_intermediates(tokens, left, diag, right):
        y = torch.ops.structmat.blast_matmul_keeping(tokens, left, diag, right)[0]
    else:
        product = _product if unwatched(tokens, left, diag, right) else torch.ops.structmat.blast_matmul
        y = product(tokens, left, diag, right, algorithm)
    return y.view(*x.shape[:-1], M)


def _product(x: Tensor, left: Tensor, diag: Tensor, right: Tensor, algorithm: str) -> Tensor:
    side = min(left.shape[1], right.shape[2]) / max(diag.shape[:2])
    name = "whole" if x.shape[0] == 0 else algorithm or automatic(x, side)
    return ALGORITHMS[name](x, left, diag, right)


_matmul = torch.library.custom_op("structmat::blast_matmul", _product, mutates_args=())


@_matmul.register_fake
def _(x: Tensor, left: Tensor, diag: Tensor, right: Tensor, algorithm: str) -> Tensor:
    return x.new_empty(x.shape[0], left.shape[0] * left.shape[1])


@torch.library.custom_op("structmat::blast_matmul_keeping", mutates_args=())
def _keeping(x: Tensor, left: Tensor, diag: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The product, and ``right_j x_j (J, R, T)`` for the backward product; all tokens at once."""
    (I, P, R), J, T = left.shape, len(right), len(x)
    couplings = diag.permute(2, 0, 1).contiguous()  # (R, I, J)
    z, y = x.new_empty(J, R, T), x.new_empty(T, I * P)
    # sums over components are not rounded to 16 bits on the way
    step = R if is_half(x) else components_at_a_time(R, max(T, 1), max(I, J), x)
    h_memory, y_memory = workspace(x, I * step * T, I * P * T)
    segments, out = turned(x, right), y_memory.view(I, P, T)
    for r in range(0, R, step):
        part = slice(r, r + step)
        h = between(h_memory, (min(step, R - r), I, T), is_half(x))
        torch.bmm(right[:, part], segments, out=z[:, part])
        torch.bmm(couplings[part], z[:, part].transpose(0, 1), out=h)
        torch.baddbmm(out, left[:, :, part], h.transpose(0, 1), beta=0 if r == 0 else 1, out=out)
    y.copy_(out.flatten(0, 1).mT)
    return y, z


@_keeping.register_fake
def _(x: Tensor, left: Tensor, diag: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    T, (I, P, R) = x.shape[0], left.shape
    return x.new_empty(T, I * P), x.new_empty(right.shape[0], R, T)


@torch.library.custom_op("structmat::blast_matmul_backward", mutates_args=())
def _matmul_backward(
    upstream: Tensor, x: Tensor, left: Tensor, diag: Tensor, right: Tensor, kept: Tensor | None, algorithm: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if algorithm == TRITON and x.shape[0]:
        kernels = triton_kernels("blast")

        return kernels.blast_backward(*side_by_side(upstream, x, left, diag, right))
    in_half = is_half(x) and x.device.type == "cpu"
    gradients = _half_backward if in_half else _backward_in_parts
    x_gradient, left_gradient, coupling_gradient, right_gradient = gradients(upstream, x, left, diag, right, kept)
    diag_gradient = coupling_gradient.permute(1, 2, 0).contiguous()
    return x_gradient.flatten(0, 1).mT.contiguous(), left_gradient, diag_gradient, right_gradient


def _backward_in_parts(
    upstream: Tensor, x: Tensor, left: Tensor, diag: Tensor, right: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``x`` as ``(J, Q, T)``, ``left``, ``diag`` as ``(R, I, J)`` and ``right``, in parts on a CPU."""
    (I, _, R), (J, _, Q), T = left.shape, right.shape, x.shape[0]
    couplings = diag.permute(2, 0, 1).contiguous()  # (R, I, J)
    segments, upstream_segments = in_segments(x, right), in_segments(upstream, left.mT)  # (J, Q, T), (I, P, T)
    left_gradient, right_gradient = left.new_empty(left.shape), right.new_empty(right.shape)
    coupling_gradient = diag.new_empty(R, I, J)
    step = R if x.device.type != "cpu" else components_within(max(T, 1), max(I, J), x, BACKWARD_BUFFER)
    most = min(step, R)
    blocks = (I, I, J) if kept is not None else (I, I, J, J)
    buffers = workspace(x, *(count * most * T for count in blocks))
    x_gradient = x.new_empty(J, Q, T)
    for r in range(0, R, step):
        part, k = slice(r, r + step), min(step, R - r)
        h, h_gradient = buffers[0][: I * k * T].view(k, I, T), buffers[1][: I * k * T].view(I, k, T)
        z_gradient = buffers[2][: J * k * T].view(k, J, T)
        z = kept[:, part] if kept is not None else buffers[3][: J * k * T].view(J, k, T)
        if kept is None:
            torch.bmm(right[:, part], segments, out=z)
        torch.bmm(couplings[part], z.transpose(0, 1), out=h)
        torch.bmm(left[:, :, part].mT, upstream_segments, out=h_gradient)
        torch.bmm(couplings[part].mT, h_gradient.transpose(0, 1), out=z_gradient)
        torch.bmm(h_gradient.transpose(0, 1), z.permute(1, 2, 0), out=coupling_gradient[part])
        torch.bmm(upstream_segments, h.permute(1, 2, 0), out=left_gradient[:, :, part])
        torch.bmm(z_gradient.transpose(0, 1), segments.mT, out=right_gradient[:, part])
        torch.baddbmm(
            x_gradient, right[:, part].mT, z_gradient.transpose(0, 1), beta=0 if r == 0 else 1, out=x_gradient
        )
    return x_gradient, left_gradient, coupling_gradient, right_gradient


def _half_backward(
    upstream: Tensor, x: Tensor, left: Tensor, diag: Tensor, right: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, all at once, operands side by side: products in 16 bits copy others, slowly where they turn them."""
    (I, _, R), J, T = left.shape, len(right), x.shape[0]
    couplings = diag.permute(2, 0, 1).contiguous()  # (R, I, J)
    segments, upstream_segments = turned(x, right), turned(upstream, left.mT)  # (J, Q, T), (I, P, T)
    memory = workspace(x, *[max(I, J) * R * T] * 3)

    def held(buffer: int, *shape: int) -> Tensor:
        return memory[buffer][: math.prod(shape)].view(shape)

    z = torch.bmm(right, segments, out=held(1, J, R, T)) if kept is None else kept
    z = held(0, R, J, T).copy_(z.transpose(0, 1))
    h = held(2, I, R, T).copy_(torch.bmm(couplings, z, out=held(1, R, I, T)).transpose(0, 1))
    left_gradient = torch.bmm(upstream_segments, h.mT)
    h_gradient = torch.bmm(left.mT, upstream_segments, out=held(1, I, R, T))
    h_gradient = held(2, R, I, T).copy_(h_gradient.transpose(0, 1))
    coupling_gradient = torch.bmm(h_gradient, z.mT)
    z_gradient = torch.bmm(couplings.mT, h_gradient, out=held(1, R, J, T))
    z_gradient = held(0, J, R, T).copy_(z_gradient.transpose(0, 1))
    right_gradient = torch.bmm(z_gradient, segments.mT)
    x_gradient = torch.bmm(right.mT, z_gradient)  # (J, Q, T)
    return x_gradient, left_gradient, coupling_gradient, right_gradient


_matmul_backward.register_fake(lambda upstream, x, left, diag, right, *_: shaped_like(x, left, diag, right))


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    if plain_backward():
        return *plain_gradients(whole, ctx.needs_input_grad, upstream, *ctx.saved_tensors), None
    if not any(ctx.needs_input_grad[1:4]):  # frozen factors: the product with the transposed matrix
        _, left, diag, right = ctx.saved_tensors
        factors = right.mT, diag.transpose(0, 1), left.mT
        return torch.ops.structmat.blast_matmul(upstream, *factors, *ctx.options), None, None, None, None
    return *torch.ops.structmat.blast_matmul_backward(upstream, *ctx.saved_tensors, None, *ctx.options), None


_matmul.register_autograd(_backward, setup_context=save_inputs)


def _keeping_backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 4
    if plain_backward():
        return plain_gradients(whole, ctx.needs_input_grad, upstream, *ctx.saved_tensors[:4])
    return torch.ops.structmat.blast_matmul_backward(upstream, *ctx.saved_tensors, "")


_keeping.register_autograd(_keeping_backward, setup_context=save_with_kept)


@register_flop_formula([torch.ops.structmat.blast_matmul, torch.ops.structmat.blast_matmul_keeping])
def _flops(x_shape: Any, left_shape: Any, diag_shape: Any, right_shape: Any, *args: Any, **kwargs: Any) -> int:
    (I, P, R), (J, _, Q) = left_shape, right_shape
    return 2 * x_shape[0] * R * (I * P + J * Q + I * J)


@register_flop_formula(torch.ops.structmat.blast_matmul_backward)
def _backward_flops(
    _: Any, x_shape: Any, left_shape: Any, diag_shape: Any, right_shape: Any, *rest: Any, **kwargs: Any
) -> int:
    (I, P, R), (J, _, Q) = left_shape, right_shape
    return 2 * x_shape[0] * R * (2 * I * P + (3 if rest[0] is None else 2) * J * Q + 3 * I * J)
