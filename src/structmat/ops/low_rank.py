"""Product with a low-rank matrix."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def low_rank_matmul(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute ``x @ (left @ right).T`` in ``R (M + N)`` multiplications per token.

    Args:
        x: Input ``(..., N)``.
        left: ``(M, R)``.
        right: ``(R, N)``.

    Returns:
        Output ``(..., M)``.
    """
    return F.linear(F.linear(x, right), left)
