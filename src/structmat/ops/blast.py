"""Product with a BLAST matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structmat.ops.common import MIB, TRITON, cast, is_half, plain, side_by_side, tokens_within, workspace

FEW_TOKENS = 4
"""Up to this many tokens a CPU multiplies vectors with matrices; beyond, matrices with matrices."""

BUFFER = 2
"""MiB of one intermediate on a CPU in float32, but where that is less than one of ``PARTS`` of the components."""

PARTS = 6
"""Most parts of the components: more of them read and write the output too often."""

OUTPUT_BUFFER = 16
"""MiB of the output on the way."""

BACKWARD_BUFFER = 16
"""MiB of one intermediate of the backward product, whose larger products pay for the pages."""

TOKENS = 512
"""At a time on a CPU in float32; fewer where the output is wide."""

HALF_BUFFER = 16
"""MiB, for dtypes of 16 bits."""

HALF_TOKENS = 256
"""At a time on a CPU, for dtypes of 16 bits."""

SOME_TOKENS = 32
"""Up to this many on a CPU, the first product is that of vectors with matrices; half as many for 16 bits."""


def blast_matmul(x: Tensor, left: Tensor, diag: Tensor, right: Tensor, algorithm: str = "") -> Tensor:
    """Compute ``x @ W.T`` for blocks ``W_ij = left_i Diag(diag_ij) right_j`` (BLAST, Algorithm 1).

    ``R (M + N + I J)`` multiplications per token. The couplings are the trap: written with broadcasting they
    materialise an ``I J T R`` tensor. For many tokens they are one product of ``(R, I, J)`` with ``(R, J, T)``, whose
    operands are strided views of the neighbouring products. The operator is ``torch.ops.structmat.blast_matmul``; its
    backward computes the intermediates again instead of keeping them.

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
    else:
        y = torch.ops.structmat.blast_matmul(tokens, left, diag, right, algorithm)
    return y.view(*x.shape[:-1], M)


@torch.library.custom_op("structmat::blast_matmul", mutates_args=())
def _matmul(x: Tensor, left: Tensor, diag: Tensor, right: Tensor, algorithm: str) -> Tensor:
    name = "whole" if x.shape[0] == 0 else algorithm or _automatic(x)
    return ALGORITHMS[name](x, left, diag, right)


@_matmul.register_fake
def _(x: Tensor, left: Tensor, diag: Tensor, right: Tensor, algorithm: str) -> Tensor:
    return x.new_empty(x.shape[0], left.shape[0] * left.shape[1])


def _automatic(x: Tensor) -> str:
    if x.device.type != "cpu":
        return "whole"
    if x.shape[0] <= FEW_TOKENS:
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
    """Vectors times matrices: each factor is read once, along its rows."""
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
    step = min(R, max(_components(most, max(I, J), x, BUFFER), -(-R // PARTS // 8) * 8))
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
    step = min(x.shape[0], tokens or min(HALF_TOKENS, tokens_within(HALF_BUFFER, max(I, J) * R, x)))
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


@torch.library.custom_op("structmat::blast_matmul_backward", mutates_args=())
def _matmul_backward(
    upstream: Tensor, x: Tensor, left: Tensor, diag: Tensor, right: Tensor, algorithm: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if algorithm == TRITON and x.shape[0]:
        from structmat.ops.triton import blast as kernels  # noqa: PLC0415 - triton is needed where it is asked for

        return kernels.blast_backward(*side_by_side(upstream, x, left, diag, right))
    (I, _, R), (J, _, Q), T = left.shape, right.shape, x.shape[0]
    couplings = diag.permute(2, 0, 1).contiguous()  # (R, I, J)
    segments, upstream_segments = _segments(x, right), _segments(upstream, left.mT)  # (J, Q, T), (I, P, T)
    left_gradient, right_gradient = left.new_empty(left.shape), right.new_empty(right.shape)
    coupling_gradient = diag.new_empty(R, I, J)
    x_gradient = x.new_zeros(J, Q, T)
    # sums over components and tokens are not rounded to 16 bits on the way
    step = R if is_half(x) or x.device.type != "cpu" else _components(max(T, 1), max(I, J), x, BACKWARD_BUFFER)
    for r in range(0, R, step):
        part = slice(r, r + step)
        z = torch.bmm(right[:, part], segments).transpose(0, 1)  # (k, J, T)
        h = torch.bmm(couplings[part], z)  # (k, I, T)
        h_gradient = torch.bmm(left[:, :, part].mT, upstream_segments).transpose(0, 1)  # (k, I, T)
        z_gradient = torch.bmm(couplings[part].mT, h_gradient)  # (k, J, T)
        coupling_gradient[part] = torch.bmm(h_gradient, z.mT)
        left_gradient[:, :, part] = torch.bmm(upstream_segments, h.permute(1, 2, 0))
        right_gradient[:, part] = torch.bmm(z_gradient.transpose(0, 1), segments.mT)
        x_gradient.baddbmm_(right[:, part].mT, z_gradient.transpose(0, 1))
    return (
        x_gradient.flatten(0, 1).mT.contiguous(), left_gradient, coupling_gradient.permute(1, 2, 0).contiguous(),
        right_gradient,
    )  # fmt: skip


@_matmul_backward.register_fake
def _(
    upstream: Tensor, x: Tensor, left: Tensor, diag: Tensor, right: Tensor, algorithm: str
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
    return *torch.ops.structmat.blast_matmul_backward(upstream, *ctx.saved_tensors, ctx.algorithm), None


_matmul.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.structmat.blast_matmul)
def _flops(x_shape: Any, left_shape: Any, diag_shape: Any, right_shape: Any, *args: Any, **kwargs: Any) -> int:
    (I, P, R), (J, _, Q) = left_shape, right_shape
    return 2 * x_shape[0] * R * (I * P + J * Q + I * J)


@register_flop_formula(torch.ops.structmat.blast_matmul_backward)
def _backward_flops(upstream_shape: Any, x_shape: Any, left_shape: Any, diag_shape: Any, right_shape: Any,
                    *args: Any, **kwargs: Any) -> int:  # fmt: skip
    (I, P, R), (J, _, Q) = left_shape, right_shape
    return 2 * x_shape[0] * R * (2 * I * P + 3 * J * Q + 4 * I * J)


def _segments(x: Tensor, matrices: Tensor) -> Tensor:
    """``(T, J Q)`` as ``(J, Q, T)``, for matrices ``(J, ..., Q)``."""
    return x.unflatten(1, (matrices.shape[0], matrices.shape[-1])).permute(1, 2, 0)


def _components(tokens: int, blocks: int, x: Tensor, mebibytes: float) -> int:
    """How many components to take at a time on a CPU."""
    return max(8, int(mebibytes * MIB) // (x.element_size() * blocks * tokens) // 8 * 8)
