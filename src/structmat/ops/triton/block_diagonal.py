"""Block-diagonal matrices: one batched product each way."""

import torch
from torch import Tensor

from structmat.ops.triton.products import batched_product, segments


def block_diagonal_forward(x: Tensor, blocks: Tensor) -> Tensor:
    """Compute ``x @ W.T`` for ``W`` with ``blocks`` on its diagonal.

    Args:
        x: ``(T, I Q)``.
        blocks: ``(I, P, Q)``.

    Returns:
        ``(T, I P)``.
    """
    (I, P, _), T = blocks.shape, x.shape[0]
    y = torch.empty(T, I * P, dtype=x.dtype, device=x.device)
    batched_product(segments(x, I), blocks, segments(y, I), T)
    return y


def block_diagonal_backward(upstream: Tensor, x: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``block_diagonal_forward``.

    Args:
        upstream: ``(T, I P)``.
        x: ``(T, I Q)``.
        blocks: ``(I, P, Q)``.

    Returns:
        The gradients of ``x`` and ``blocks``.
    """
    I, T = blocks.shape[0], x.shape[0]
    x_gradient, gradient = torch.empty_like(x), torch.empty_like(blocks)
    x_in, y_in = segments(x, I), segments(upstream, I)
    batched_product(y_in, blocks.mT, segments(x_gradient, I), T)
    batched_product(y_in.mT, x_in.mT, gradient, T)
    return x_gradient, gradient
