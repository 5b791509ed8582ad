"""Product with a BLAST matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structmat.ops.common import (
    MIB,
    TRITON,
    cast,
    is_half,
    keeps_intermediates,
    plain,
    save_with_kept,
    side_by_side,
    tokens_within,
    workspace,
)

FEW_TOKENS = 4
"""Up to this many tokens a CPU multiplies vectors with matrices; beyond, matrices with matrices."""

LARGE_BLOCKS = 32
"""Sides of blocks relative to their number along an axis from which it does so for any number of tokens."""

LARGE_HALF_BLOCKS = 128
"""The same for 16 bits."""

BUFFER = 2
"""MiB of one intermediate on a CPU in float32, but where that is less than one of ``PARTS`` of the components."""

PARTS = 6
"""Most parts of the components: more of them read and write the output too often."""

OUTPUT_BUFFER = 16
"""MiB of the output on the way."""

BACKWARD_BUFFER = 12
"""MiB of one intermediate of the backward product, whose larger products pay for the pages."""

TOKENS = 512
"""At a time on a CPU in float32; fewer where the output is wide."""

HALF_BUFFER = 24
"""MiB, for dtypes of 16 bits."""

HALF_TOKENS = 256
"""At a time on a CPU, for dtypes of 16 bits; twice as many where the factors are large, so that they are read less."""

LARGE_FACTORS = 8
"""MiB, in 16 bits."""

SOME_TOKENS = 32
"""Up to this many on a CPU, the first product is that of vectors with matrices; half as many for 16 bits."""


def blast_matmul(x: Tensor, left: Tensor, diag: Tensor, right: Tensor, algorithm: str = "") -> Tensor:
    """Compute ``x @ W.T`` for blocks ``W_ij = left_i Diag(diag_ij) right_j`` (BLAST, Algorithm 1).

    ``R (M + N + I J)`` multiplications per token. The couplings are the trap: written with broadcasting they
    materialise an ``I J T R`` tensor. For many tokens they are one product of ``(R, I, J)`` with ``(R, J, T)``, whose
    operands are strided views of the neighbouring products. The operator is ``torch.ops.structmat.blast_matmul``. Its
    backward computes the intermediates again; where factors learn on a CPU from many tokens, ``blast_matmul_keeping``
    keeps the first, ``J R`` numbers per token, half of what PyTorch's own operators would keep.

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
        y = _whole(tokens, left, diag, right)
    elif not algorithm and keeps_intermediates(tokens, left, diag, right):
        y = torch.ops.structmat.blast_matmul_keeping(tokens, left, diag, right)[0]
    else:
        y = torch.ops.structmat.blast_matmul(tokens, left, diag, right, algorithm)
    return y.view(*x.shape[:-1], M)


@torch.library.custom_op("structmat::blast_matmul", mutates_args=())
def _matmul(x: Tensor, left: Tensor, diag: Tensor, right: Tensor, algorithm: str) -> Tensor:
    name = (
        "whole"
        if x.shape[0] == 0
        else algorithm or _automatic(x, min(left.shape[1], right.shape[2]) / max(diag.shape[:2]))
    )
    return ALGORITHMS[name](x, left, diag, right)


@_matmul.register_fake
def _(x: Tensor, left: Tensor, diag: Tensor, right: Tensor, algorithm: str) -> Tensor:
    return x.new_empty(x.shape[0], left.shape[0] * left.shape[1])


def _automatic(x: Tensor, side: float) -> str:
    """The algorithm, for the shorter side of blocks relative to their number along an axis."""
    if x.device.type != "cpu":
        return "whole"
    if x.shape[0] <= FEW_TOKENS or side >= (LARGE_HALF_BLOCKS if is_half(x) else LARGE_BLOCKS):
        return "vectors"
    if is_half(x):
        return "tokens"
    return "vectors first" if x.shape[0] <= SOME_TOKENS else "components"


def _whole(x: Tensor, left: Tensor, diag: Tensor, right: Tensor) -> Tensor:
    """All tokens at once."""
    z = torch.bmm(right, _segments(x, right))  # (J, R, T)
    h = torch.bmm(diag.permute(2, 0, 1), z.transpose(0, 1)).transpose(0, 1)  # (I, R, T)
    return torch.bmm(left, h).flatten(0, 1).mT.contiguous()


def _few(x: Tensor, left: Tensor, diag: Tensor, right: Tensor) -> Tensor:
    """Vectors times matrices: each factor is read once, along its rows; couplings one block column after the other."""
    if x.shape[0] > TOKENS:
        return torch.cat([_few(some, left, diag, right) for some in x.split(TOKENS)])
    J, _, Q = right.shape
    z = torch.bmm(x.unflatten(1, (J, Q)).transpose(0, 1), right.mT)  # (J, T, R)
    if x.shape[0] == 1:
        h = (diag[:, :, None] * z).sum(1)  # (I, T, R)
    else:
        h = diag[:, 0, None] * z[0]
        for j in range(1, J):
            h.addcmul_(diag[:, j, None], z[j])
    return torch.bmm(h, left.mT).transpose(0, 1).flatten(1).contiguous()


def _some(x: Tensor, left: Tensor, diag: Tensor, right: Tensor) -> Tensor:
    """Vectors times matrices first, matrices times matrices then."""
    J = len(right)
    z = torch.bmm(x.unflatten(1, (J, -1)).transpose(0, 1), right.mT).mT.contiguous()  # (J, R, T)
    h = torch.bmm(diag.permute(2, 0, 1).contiguous(), z.transpose(0, 1))  # (R, I, T)
    return torch.bmm(left, h.transpose(0, 1)).flatten(0, 1).mT.contiguous()


def _many(x: Tensor, left: Tensor, diag: Tensor, right: Tensor) -> Tensor:
    """Some of the tokens and of the components at a time."""
    (I, P, R), J = left.shape, len(right)
    couplings = diag.permute(2, 0, 1).contiguous()  # (R, I, J)
    y = x.new_empty(x.shape[0], I * P)
    most = min(x.shape[0], TOKENS, tokens_within(OUTPUT_BUFFER, I * P, x))
    step = _step(R, most, max(I, J), x)
    buffers = workspace(x, J * step * most, I * step * most, I * P * most)
    for some, out in zip(x.split(most), y.split(most), strict=True):
        n, segments = len(some), _segments(some, right)
        out_segments = buffers[2][: I * P * n].view(I, P, n)
        for r in range(0, R, step):
            k = min(step, R - r)
            z, h = buffers[0][: J * k * n].view(J, k, n), buffers[1][: I * k * n].view(k, I, n)
            torch.bmm(right[:, r : r + k], segments, out=z)
            torch.bmm(couplings[r : r + k], z.transpose(0, 1), out=h)
            torch.baddbmm(
                out_segments, left[:, :, r : r + k], h.transpose(0, 1), beta=0 if r == 0 else 1, out=out_segments
            )
        out.copy_(out_segments.flatten(0, 1).mT)
    return y


def _half(x: Tensor, left: Tensor, diag: Tensor, right: Tensor, tokens: int | None = None) -> Tensor:
    """Some of the tokens at a time; operands side by side, since products in 16 bits copy others."""
    (I, P, R), (J, _, Q) = left.shape, right.shape
    couplings = diag.permute(2, 0, 1)  # (R, I, J)
    if x.shape[0] > SOME_TOKENS:
        couplings = couplings.contiguous()
    y = x.new_empty(x.shape[0], I * P)
    if tokens is None:
        large = (left.numel() + right.numel()) * x.element_size() > LARGE_FACTORS * MIB
        tokens = min(HALF_TOKENS * (1 + large), tokens_within(HALF_BUFFER, max(I, J) * R, x))
    step = min(x.shape[0], tokens)
    z_buffer, h_buffer = workspace(x, J * R * step, I * R * step)
    for some, out in zip(x.split(step), y.split(step), strict=True):
        n = len(some)
        z, h = z_buffer[: J * R * n].view(J, R, n), h_buffer[: I * R * n].view(I, R, n)
        if n <= SOME_TOKENS // 2:
            z.copy_(torch.bmm(some.unflatten(1, (J, Q)).transpose(0, 1).contiguous(), right.mT).mT)
        else:
            torch.bmm(right, some.mT.contiguous().unflatten(0, (J, Q)), out=z)
        torch.bmm(couplings, z.transpose(0, 1), out=h.transpose(0, 1))
        torch.bmm(h.mT, left.mT, out=out.unflatten(1, (I, P)).transpose(0, 1))
    return y


def _more(x: Tensor, left: Tensor, diag: Tensor, right: Tensor) -> Tensor:
    """The same with twice as many tokens at a time, however large they are."""
    return _half(x, left, diag, right, 2 * HALF_TOKENS)


def _triton(x: Tensor, left: Tensor, diag: Tensor, right: Tensor) -> Tensor:
    """Kernels of our own, for a GPU."""
    from structmat.ops.triton import blast as kernels  # noqa: PLC0415 - triton is needed where it is asked for

    x, left, diag, right = side_by_side(x, left, diag, right)
    return kernels.blast_forward(x, left, diag, right)


ALGORITHMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "vectors": _few,
    "vectors first": _some,
    "components": _many,
    "tokens": _half,
    "more tokens": _more,
    "whole": _whole,
    TRITON: _triton,
}
"""Ways to compute the product: right for every shape, dtype and device, but for triton's, which are for GPUs."""


@torch.library.custom_op("structmat::blast_matmul_keeping", mutates_args=())
def _keeping(x: Tensor, left: Tensor, diag: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The product, and ``right_j x_j (J, R, T)`` for the backward product; all tokens at once."""
    (I, P, R), J, T = left.shape, len(right), len(x)
    couplings = diag.permute(2, 0, 1).contiguous()  # (R, I, J)
    z, y = x.new_empty(J, R, T), x.new_empty(T, I * P)
    # sums over components are not rounded to 16 bits on the way
    step = R if is_half(x) else _step(R, max(T, 1), max(I, J), x)
    h_memory, y_memory = workspace(x, I * step * T, I * P * T)
    segments, out = _turned(x, right), y_memory.view(I, P, T)
    for r in range(0, R, step):
        part = slice(r, r + step)
        h = _between(h_memory, (min(step, R - r), I, T), is_half(x))
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
        from structmat.ops.triton import blast as kernels  # noqa: PLC0415 - triton is needed where it is asked for

        return kernels.blast_backward(*side_by_side(upstream, x, left, diag, right))
    if is_half(x) and x.device.type == "cpu":
        return _half_backward(upstream, x, left, diag, right, kept)
    (I, _, R), (J, _, Q), T = left.shape, right.shape, x.shape[0]
    couplings = diag.permute(2, 0, 1).contiguous()  # (R, I, J)
    segments, upstream_segments = _segments(x, right), _segments(upstream, left.mT)  # (J, Q, T), (I, P, T)
    left_gradient, right_gradient = left.new_empty(left.shape), right.new_empty(right.shape)
    coupling_gradient = diag.new_empty(R, I, J)
    step = R if x.device.type != "cpu" else _components(max(T, 1), max(I, J), x, BACKWARD_BUFFER)
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
    return (
        x_gradient.flatten(0, 1).mT.contiguous(), left_gradient, coupling_gradient.permute(1, 2, 0).contiguous(),
        right_gradient,
    )  # fmt: skip


def _half_backward(
    upstream: Tensor, x: Tensor, left: Tensor, diag: Tensor, right: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All at once, operands side by side: products in 16 bits copy others, slowly where they turn them."""
    (I, _, R), J, T = left.shape, len(right), x.shape[0]
    couplings = diag.permute(2, 0, 1).contiguous()  # (R, I, J)
    segments, upstream_segments = _turned(x, right), _turned(upstream, left.mT)  # (J, Q, T), (I, P, T)
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
    return (
        x_gradient.flatten(0, 1).mT.contiguous(), left_gradient, coupling_gradient.permute(1, 2, 0).contiguous(),
        right_gradient,
    )  # fmt: skip


@_matmul_backward.register_fake
def _(
    upstream: Tensor, x: Tensor, left: Tensor, diag: Tensor, right: Tensor, kept: Tensor | None, algorithm: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), left.new_empty(left.shape), diag.new_empty(diag.shape), right.new_empty(right.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.algorithm = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    if not any(ctx.needs_input_grad[1:4]):  # frozen factors: the product with the transposed matrix
        _, left, diag, right = ctx.saved_tensors
        x_gradient = torch.ops.structmat.blast_matmul(upstream, right.mT, diag.transpose(0, 1), left.mT, ctx.algorithm)
        return x_gradient, None, None, None, None
    return *torch.ops.structmat.blast_matmul_backward(upstream, *ctx.saved_tensors, None, ctx.algorithm), None


_matmul.register_autograd(_backward, setup_context=_setup_context)


def _setup_keeping(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save_with_kept(ctx, output[1], *inputs)


def _keeping_backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 4
    return torch.ops.structmat.blast_matmul_backward(upstream, *ctx.saved_tensors, "")


_keeping.register_autograd(_keeping_backward, setup_context=_setup_keeping)


@register_flop_formula([torch.ops.structmat.blast_matmul, torch.ops.structmat.blast_matmul_keeping])
def _flops(x_shape: Any, left_shape: Any, diag_shape: Any, right_shape: Any, *args: Any, **kwargs: Any) -> int:
    (I, P, R), (J, _, Q) = left_shape, right_shape
    return 2 * x_shape[0] * R * (I * P + J * Q + I * J)


@register_flop_formula(torch.ops.structmat.blast_matmul_backward)
def _backward_flops(upstream_shape: Any, x_shape: Any, left_shape: Any, diag_shape: Any, right_shape: Any,
                    kept_shape: Any, *args: Any, **kwargs: Any) -> int:  # fmt: skip
    (I, P, R), (J, _, Q) = left_shape, right_shape
    return 2 * x_shape[0] * R * (2 * I * P + (3 if kept_shape is None else 2) * J * Q + 3 * I * J)


def _segments(x: Tensor, matrices: Tensor) -> Tensor:
    """``(T, J Q)`` as ``(J, Q, T)``, for matrices ``(J, ..., Q)``."""
    return x.unflatten(1, (matrices.shape[0], matrices.shape[-1])).permute(1, 2, 0)


def _turned(x: Tensor, matrices: Tensor) -> Tensor:
    """The same; side by side for dtypes of 16 bits on a CPU, whose products copy other operands."""
    if is_half(x) and x.device.type == "cpu":
        return x.mT.contiguous().unflatten(0, (matrices.shape[0], matrices.shape[-1]))
    return _segments(x, matrices)


def _between(memory: Tensor, shape: tuple[int, int, int], blocks_outside: bool) -> Tensor:
    """Part of flat memory as ``(components, blocks, T)``, with the components of a block side by side if wanted."""
    k, blocks, T = shape
    part = memory[: k * blocks * T]
    return part.view(blocks, k, T).transpose(0, 1) if blocks_outside else part.view(k, blocks, T)


def _step(R: int, tokens: int, blocks: int, x: Tensor) -> int:
    """How many components at a time keep intermediates small without too many parts."""
    return min(R, max(_components(tokens, blocks, x, BUFFER), -(-R // PARTS // 8) * 8))


def _components(tokens: int, blocks: int, x: Tensor, mebibytes: float) -> int:
    """How many components to take at a time on a CPU."""
    return max(8, int(mebibytes * MIB) // (x.element_size() * blocks * tokens) // 8 * 8)
