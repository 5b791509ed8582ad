"""Monarch fit: the best approximation in closed form (Dao et al. 2022, arXiv 2204.00595, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.fit.base import Method, Progress, no_history
from structmat.fit.linalg import conjugate_gradients, factorize
from structmat.fit.metric import roots, times_blocks, whitened_metric
from structmat.fit.svd import balanced, split_svd
from structmat.formats import Factors, Format, Monarch

ITERATIONS = 3
"""The conjugate-gradient steps for ``right`` in each sweep."""


@dataclass(frozen=True)
class Dao2022Monarch(Method[Monarch]):
    """The best Monarch approximation in Frobenius norm: a truncated SVD of every block (of the permuted matrix).

    Given the second moment of the inputs, that of every ``W_ij C_jj^(1/2)`` is the start of alternating least squares
    under all of it: ``left`` exactly, ``right`` by conjugate gradients.

    Attributes:
        sweeps: The number of sweeps of alternating least squares.
        step: The over-relaxation of these sweeps, but for the last tenth of them.

    Raises:
        ValueError: If a setting is out of range.
    """

    sweeps: int = 30
    step: float = 1.7

    formats: ClassVar[tuple[type[Format], ...]] = (Monarch,)

    def __post_init__(self) -> None:
        _checks.natural_int(self.sweeps, "sweeps")
        if not 0 < self.step < 2:
            raise ValueError(f"expected a step in (0, 2), beyond which the sweeps diverge, got {self.step}")

    def _solve(
        self, weights: Tensor, metric: Tensor | None, format: Monarch, progress: Progress | None
    ) -> tuple[Factors, Tensor]:
        (I, J), (P, Q), t = format.blocks, format.block_shape, format.rank
        B = len(weights)
        if format.permute_output:
            weights = weights.view(B, P, I, -1).transpose(1, 2).reshape(B, I * P, -1)
        inverse_root = None
        if metric is not None:
            root, inverse_root = roots(metric, J)
            weights, metric = times_blocks(weights, root), whitened_metric(metric, inverse_root).to(weights.dtype)
        U, S, Vh = torch.linalg.svd(weights.view(B, I, P, J, Q).transpose(2, 3), full_matrices=False)
        left, right = split_svd(U, S, Vh, t)  # (B, I, J, P, t), (B, I, J, t, Q)
        history: list[Tensor] = []
        if metric is not None and inverse_root is not None:
            least = weights.new_full((B,), torch.inf)
            best = left, right
            for sweep in range(self.sweeps + 1):
                error = _relative_error(weights, metric, left, right)
                better = (error < least)[:, None, None, None, None]
                best = torch.where(better, left, best[0]), torch.where(better, right, best[1])
                least = torch.minimum(least, error)
                if sweep:
                    history.append(error)
                    if progress is not None:
                        progress(sweep, self.sweeps, tuple(error.tolist()))
                if sweep < self.sweeps:
                    step = self.step if sweep < 0.9 * self.sweeps else 1.0
                    left = left + step * _left_change(weights, metric, left, right)
                    right = right + step * _right_change(weights, metric, left, right)
            left, right = balanced(best[0], best[1] @ inverse_root.to(weights)[:, None])
        factors = {
            "left": left.transpose(2, 3).reshape(B, I * P, J * t),
            "right": right.transpose(1, 2).reshape(B, J * I * t, Q),
        }
        return factors, torch.stack(history) if history else no_history(weights)


def _dense(left: Tensor, right: Tensor) -> Tensor:
    """The matrix ``(B, M, N)`` of ``left (B, I, J, P, t)`` and ``right (B, I, J, t, Q)``."""
    return (left @ right).transpose(2, 3).flatten(3).flatten(1, 2)


def _relative_error(weights: Tensor, metric: Tensor, left: Tensor, right: Tensor) -> Tensor:
    rest = weights - _dense(left, right)
    loss, energy = (((e @ metric) * e).sum((1, 2)).clamp_min(0) for e in (rest, weights))
    return (loss / energy.where(energy > 0, 1)).sqrt()


def _residual(weights: Tensor, metric: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``(W - W_hat) C`` by blocks, ``(B, I, J, P, Q)``."""
    return _blocks((weights - _dense(left, right)) @ metric, right)


def _blocks(matrix: Tensor, right: Tensor) -> Tensor:
    B, I, J, _, Q = right.shape
    return matrix.view(B, I, -1, J, Q).transpose(2, 3)


def _left_change(weights: Tensor, metric: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """From ``left`` to its least-squares solution: for each block row a system of size ``J t``."""
    B, I, J, P, t = left.shape
    Q = right.shape[-1]
    projected = right.transpose(1, 2).flatten(2, 3) @ metric.view(B, J, Q, J * Q)  # (B, J, I t, N)
    projected = projected.view(B, J, I, t, J, Q).permute(0, 2, 4, 1, 3, 5).flatten(3, 4)  # (B, I, J', J t, Q)
    gram = (projected @ right.mT).transpose(2, 3).reshape(B, I, J * t, J * t)
    gradient = (_residual(weights, metric, left, right) @ right.mT).transpose(2, 3).reshape(B, I, P, J * t)
    change = torch.cholesky_solve(gradient.mT, factorize(gram, _damping(gram))).mT
    return change.view(B, I, P, J, t).transpose(2, 3)


def _right_change(weights: Tensor, metric: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Most of the way from ``right`` to its least-squares solution."""
    gram = left.mT @ left
    factors = factorize(gram, _damping(gram))
    return conjugate_gradients(
        lambda change: left.mT @ _blocks(_dense(left, change) @ metric, right),
        lambda gradient: torch.cholesky_solve(gradient, factors),
        left.mT @ _residual(weights, metric, left, right),
        ITERATIONS,
    )


def _damping(gram: Tensor) -> Tensor:
    return 1e-5 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
