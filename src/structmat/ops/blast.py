"""Product with a BLAST matrix."""

from __future__ import annotations

import torch
from torch import Tensor

FEW_TOKENS = 4
"""Up to this many tokens the couplings are applied by broadcasting; beyond, by one product batched over ``R``."""


def blast_matmul(x: Tensor, left: Tensor, diag: Tensor, right: Tensor) -> Tensor:
    """Compute ``x @ W.T`` for blocks ``W_ij = left_i Diag(diag_ij) right_j`` (BLAST, Algorithm 1).

    ``R (M + N + I J)`` multiplications per token. The couplings are the trap: written with broadcasting they
    materialise an ``I J T R`` tensor. For many tokens they are one product of ``(R, I, J)`` with ``(R, J, T)``, whose
    operands are strided views of the neighbouring products.

    Args:
        x: Input ``(..., J Q)``.
        left: ``(I, P, R)``.
        diag: ``(I, J, R)``.
        right: ``(J, R, Q)``.

    Returns:
        Output ``(..., I P)``.
    """
    I, P, _ = left.shape
    J, _, Q = right.shape
    segments = x.reshape(-1, J, Q).permute(1, 2, 0)  # (J, Q, T)
    T = segments.shape[-1]
    z = torch.bmm(right, segments)  # (J, R, T)
    if T <= FEW_TOKENS:
        coupling = diag.to(z.dtype)
        h = (coupling[..., None] * z).sum(1)  # (I, R, T)
    else:
        h = torch.bmm(diag.permute(2, 0, 1), z.transpose(0, 1)).transpose(0, 1)  # (I, R, T)
    y = torch.bmm(left, h)  # (I, P, T)
    return y.reshape(I * P, T).mT.reshape(*x.shape[:-1], I * P)
