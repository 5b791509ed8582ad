"""Monarch: two batched products, the permutations between and after them folded into where they store."""

import torch
from torch import Tensor

from structmat.ops.triton.products import batched_product, segments


def monarch_forward(x: Tensor, left: Tensor, right: Tensor, permute_output: bool = False) -> Tensor:
    """Compute ``x @ W.T`` for a Monarch matrix.

    Args:
        x: ``(T, J Q)``.
        left: ``(I, P, J, t)``.
        right: ``(J, I, t, Q)``.
        permute_output: Whether entry ``p`` of output block ``i`` comes at ``p I + i`` instead of ``i P + p``.

    Returns:
        ``(T, I P)``.
    """
    (I, P, _, _), T = left.shape, x.shape[0]
    y = torch.empty(T, I * P, dtype=x.dtype, device=x.device)
    batched_product(_middle(x, left, right).flatten(2), left.flatten(2), _blocks(y, I, permute_output), T)
    return y


def monarch_backward(
    upstream: Tensor, x: Tensor, left: Tensor, right: Tensor, permute_output: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``monarch_forward``; the intermediate is computed anew.

    Args:
        upstream: ``(T, I P)``.
        x: ``(T, J Q)``.
        left: ``(I, P, J, t)``.
        right: ``(J, I, t, Q)``.
        permute_output: The same as in the forward product.

    Returns:
        The gradients of ``x``, ``left`` and ``right``.
    """
    (I, _, J, t), T = left.shape, x.shape[0]
    x_in, y_in = segments(x, J), _blocks(upstream, I, permute_output)
    x_gradient, left_gradient, right_gradient = torch.empty_like(x), torch.empty_like(left), torch.empty_like(right)
    z_gradient = torch.empty(J, T, I, t, dtype=x.dtype, device=x.device)
    batched_product(y_in.mT, _middle(x, left, right).flatten(2).mT, left_gradient.flatten(2), T)
    batched_product(y_in, left.flatten(2).mT, z_gradient.permute(2, 1, 0, 3), T)
    batched_product(z_gradient.flatten(2), right.flatten(1, 2).mT, segments(x_gradient, J), T)
    batched_product(z_gradient.flatten(2).mT, x_in.mT, right_gradient.flatten(1, 2), T)
    return x_gradient, left_gradient, right_gradient


def _middle(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``z (I, T, J, t)``, written as the second product reads it."""
    (I, _, J, t), T = left.shape, x.shape[0]
    z = torch.empty(I, T, J, t, dtype=x.dtype, device=x.device)
    batched_product(segments(x, J), right.flatten(1, 2), z.permute(2, 1, 0, 3), T)
    return z


def _blocks(y: Tensor, I: int, permuted: bool) -> Tensor:
    """A view of ``(T, M)`` as ``(I, T, P)``."""
    return y.view(y.shape[0], -1, I).permute(2, 0, 1) if permuted else segments(y, I)
