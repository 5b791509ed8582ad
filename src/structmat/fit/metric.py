"""The metric of an activation-aware fit: ``|E|_C^2 = tr(E C E^T) = E|E x|^2`` with the second moment ``C`` of inputs.

Lower errors in this norm are lower errors of the layer's output, where those of the Frobenius norm treat all
directions of the input alike (``methods.md`` section 5; for low-rank matrices Chen et al. 2021, arXiv 2106.01979).
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-9
"""The least eigenvalue of a metric, relative to its largest in the same block."""

SHRINKAGE = 1e-6
"""The share of the diagonal that is added to a metric, so that directions without data cannot run away."""


def prepared(second_moments: Tensor) -> Tensor:
    """Second moments ``(B, N, N)`` as metrics: symmetric, of mean diagonal 1, the diagonal slightly larger.

    Inputs that are always zero get the weight of a very quiet one; a moment that is zero everywhere becomes the
    identity.

    Args:
        second_moments: The second moments, on any scale.

    Returns:
        ``(B, N, N)``, float64, positive definite up to rounding.
    """
    second_moments = second_moments.double()
    second_moments = (second_moments + second_moments.mT) / 2
    diagonal = second_moments.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1)
    eye = torch.eye(second_moments.shape[-1], dtype=second_moments.dtype, device=second_moments.device)
    alive = mean > 0
    second_moments = torch.where(alive[:, None, None], second_moments / mean.where(alive, 1)[:, None, None], eye)
    diagonal = second_moments.diagonal(dim1=1, dim2=2)
    return second_moments + torch.diag_embed(SHRINKAGE * diagonal + SHRINKAGE * quiet(diagonal)[:, None])


def quiet(diagonal: Tensor) -> Tensor:
    """The median energy of the inputs that are not always zero, which unlike the mean ignores one enormous channel.

    Args:
        diagonal: Energies ``(..., N)``.

    Returns:
        ``(...)``; 1 where all are zero.
    """
    alive = diagonal > 0
    median = torch.where(alive, diagonal, torch.nan).nanmedian(-1).values
    return median.nan_to_num(1.0)


def roots(metric: Tensor, blocks: int = 1) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of the diagonal blocks of metrics, and their inverses.

    Args:
        metric: ``(B, N, N)``, from ``prepared``.
        blocks: ``J``.

    Returns:
        Both ``(B, J, Q, Q)``.
    """
    values, vectors = torch.linalg.eigh(diagonal_blocks(metric, blocks))
    values = values.clamp_min(FLOOR * values.amax(-1, keepdim=True)).sqrt()
    return (vectors * values[..., None, :]) @ vectors.mT, (vectors / values[..., None, :]) @ vectors.mT


def diagonal_blocks(matrices: Tensor, blocks: int) -> Tensor:
    """The ``J`` diagonal blocks ``(B, J, Q, Q)`` of ``matrices (B, N, N)``."""
    B, N, _ = matrices.shape
    grid = matrices.view(B, blocks, N // blocks, blocks, N // blocks)
    return grid.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def times_blocks(matrices: Tensor, blocks: Tensor) -> Tensor:
    """``matrices (B, M, N)`` times the block-diagonal matrix of ``blocks (B, J, Q, Q)``."""
    B, J, Q, _ = blocks.shape
    columns = matrices.view(B, -1, J, Q).transpose(1, 2)
    return (columns @ blocks.to(matrices.dtype)).transpose(1, 2).reshape(matrices.shape)


def whitened_metric(metric: Tensor, inverse_roots: Tensor) -> Tensor:
    """The metric ``S^-1 C S^-1`` in the coordinates in which its diagonal blocks are the identity."""
    return times_blocks(times_blocks(metric, inverse_roots).mT, inverse_roots)
