"""The metric of an activation-aware fit: ``|E|^2 = tr(G E C E^T) = E|G^(1/2) E x|^2``.

With the second moment ``C`` of the inputs alone, lower errors in this norm are lower errors of the layer's output,
where those of the Frobenius norm treat all directions of the input alike (for low-rank matrices Chen et al. 2021,
arXiv 2106.01979). With the second moment ``G`` of the gradients at the output as well, ``|E|^2 / 2`` approximates what
the error does to the loss itself (K-FAC, Martens & Grosse 2015, arXiv 1503.05671, section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-9
"""The least eigenvalue of a metric, relative to its largest in the same block."""

SHRINKAGE = 1e-6
"""The share of the diagonal that is added to a metric, so that directions without data cannot run away."""


@dataclass(frozen=True)
class Metric:
    """The metrics of a batch of weights, each symmetric and positive definite with a mean diagonal of 1.

    Attributes:
        inputs: ``C (B, N, N)``, float64.
        outputs: ``G (B, M, M)``, float64; None for the identity.
    """

    inputs: Tensor
    outputs: Tensor | None = None

    def of(self, b: int) -> Metric:
        """The metric of one weight, as a batch of one."""
        return Metric(self.inputs[b : b + 1], None if self.outputs is None else self.outputs[b : b + 1])

    def to(self, weights: Tensor) -> Metric:
        """The metrics in the dtype and on the device of weights."""
        return Metric(self.inputs.to(weights), None if self.outputs is None else self.outputs.to(weights))

    def times(self, matrices: Tensor) -> Tensor:
        """``G E C`` for ``E (B, M, N)``."""
        product = matrices @ self.inputs
        return product if self.outputs is None else self.outputs @ product

    def halved(self, like: Tensor) -> Callable[[Tensor], Tensor]:
        """The function that takes ``E (B, M, N)`` to ``G^(1/2) E C^(1/2)``, in the dtype of ``like``."""
        right = roots(self.inputs)[0].to(like)
        left = None if self.outputs is None else roots(self.outputs)[0][:, 0].to(like)
        return lambda rest: times_blocks(rest if left is None else left @ rest, right)


@dataclass(frozen=True)
class Whitened:
    """Weights and their metric in the coordinates in which the metric's diagonal blocks are the identity.

    Attributes:
        weights: ``(B, M, N)``.
        metric: ``C`` and ``G`` there, in the weights' dtype.
        columns: What leads back from there on the right, ``(B, J, Q, Q)``, symmetric.
        rows: What leads back from there on the left, ``(B, I, P, P)``, symmetric; None for the identity.
    """

    weights: Tensor
    metric: Metric
    columns: Tensor
    rows: Tensor | None

    @classmethod
    def of(cls, weights: Tensor, metric: Metric, blocks: tuple[int, int]) -> Whitened:
        """Whiten weights.

        Args:
            weights: ``(B, M, N)``.
            metric: Their metric.
            blocks: ``(I, J)``, the numbers of diagonal blocks of ``G`` and of ``C``.

        Returns:
            The whitened weights.
        """
        root, columns = roots(metric.inputs, blocks[1])
        weights = times_blocks(weights, root)
        inputs, outputs, rows = whitened_metric(metric.inputs, columns), None, None
        if metric.outputs is not None:
            root, rows = roots(metric.outputs, blocks[0])
            weights = times_blocks(weights.mT, root).mT.contiguous()
            outputs, rows = whitened_metric(metric.outputs, rows), rows.to(weights)
        return cls(weights, Metric(inputs, outputs).to(weights), columns.to(weights), rows)


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
    columns = matrices.reshape(B, -1, J, Q).transpose(1, 2)
    return (columns @ blocks.to(matrices.dtype)).transpose(1, 2).reshape(matrices.shape)


def whitened_metric(metric: Tensor, inverse_roots: Tensor) -> Tensor:
    """The metric ``S^-1 C S^-1`` in the coordinates in which its diagonal blocks are the identity."""
    return times_blocks(times_blocks(metric, inverse_roots).mT, inverse_roots)
