"""A matrix of low rank as a product."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST = 16
"""The number of columns of the first sketch."""


def low_rank_of(matrix: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Write a matrix as ``left @ right`` with as few components as its noise allows.

    The range is found with random vectors, four times as many until they are enough (Halko, Martinsson & Tropp 2011,
    section 4), which costs little for the ranks of adapters.

    Args:
        matrix: ``(M, N)``.
        noise: The Frobenius norm of what may be left out.

    Returns:
        ``left (M, r)`` and ``right (r, N)`` in float64; ``r`` may be 0.
    """
    A = matrix.double()
    generator = torch.Generator().manual_seed(0)
    size, energy = FIRST, float(A.square().sum())
    while True:
        if size >= min(A.shape):
            Q = torch.eye(len(A), dtype=A.dtype, device=A.device)
        else:
            Q = torch.linalg.qr(A @ torch.randn(A.shape[1], size, generator=generator, dtype=A.dtype).to(A.device))[0]
        B = Q.mT @ A
        if size >= min(A.shape) or float((A - Q @ B).norm()) <= noise or energy == 0:
            break
        size *= 4
    U, S, Vh = torch.linalg.svd(B, full_matrices=False)
    tail = S.square().flip(0).cumsum(0).flip(0).sqrt()  # what is left out from each component on
    rank = int((tail > noise).sum())
    root = S[:rank].sqrt()
    return Q @ (U[:, :rank] * root), root[:, None] * Vh[:rank]
