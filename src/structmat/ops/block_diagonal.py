"""Product with a block-diagonal matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def block_diagonal_matmul(x: Tensor, blocks: Tensor) -> Tensor:
    """Compute ``x @ W.T`` for ``W`` with ``blocks`` on its diagonal, in ``I P Q`` multiplications per token.

    Args:
        x: Input ``(..., I Q)``.
        blocks: ``(I, P, Q)``.

    Returns:
        Output ``(..., I P)``.
    """
    I, P, Q = blocks.shape
    segments = x.reshape(-1, I, Q).transpose(0, 1)  # (I, T, Q)
    y = torch.bmm(segments, blocks.mT)  # (I, T, P)
    return y.transpose(0, 1).reshape(*x.shape[:-1], I * P)
