"""BLAST fit by preconditioned alternating sweeps (Lee et al. 2024, arXiv 2410.21262, section 3.2, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.fit import blast_systems as systems
from structmat.fit.base import Method, Progress
from structmat.formats import Blast, Factors, Format


@dataclass(frozen=True)
class Lee2024Blast(Method):
    """Sweeps ``left -> right -> diag``, each step preconditioned by its damped Gram matrix.

    With ``step`` 1 and no damping this is alternating least squares. The default over-relaxes: a step near 2 reflects
    each factor at its least-squares solution, which keeps the error while it moves far; the last sweeps at step 1
    then collect the gain. Everything comes from Gram matrices and from ``W_ij right_j^T`` and ``left_i^T W_ij``; the
    reported error is measured from residuals at the end.

    Attributes:
        sweeps: How many.
        step: ``eta`` of the first sweep.
        settling: Share of the sweeps, at the end, that run at step 1; None for a step that falls linearly to 0.
        damping: ``delta``; ``epsilon = delta |W - W_hat|_F`` is added to each Gram matrix' diagonal, ``W`` having root
            mean square 1.
        start: Standard deviation of the entries of ``left right`` per component times ``R``, before the first sweep.
        tolerance: Stop once the error has fallen by less than this share of it over the last ten sweeps, and settle;
            0 for never.
        cg_iterations: Conjugate-gradient steps in place of each of the ``I J`` solves for ``diag``.
        direct_rank: Up to this rank those systems are solved by Cholesky instead.
        seed: Of the start.

    Raises:
        ValueError: If a setting is out of range.
    """

    sweeps: int = 50
    step: float = 1.98
    settling: float | None = 0.07
    damping: float = 0.003
    start: float = 1e-2
    tolerance: float = 0.0
    cg_iterations: int = 4
    direct_rank: int = 160
    seed: int = 0

    formats: ClassVar[tuple[type[Format], ...]] = (Blast,)

    def __post_init__(self) -> None:
        _checks.positive_int(self.sweeps, "sweeps")
        _checks.positive_int(self.cg_iterations, "cg_iterations")
        _checks.natural_int(self.direct_rank, "direct_rank")
        if not 0 < self.step <= 2:
            raise ValueError(f"expected a step in (0, 2], beyond which the sweeps diverge, got {self.step}")
        if self.settling is not None and not 0 <= self.settling <= 1:
            raise ValueError(f"expected settling in [0, 1] or None, got {self.settling}")
        for name in ("damping", "tolerance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} to be at least 0, got {getattr(self, name)}")
        if not self.start > 0:
            raise ValueError(f"expected a positive start, got {self.start}")

    @classmethod
    def published(cls, *, sweeps: int = 300, seed: int = 0) -> Lee2024Blast:
        """The schedule of the paper's runs: ``eta`` falls linearly from 2 to 0, ``delta`` 0.1, a start of 1e-3.

        Args:
            sweeps: 300 in the paper.
            seed: Of the start.

        Returns:
            The method.
        """
        return cls(sweeps=sweeps, step=2.0, settling=None, damping=0.1, start=1e-3, seed=seed)

    def steps(self) -> Iterator[float]:
        """``eta`` of each sweep."""
        for k in range(self.sweeps):
            if self.settling is None:
                yield self.step * (1 - k / self.sweeps)
            else:
                yield self.step if k < self.sweeps - max(1, round(self.settling * self.sweeps)) else 1.0

    def _solve(self, weights: Tensor, format: Blast, progress: Progress | None) -> tuple[Factors, Tensor]:
        sweeper = Sweeper(weights, *self.initial(weights, format), self)
        history = []
        for k, step in enumerate(self.steps()):
            sweeper.sweep(step)
            history.append(sweeper.relative_error())
            if progress is not None:
                progress(k + 1, self.sweeps, tuple(history[-1].tolist()))
        return sweeper.factors(), torch.stack(history)

    def initial(self, weights: Tensor, format: Blast) -> tuple[Tensor, Tensor, Tensor]:
        """The random start, the same for every weight of the batch: ``left``, ``diag``, ``right`` with a leading ``B``."""
        (I, J), (P, Q), R = format.blocks, format.block_shape, format.rank
        generator = torch.Generator().manual_seed(self.seed)
        scale = self.start / R**0.5
        left = scale * torch.randn(I, P, R, generator=generator, dtype=torch.float32)
        right = scale * torch.randn(J, R, Q, generator=generator, dtype=torch.float32)
        diag = torch.randn(I, J, R, generator=generator, dtype=torch.float32)
        B = len(weights)
        return tuple(f.to(weights).expand(B, *f.shape).clone() for f in (left, diag, right))

    def _dense_rows(self, format: Blast, factors: Factors):
        left, diag, right = format.views(factors)
        P = format.block_shape[0]
        for i in range(format.blocks[0]):
            coupled = (diag[i, :, :, None] * right).transpose(0, 1).reshape(format.rank, format.N)
            yield slice(i * P, (i + 1) * P), left[i] @ coupled


class Sweeper:
    """The factors of a batch of weights during the sweeps, with the Gram matrices that the next step needs.

    Args:
        weights: ``(B, M, N)``.
        left: ``(B, I, P, R)``.
        diag: ``(B, I, J, R)``.
        right: ``(B, J, R, Q)``.
        method: The settings.
    """

    def __init__(self, weights: Tensor, left: Tensor, diag: Tensor, right: Tensor, method: Lee2024Blast) -> None:
        self.weights, self.left, self.diag, self.right = weights, left, diag, right
        self.method = method
        self.energy = weights.square().sum((1, 2), dtype=torch.float64)
        self.left_grams = systems.gram_of_columns(left)
        self.right_grams = systems.gram_of_rows(right)
        self.loss = self.energy

    def sweep(self, step: float) -> None:
        """One step for each of the three factors."""
        projected = self._left_and_right(step)
        self._diag(step, projected)

    def relative_error(self) -> Tensor:
        """``(B,)``, of the factors before the last step for ``diag``; from the Gram matrices, hence approximate."""
        energy = self.energy.where(self.energy > 0, 1)
        return (self.loss / energy).sqrt().to(self.weights.dtype)

    def factors(self) -> dict[str, Tensor]:
        """The factors in the format's own layout, each component's scale spread evenly over the three."""
        left, diag, right = balance(self.left, self.diag, self.right)
        R = left.shape[-1]
        B = len(left)
        return {"left": left.reshape(B, -1, R), "diag": diag.reshape(B, -1, R), "right": right.flatten(1, 2)}

    def _damping(self, inner: Tensor, quadratic: Tensor) -> Tensor:
        """``epsilon (B, 1)`` from ``loss = |W|^2 - 2 inner + quadratic``, which rounding can make negative."""
        self.loss = (self.energy - 2 * inner.double() + quadratic.double()).clamp_min(0)
        return (self.method.damping * self.loss.sqrt()).to(self.weights.dtype)[:, None]

    def _left_and_right(self, step: float) -> Tensor:
        gram = systems.left_gram(self.diag, self.right_grams)
        target = systems.left_target(self.weights, self.diag, self.right)
        damping = self._damping((target * self.left).sum((1, 2, 3)), (gram * self.left_grams).sum((1, 2, 3)))
        # left - step (left G - B)(G + eps)^-1 = (1 - step) left + step (B + eps left)(G + eps)^-1
        target.add_(damping[..., None, None] * self.left)
        solved = torch.cholesky_solve(target.mT, systems.factorize(gram, damping)).mT
        self.left = torch.lerp(self.left, solved, step)
        self.left_grams = systems.gram_of_columns(self.left)

        projected = systems.projected_blocks(self.weights, self.left)
        gram = systems.right_gram(self.diag, self.left_grams)
        target = systems.right_target(projected, self.diag)
        damping = self._damping((target * self.right).sum((1, 2, 3)), (gram * self.right_grams).sum((1, 2, 3)))
        target = target + damping[..., None, None] * self.right
        solved = torch.cholesky_solve(target, systems.factorize(gram, damping))
        self.right = torch.lerp(self.right, solved, step)
        self.right_grams = systems.gram_of_rows(self.right)
        return projected

    def _diag(self, step: float, projected: Tensor) -> None:
        target = systems.diag_target(projected, self.right)
        I, R = target.shape[1], target.shape[-1]
        product = torch.empty_like(target)
        for i in range(I):
            gram = systems.diag_grams(self.left_grams, self.right_grams, i)
            product[:, i] = (gram @ self.diag[:, i, :, :, None])[..., 0]
        damping = self._damping((target * self.diag).sum((1, 2, 3)), (product * self.diag).sum((1, 2, 3)))
        residual = product - target
        for i in range(I):
            gram = systems.diag_grams(self.left_grams, self.right_grams, i)
            if R <= self.method.direct_rank:
                change = torch.cholesky_solve(residual[:, i, :, :, None], systems.factorize(gram, damping))[..., 0]
            else:
                change = systems.conjugate_gradients(gram, damping, residual[:, i], self.method.cg_iterations)
            self.diag[:, i] -= step * change


def balance(left: Tensor, diag: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give each component the same root mean square in all three factors; their product stays."""
    sizes = [left.square().mean((1, 2)).sqrt(), diag.square().mean((1, 2)).sqrt(), right.square().mean((1, 3)).sqrt()]
    geometric = (sizes[0] * sizes[1] * sizes[2]).pow(1 / 3)  # (B, R)
    a, b, c = (torch.where(geometric > 0, geometric / size.where(size > 0, 1), 1) for size in sizes)
    return left * a[:, None, None], diag * b[:, None, None], right * c[:, None, :, None]
