"""BLAST sweeps under the full second moment of the inputs, which no published BLAST fit uses.

In the coordinates in which the metric's diagonal blocks are the identity, a fit that ignores its other blocks is the
plain one, and its Gram matrices precondition the steps under the full metric: for each factor in turn, with the
others fixed, the loss is quadratic, and a few conjugate-gradient steps towards its minimum, over-relaxed, are one step
of the sweep. Shapes are those of ``blast_systems``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structmat.fit import blast_systems as systems
from structmat.fit.linalg import conjugate_gradients, factorize

DAMPING = 1e-4
"""The damping of the preconditioners, relative to their mean diagonal."""

BASIS_ITERATIONS = 3
"""The conjugate-gradient steps for ``left`` and for ``right``, whose preconditioners are Cholesky factors."""

DIAG_ITERATIONS = 5
"""The conjugate-gradient steps for ``diag``, whose preconditioner is a diagonal."""


class MetricSweeper:
    """The factors of a batch of weights during the sweeps.

    Args:
        weights: ``(B, M, N)``, whitened.
        metric: ``(B, N, N)``, whitened: the identity in its diagonal blocks.
        left: ``(B, I, P, R)``.
        diag: ``(B, I, J, R)``.
        right: ``(B, J, R, Q)``, whitened.
    """

    def __init__(self, weights: Tensor, metric: Tensor, left: Tensor, diag: Tensor, right: Tensor) -> None:
        self.metric, self.left, self.diag, self.right = metric, left, diag, right
        self.weights = weights
        energy = ((weights @ metric) * weights).sum((1, 2), dtype=torch.float64)
        self.energy = energy.where(energy > 0, 1)
        self.error = energy.new_ones(len(weights))

    def sweep(self, step: float) -> None:
        """Take one step of this size for each factor; ``error`` becomes that of the factors before it."""
        self._left_step(step)
        self._right_step(step)
        self._diag_step(step)

    def _coupled(self, diag: Tensor, right: Tensor) -> Tensor:
        """``X_i = [D_i1 right_1 … D_iJ right_J]``, ``(B, I, R, N)``."""
        return (diag.mT[..., None] * right.transpose(1, 2)[:, None]).flatten(3)

    def _dense(self, left: Tensor, diag: Tensor, right: Tensor) -> Tensor:
        return (left @ self._coupled(diag, right)).flatten(1, 2)  # (B, M, N)

    def _residual(self) -> Tensor:
        """``(W - W_hat) C``, whose projections on the factors are minus the gradients."""
        rest = self.weights - self._dense(self.left, self.diag, self.right)
        residual = rest @ self.metric
        self._loss = (residual * rest).sum((1, 2), dtype=torch.float64)
        return residual

    def _left_step(self, step: float) -> None:
        coupled = self._coupled(self.diag, self.right)
        factors = _factorized(systems.left_gram(self.diag, systems.gram_of_rows(self.right)))
        rows = (len(self.left), self.left.shape[1], self.left.shape[2], -1)

        def project(matrix: Tensor) -> Tensor:
            return matrix.view(rows) @ coupled.mT

        change = conjugate_gradients(
            lambda left: project((left @ coupled).flatten(1, 2) @ self.metric),
            lambda gradient: torch.cholesky_solve(gradient.mT, factors).mT,
            project(self._residual()),
            BASIS_ITERATIONS,
        )
        self.error = (self._loss.clamp_min(0) / self.energy).sqrt()
        self.left = self.left + step * change

    def _right_step(self, step: float) -> None:
        factors = _factorized(systems.right_gram(self.diag, systems.gram_of_columns(self.left)))

        def project(matrix: Tensor) -> Tensor:
            return systems.right_target(systems.projected_blocks(matrix, self.left), self.diag)

        change = conjugate_gradients(
            lambda right: project(self._dense(self.left, self.diag, right) @ self.metric),
            lambda gradient: torch.cholesky_solve(gradient, factors),
            project(self._residual()),
            BASIS_ITERATIONS,
        )
        self.right = self.right + step * change

    def _diag_step(self, step: float) -> None:
        energies = self.left.square().sum(2)[:, :, None] * self.right.square().sum(3)[:, None]  # (B, I, J, R)
        energies = energies + DAMPING * energies.mean(-1, keepdim=True)
        inverse = torch.where(energies > 0, energies.reciprocal(), 0)

        def project(matrix: Tensor) -> Tensor:
            return systems.diag_target(systems.projected_blocks(matrix, self.left), self.right)

        change = conjugate_gradients(
            lambda diag: project(self._dense(self.left, diag, self.right) @ self.metric),
            lambda gradient: gradient * inverse,
            project(self._residual()),
            DIAG_ITERATIONS,
        )
        self.diag = self.diag + step * change


def _factorized(grams: Tensor) -> Tensor:
    mean = grams.diagonal(dim1=-2, dim2=-1).mean(-1)
    return factorize(grams, DAMPING * mean)
