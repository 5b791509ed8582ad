"""Monarch fit: the best approximation in closed form (Dao et al. 2022, arXiv 2204.00595, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.fit.base import Method, Progress, no_history
from structmat.fit.descent import Descent, descend
from structmat.fit.linalg import damped_inverse
from structmat.fit.metric import Metric, Whitened
from structmat.fit.svd import balanced, split_svd
from structmat.formats import Factors, Format, Monarch

DAMPING = 1e-5
"""The damping of the preconditioners, relative to their mean diagonal."""


@dataclass(frozen=True)
class Dao2022Monarch(Method[Monarch]):
    """The best Monarch approximation in Frobenius norm: a truncated SVD of every block (of the permuted matrix).

    Given the second moments of the inputs, and perhaps of the gradients at the output, that of every
    ``G_ii^(1/2) W_ij C_jj^(1/2)`` is the start of quasi-Newton steps of both factors at once under all of both.

    Attributes:
        iterations: The number of these steps.

    Raises:
        ValueError: If ``iterations`` is negative.
    """

    iterations: int = 80

    formats: ClassVar[tuple[type[Format], ...]] = (Monarch,)

    def __post_init__(self) -> None:
        _checks.natural_int(self.iterations, "iterations")

    def cost(self, format: Monarch, *, aware: bool = False) -> float:
        """Multiplications of the decomposition of all blocks, and of the steps' products."""
        (M, N), (P, Q), t = format.shape, format.block_shape, format.rank
        iteration = 3 * M * N * t + M * N * N
        return 20.0 * M * N * min(P, Q) + (self.iterations * iteration + 20.0 * N**3 if aware else 0.0)

    def _solve(
        self, weights: Tensor, metric: Metric | None, format: Monarch, progress: Progress | None
    ) -> tuple[Factors, Tensor]:
        if format.permute_output:
            order = torch.arange(format.M, device=weights.device).view(-1, format.blocks[0]).mT.flatten()
            weights = weights[:, order]
            if metric is not None and metric.outputs is not None:
                metric = Metric(metric.inputs, metric.outputs[:, order][:, :, order])
        if metric is None:
            left, right = _by_blocks(weights, format)
            return _factors(left, right, format), no_history(weights)
        whitened = Whitened.of(weights, metric, format.blocks)
        problem = MonarchDescent(whitened, *_by_blocks(whitened.weights, format))

        def show(step: int, loss: Tensor) -> None:
            if progress is not None:
                progress(step, self.iterations, tuple(problem.relative(loss).tolist()))

        found, losses = descend(problem, problem.start, self.iterations, show)
        left, right = problem.factors(found)
        left = left if whitened.rows is None else whitened.rows[:, :, None] @ left
        left, right = balanced(left, right @ whitened.columns[:, None])
        return _factors(left, right, format), problem.relative(losses)


def _by_blocks(weights: Tensor, format: Monarch) -> tuple[Tensor, Tensor]:
    """The best factors ``(B, I, J, P, t)`` and ``(B, I, J, t, Q)`` of each block alone."""
    U, S, Vh = torch.linalg.svd(_blocks(weights, *format.blocks), full_matrices=False)
    return split_svd(U, S, Vh, format.rank)


def _blocks(matrix: Tensor, I: int, J: int) -> Tensor:
    """The blocks ``(B, I, J, P, Q)`` of ``(B, M, N)``, a view."""
    B, M, N = matrix.shape
    return matrix.view(B, I, M // I, J, N // J).transpose(2, 3)


def _factors(left: Tensor, right: Tensor, format: Monarch) -> dict[str, Tensor]:
    """The factors in the format's own layout."""
    B, (I, J), (P, Q), t = len(left), format.blocks, format.block_shape, format.rank
    return {
        "left": left.transpose(2, 3).reshape(B, I * P, J * t),
        "right": right.transpose(1, 2).reshape(B, J * I * t, Q),
    }


class MonarchDescent(Descent):
    """The loss of the factors of a batch of weights under a full metric.

    Args:
        whitened: The weights and their metric.
        left: ``(B, I, J, P, t)``.
        right: ``(B, I, J, t, Q)``.
    """

    def __init__(self, whitened: Whitened, left: Tensor, right: Tensor) -> None:
        self.whitened = whitened
        self.shapes = [left.shape, right.shape]
        self.sizes = [factor[0].numel() for factor in (left, right)]
        self.start = torch.cat([left.flatten(1), right.flatten(1)], 1)
        self.pulled = whitened.weights
        energy = (whitened.metric.times(whitened.weights) * whitened.weights).sum((1, 2), dtype=torch.float64)
        self.energy = energy.where(energy > 0, 1)

    def factors(self, vectors: Tensor) -> list[Tensor]:
        """The factors ``left, right`` that vectors ``(B, n)`` consist of, as views of them."""
        return [part.view(shape) for part, shape in zip(vectors.split(self.sizes, 1), self.shapes, strict=True)]

    def relative(self, loss: Tensor) -> Tensor:
        """The relative error ``(B,)`` of a loss, in the weights' dtype."""
        return (loss.clamp_min(0) / self.energy).sqrt().to(self.whitened.weights.dtype)

    def loss(self, factors: Tensor) -> Tensor:
        """``tr(G E C E^T)``, ``(B,)``, for ``E = W - W_hat``."""
        left, right = self.factors(factors)
        rest = self.whitened.weights - (left @ right).transpose(2, 3).reshape(self.whitened.weights.shape)
        self.pulled = self.whitened.metric.times(rest)
        return (self.pulled * rest).sum((1, 2), dtype=torch.float64)

    def gradient(self, factors: Tensor) -> Tensor:
        """Half the gradient with respect to ``left`` and ``right``, ``(B, n)``."""
        left, right = self.factors(factors)
        pulled = _blocks(self.pulled, *left.shape[1:3])
        return -torch.cat([(pulled @ right.mT).flatten(1), (left.mT @ pulled).flatten(1)], 1)

    def refresh(self, factors: Tensor) -> None:
        """Invert Gram matrices: for ``left`` those under all of ``C``, of size ``J t``; for ``right`` each block's."""
        left, right = self.factors(factors)
        B, I, J, t, Q = right.shape
        inputs = self.whitened.metric.inputs
        projected = right.transpose(1, 2).flatten(2, 3) @ inputs.view(B, J, Q, J * Q)  # (B, J, I t, N)
        projected = projected.view(B, J, I, t, J, Q).permute(0, 2, 4, 1, 3, 5).flatten(3, 4)  # (B, I, J', J t, Q)
        gram = (projected @ right.mT).transpose(2, 3).reshape(B, I, J * t, J * t)
        self.left_inverse = damped_inverse(gram, DAMPING)
        self.right_inverse = damped_inverse(left.mT @ left, DAMPING)

    def precondition(self, gradient: Tensor) -> Tensor:
        """Solve each factor's systems, with the other one fixed."""
        left, right = self.factors(gradient)
        B, I, J, P, t = left.shape
        solved = left.transpose(2, 3).reshape(B, I, P, J * t) @ self.left_inverse
        solved = solved.view(B, I, P, J, t).transpose(2, 3)
        return torch.cat([solved.flatten(1), (self.right_inverse @ right).flatten(1)], 1)
