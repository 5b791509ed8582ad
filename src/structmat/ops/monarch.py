"""Product with a Monarch (block low-rank) matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def monarch_matmul(x: Tensor, left: Tensor, right: Tensor, permute_output: bool = False) -> Tensor:
    """Compute ``x @ W.T`` for a Monarch matrix in ``t (J M + I N)`` multiplications per token.

    Args:
        x: Input ``(..., J Q)``.
        left: ``(I, P, J, t)``.
        right: ``(J, I, t, Q)``.
        permute_output: Emit entry ``p`` of output block ``i`` at ``p I + i`` (Dao et al. 2022) instead of ``i P + p``.

    Returns:
        Output ``(..., I P)``.
    """
    I, P, J, t = left.shape
    Q = right.shape[-1]
    segments = x.reshape(-1, J, Q).transpose(0, 1)  # (J, T, Q)
    z = torch.bmm(segments, right.reshape(J, I * t, Q).mT)  # (J, T, I t)
    z = z.view(J, -1, I, t).permute(2, 1, 0, 3).reshape(I, -1, J * t)
    y = torch.bmm(z, left.reshape(I, P, J * t).mT)  # (I, T, P)
    y = y.permute(1, 2, 0) if permute_output else y.transpose(0, 1)
    return y.reshape(*x.shape[:-1], I * P)
