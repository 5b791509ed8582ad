"""Ways to compute the product with a BLAST matrix, and which of them suits what.

The numbers were tuned by measurement on a CPU; ``benchmarks/cpu.py`` times the layers in which a change of them shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from structmat.ops.common import MIB, TRITON, is_half, side_by_side, tokens_within, triton_kernels, workspace

FEW_TOKENS = 4
"""Up to this many tokens a CPU multiplies vectors with matrices, and for more tokens matrices with matrices (tuned with
``benchmarks/cpu.py``)."""

LARGE_BLOCKS = 32
"""Where the sides of blocks are this many times their number along an axis, or more, a CPU does so for any number of
tokens in float32 (tuned with ``benchmarks/cpu.py``)."""

LARGE_HALF_BLOCKS = 128
"""The same ratio for dtypes of 16 bits (tuned with ``benchmarks/cpu.py``)."""

BUFFER = 2
"""The MiB of one intermediate on a CPU in float32, unless that is less than one of ``PARTS`` parts of the components
(tuned with ``benchmarks/cpu.py``)."""

PARTS = 6
"""The most parts of the components: more of them read and write the output too often (tuned with
``benchmarks/cpu.py``)."""

OUTPUT_BUFFER = 16
"""The MiB of the output on the way (tuned with ``benchmarks/cpu.py``)."""

TOKENS = 512
"""The number of tokens at a time on a CPU in float32; fewer where the output is wide (tuned with
``benchmarks/cpu.py``)."""

HALF_BUFFER = 24
"""The MiB of one intermediate on a CPU for dtypes of 16 bits (tuned with ``benchmarks/cpu.py``)."""

HALF_TOKENS = 256
"""The number of tokens at a time on a CPU for dtypes of 16 bits; twice as many where the factors are large, so that
they are read less (tuned with ``benchmarks/cpu.py``)."""

LARGE_FACTORS = 8
"""The MiB from which on factors are large in 16 bits (tuned with ``benchmarks/cpu.py``)."""

SOME_TOKENS = 32
"""Up to this many tokens on a CPU, the first product is that of vectors with matrices; half as many for 16 bits (tuned
with ``benchmarks/cpu.py``)."""


def automatic(x: Tensor, side: float) -> str:
    """The algorithm for these tokens, given the shorter side of blocks relative to their number along an axis."""
    if x.device.type != "cpu":
        return "whole"
    if x.shape[0] <= FEW_TOKENS or side >= (LARGE_HALF_BLOCKS if is_half(x) else LARGE_BLOCKS):
        return "vectors"
    if is_half(x):
        return "tokens"
    return "vectors_first" if x.shape[0] <= SOME_TOKENS else "components"


def whole(x: Tensor, left: Tensor, diag: Tensor, right: Tensor) -> Tensor:
    """All tokens at once."""
    z = torch.bmm(right, in_segments(x, right))  # (J, R, T)
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
    step = components_at_a_time(R, most, max(I, J), x)
    buffers = workspace(x, J * step * most, I * step * most, I * P * most)
    for some, out in zip(x.split(most), y.split(most), strict=True):
        n, segments = len(some), in_segments(some, right)
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
    kernels = triton_kernels("blast")

    x, left, diag, right = side_by_side(x, left, diag, right)
    return kernels.blast_forward(x, left, diag, right)


ALGORITHMS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "vectors": _few,
    "vectors_first": _some,
    "components": _many,
    "tokens": _half,
    "more_tokens": _more,
    "whole": whole,
    TRITON: _triton,
}
"""Ways to compute the product: right for every shape, dtype and device, but for triton's, which are for GPUs."""


def in_segments(x: Tensor, matrices: Tensor) -> Tensor:
    """``(T, J Q)`` as ``(J, Q, T)``, for matrices ``(J, ..., Q)``."""
    return x.unflatten(1, (matrices.shape[0], matrices.shape[-1])).permute(1, 2, 0)


def turned(x: Tensor, matrices: Tensor) -> Tensor:
    """The same; side by side for dtypes of 16 bits on a CPU, whose products copy other operands."""
    if is_half(x) and x.device.type == "cpu":
        return x.mT.contiguous().unflatten(0, (matrices.shape[0], matrices.shape[-1]))
    return in_segments(x, matrices)


def between(memory: Tensor, shape: tuple[int, int, int], blocks_outside: bool) -> Tensor:
    """Part of flat memory as ``(components, blocks, T)``, with the components of a block side by side if wanted."""
    k, blocks, T = shape
    part = memory[: k * blocks * T]
    return part.view(blocks, k, T).transpose(0, 1) if blocks_outside else part.view(k, blocks, T)


def components_at_a_time(R: int, tokens: int, blocks: int, x: Tensor) -> int:
    """How many components at a time keep intermediates small without too many parts."""
    return min(R, max(components_within(tokens, blocks, x, BUFFER), -(-R // PARTS // 8) * 8))


def components_within(tokens: int, blocks: int, x: Tensor, mebibytes: float) -> int:
    """How many components to take at a time on a CPU."""
    return max(8, int(mebibytes * MIB) // (x.element_size() * blocks * tokens) // 8 * 8)
