"""The descent of BLAST factors under a full metric, ``tr(G E C E^T)``, which no published BLAST fit uses.

In the coordinates in which the metric's diagonal blocks are the identity, a fit that ignores its other blocks is the
plain one, and the Gram matrices of the plain one precondition a quasi-Newton descent of all three factors at once: an
iteration takes one product with the metric and three with the factors. Shapes are those of ``blast_systems``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structmat.fit import blast_systems as systems
from structmat.fit.descent import Descent
from structmat.fit.linalg import damped_inverse
from structmat.fit.metric import Whitened

DAMPING = 1e-3
"""The damping of the preconditioners, relative to their mean diagonal."""

ROW_BYTES = 2 * 2**20
"""The size of a few block rows of ``R x N`` coupled bases, which are worked on while they are in the cache."""


class BlastDescent(Descent):
    """The loss of the factors of a batch of weights.

    Args:
        whitened: The weights and their metric.
        left: ``(B, I, P, R)``.
        diag: ``(B, I, J, R)``.
        right: ``(B, J, R, Q)``.
    """

    def __init__(self, whitened: Whitened, left: Tensor, diag: Tensor, right: Tensor) -> None:
        self.whitened = whitened
        self.shapes = [left.shape, diag.shape, right.shape]
        self.sizes = [factor[0].numel() for factor in (left, diag, right)]
        self.start = torch.cat([factor.flatten(1) for factor in (left, diag, right)], 1)
        B, I, _P, R = left.shape
        N = whitened.weights.shape[-1]
        few = max(1, ROW_BYTES // (B * R * N * left.element_size())) if left.device.type == "cpu" else I
        self.rows = [slice(k, min(k + few, I)) for k in range(0, I, few)]
        self.coupled = left.new_empty(B, min(few, I), R, N)
        self.projected = torch.empty_like(self.coupled)
        self.rest = torch.empty_like(whitened.weights)
        self.pulled = self.rest
        energy = (whitened.metric.times(whitened.weights) * whitened.weights).sum((1, 2), dtype=torch.float64)
        self.energy = energy.where(energy > 0, 1)

    def factors(self, vectors: Tensor) -> list[Tensor]:
        """The factors ``left, diag, right`` that vectors ``(B, n)`` consist of, as views of them."""
        return [part.view(shape) for part, shape in zip(vectors.split(self.sizes, 1), self.shapes, strict=True)]

    def relative(self, loss: Tensor) -> Tensor:
        """The relative error ``(B,)`` of a loss, in the weights' dtype."""
        return (loss.clamp_min(0) / self.energy).sqrt().to(self.whitened.weights.dtype)

    def loss(self, factors: Tensor) -> Tensor:
        """``tr(G E C E^T)``, ``(B,)``, for ``E = W - W_hat``."""
        left, diag, right = self.factors(factors)
        by_component = right.transpose(1, 2).contiguous()
        shape = (*left.shape[:3], -1)
        rest, weights = self.rest.view(shape), self.whitened.weights.view(shape)
        for rows in self.rows:
            coupled = self._couple(diag[:, rows], by_component)
            rest[:, rows] = weights[:, rows] - left[:, rows] @ coupled
        self.pulled = self.whitened.metric.times(self.rest)
        return (self.pulled * self.rest).sum((1, 2), dtype=torch.float64)

    def gradient(self, factors: Tensor) -> Tensor:
        """Half the gradient with respect to ``left``, ``diag`` and ``right``, ``(B, n)``."""
        left, diag, right = self.factors(factors)
        by_component = right.transpose(1, 2).contiguous()  # (B, R, J, Q)
        gradient = torch.empty_like(factors)
        of_left, of_diag, of_right = self.factors(gradient)
        of_components = torch.zeros_like(by_component)
        pulled = self.pulled.view(*left.shape[:3], -1)
        for rows in self.rows:
            coupled = self._couple(diag[:, rows], by_component)
            of_left[:, rows] = pulled[:, rows] @ coupled.mT
            count = coupled.shape[1]
            projected = torch.matmul(left[:, rows].mT, pulled[:, rows], out=self.projected[:, :count])
            blocks = projected.view(*projected.shape[:3], *by_component.shape[2:])
            for k, i in enumerate(range(rows.start, rows.stop)):
                of_components.addcmul_(diag[:, i].mT[..., None], blocks[:, k])
            of_diag[:, rows] = blocks.mul_(by_component[:, None]).sum(-1).mT
        of_right.copy_(of_components.transpose(1, 2))
        return gradient.neg_()

    def refresh(self, factors: Tensor) -> None:
        """Invert the Gram matrices of the plain fit; for ``diag``, those of the mean block of each row."""
        left, diag, right = self.factors(factors)
        columns, rows = systems.gram_of_columns(left), systems.gram_of_rows(right)
        self.left_inverse = damped_inverse(systems.left_gram(diag, rows), DAMPING)
        self.right_inverse = damped_inverse(systems.right_gram(diag, columns), DAMPING)
        column_energies, row_energies = (gram.diagonal(dim1=-2, dim2=-1) for gram in (columns, rows))
        energies = column_energies[:, :, None] * row_energies[:, None]  # (B, I, J, R)
        energies = energies + DAMPING * energies.mean(-1, keepdim=True)
        self.diag_scale = torch.where(energies > 0, energies.rsqrt(), 0)
        correlations = systems.correlations(columns) * systems.correlations(rows).mean(1, keepdim=True)
        self.diag_inverse = damped_inverse(correlations, DAMPING)

    def precondition(self, gradient: Tensor) -> Tensor:
        """Solve the plain fit's systems."""
        of_left, of_diag, of_right = self.factors(gradient)
        solved = torch.empty_like(gradient)
        left, diag, right = self.factors(solved)
        torch.matmul(of_left, self.left_inverse, out=left)
        torch.matmul(self.right_inverse, of_right, out=right)
        torch.mul((of_diag * self.diag_scale) @ self.diag_inverse, self.diag_scale, out=diag)
        return solved

    def _couple(self, diag: Tensor, by_component: Tensor) -> Tensor:
        """``X_i = [D_i1 right_1 … D_iJ right_J]`` of a few rows, ``(B, I', R, N)``, in a buffer."""
        coupled = self.coupled[:, : diag.shape[1]]
        torch.mul(
            diag.mT[..., None], by_component[:, None], out=coupled.view(*coupled.shape[:3], *by_component.shape[2:])
        )
        return coupled
