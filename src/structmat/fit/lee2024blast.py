"""BLAST fit by preconditioned alternating sweeps (Lee et al. 2024, arXiv 2410.21262, section 3.2, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.fit import blast_systems as systems
from structmat.fit.base import Method, Progress
from structmat.fit.blast_metric import BlastDescent
from structmat.fit.descent import descend
from structmat.fit.linalg import factorize
from structmat.fit.metric import Metric, Whitened
from structmat.formats import Blast, Factors, Format

WARM_UP = 3
"""The number of sweeps after which a weight whose error rises by 5 % continues without over-relaxation."""

MEMORY_COST = 15
"""The cost of reading or writing a number, in multiplications of a product; 6 to 38 on matrices of 192 to 1,536."""

PATIENCE = 10
"""The number of sweeps over which the tolerance looks back."""


@dataclass(frozen=True)
class Lee2024Blast(Method[Blast]):
    """Sweeps ``left -> right -> diag`` in which each step is preconditioned by its damped Gram matrix.

    With ``step`` 1 and no damping this is alternating least squares. The default over-relaxes: a step near 2 reflects
    each factor at its least-squares solution, which keeps the error while it moves far; the last sweeps at step 1
    then collect the gain. Everything comes from Gram matrices and from ``W_ij right_j^T`` and ``left_i^T W_ij``; the
    reported error is measured from residuals at the end. ``benchmarks/blast_ablation.py`` shows what each setting is
    worth.

    Given the second moments of the inputs, and perhaps of the gradients at the output, these sweeps see their diagonal
    blocks only, which keeps their structure (they fit ``G_ii^(1/2) W_ij C_jj^(1/2)``), and are the start of
    ``metric_iterations`` quasi-Newton steps of all factors at once under all of both.

    Attributes:
        sweeps: The number of sweeps.
        step: The step size ``eta`` of the first sweep.
        settling: The share of the sweeps, at the end, that run at step 1; None for a step that falls linearly to 0.
        damping: The number ``delta``; ``epsilon = delta |W - W_hat|_F`` is added to each Gram matrix' diagonal, ``W``
            having root mean square 1. None for ``0.09 / sweeps``: longer runs can afford, and gain from, a lower one.
        balanced: Whether each sweep begins by giving every component the same size in all three factors, without
            which the damping weighs on them unevenly.
        start: The standard deviation of the entries of ``left right`` per component times ``R``, before the first
            sweep.
        tolerance: The share of a weight's error by which it has to fall over ten sweeps; otherwise the weight settles
            and stops. 0 for never.
        cg_iterations: The conjugate-gradient steps in place of each of the ``I J`` solves for ``diag``.
        direct_rank: The rank up to which those systems are solved by Cholesky instead.
        metric_iterations: The number of quasi-Newton steps under the full metric, where second moments are given.
        seed: The seed of the start.

    Raises:
        ValueError: If a setting is out of range.
        FloatingPointError: When fitting, if a system of equations stops being finite.
    """

    sweeps: int = 50
    step: float = 1.98
    settling: float | None = 0.07
    damping: float | None = None
    balanced: bool = True
    start: float = 1e-2
    tolerance: float = 0.0
    cg_iterations: int = 4
    direct_rank: int = 32
    metric_iterations: int = 100
    seed: int = 0

    formats: ClassVar[tuple[type[Format], ...]] = (Blast,)

    def __post_init__(self) -> None:
        _checks.positive_int(self.sweeps, "sweeps")
        _checks.positive_int(self.cg_iterations, "cg_iterations")
        _checks.natural_int(self.direct_rank, "direct_rank")
        _checks.natural_int(self.metric_iterations, "metric_iterations")
        if not 0 < self.step <= 2:
            raise ValueError(f"expected a step in (0, 2], beyond which the sweeps diverge, got {self.step}")
        if self.settling is not None and not 0 <= self.settling <= 1:
            raise ValueError(f"expected settling in [0, 1] or None, got {self.settling}")
        for name in ("damping", "tolerance"):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} to be at least 0, got {getattr(self, name)}")
        if not self.start > 0:
            raise ValueError(f"expected a positive start, got {self.start}")

    @classmethod
    def published(cls, *, sweeps: int = 300, seed: int = 0) -> Lee2024Blast:
        """The schedule of the paper's runs: ``eta`` falls linearly from 2 to 0, ``delta`` 0.1, a start of 1e-3.

        Two things are this library's: the weight is divided by its root mean square, where the paper's runs divide by
        the standard deviation (the same for a weight of mean 0, and finite for a constant one), and above
        ``direct_rank`` the systems of ``diag`` are solved by a few conjugate-gradient steps (on trained weights the
        final error agrees with exact solves to 1e-4; ``cg_iterations=16`` makes it exact to rounding).

        Args:
            sweeps: The number of sweeps, 300 in the paper.
            seed: The seed of the start.

        Returns:
            The method.
        """
        return cls(sweeps=sweeps, step=2.0, settling=None, damping=0.1, balanced=False, start=1e-3, seed=seed)

    @property
    def delta(self) -> float:
        """The damping, also where ``damping`` leaves it open."""
        return 0.09 / self.sweeps if self.damping is None else self.damping

    @property
    def settling_sweeps(self) -> int:
        """The number of sweeps, at the end, that run at step 1 (none where the step falls to 0 by itself)."""
        return 0 if self.settling is None else max(1, round(self.settling * self.sweeps))

    def steps(self) -> list[float]:
        """The step size ``eta`` of each sweep."""
        if self.settling is None:
            return [self.step * (1 - k / self.sweeps) for k in range(self.sweeps)]
        settling = self.settling_sweeps
        return [self.step] * (self.sweeps - settling) + [1.0] * settling

    def cost(self, format: Blast, *, aware: bool = False) -> float:
        """Multiplications of the sweeps' products, and the passes over the couplings' Gram matrices in their units."""
        (M, N), (I, J), R = format.shape, format.blocks, format.rank
        passes = MEMORY_COST * I * J * (3 + self.cg_iterations) * R**2
        sweep = 2 * M * N * R + (M + N) * R**2 + (I + J) * R**3 / 3 + passes
        iteration = 3 * M * N * R + M * N * N + 2 * (M + N) * R**2
        return self.sweeps * sweep + (self.metric_iterations * iteration + 20 * N**3 if aware else 0.0)

    def _solve(
        self, weights: Tensor, metric: Metric | None, format: Blast, progress: Progress | None
    ) -> tuple[Factors, Tensor]:
        total = self.sweeps + (0 if metric is None else self.metric_iterations)
        if metric is None:
            return self._sweep(weights, format, progress, total)
        whitened = Whitened.of(weights, metric, format.blocks)
        scale = whitened.weights.square().mean((1, 2), keepdim=True).sqrt()
        scale = scale.where(scale > 0, 1)
        whitened = replace(whitened, weights=whitened.weights / scale)
        swept, history = self._sweep(whitened.weights, format, progress, total)
        B, (I, J), (P, Q), R = len(weights), format.blocks, format.block_shape, format.rank
        shapes = {"left": (B, I, P, R), "diag": (B, I, J, R), "right": (B, J, R, Q)}
        problem = BlastDescent(whitened, *(swept[name].view(shape) for name, shape in shapes.items()))

        def show(step: int, loss: Tensor) -> None:
            if progress is not None:
                progress(len(history) + step, total, tuple(problem.relative(loss).tolist()))

        found, losses = descend(problem, problem.start, self.metric_iterations, show)
        left, diag, right = problem.factors(found)
        left = left if whitened.rows is None else whitened.rows @ left
        right = (right * scale[..., None]) @ whitened.columns
        a, b, c = balancing(left, diag, right)
        factors = {
            "left": (left * a[:, None, None]).reshape(B, -1, R),
            "diag": (diag * b[:, None, None]).reshape(B, -1, R),
            "right": (right * c[:, None, :, None]).flatten(1, 2),
        }
        return factors, torch.cat([history, problem.relative(losses).to(history)])

    def _sweep(
        self, weights: Tensor, format: Blast, progress: Progress | None, total: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The sweeps in Frobenius norm."""
        sweeper = Sweeper(weights, *self.initial(weights, format), self)
        schedule = weights.new_tensor([*self.steps(), 0.0])  # past its end a weight no longer changes
        position = torch.zeros(len(weights), dtype=torch.long, device=weights.device)
        history: list[Tensor] = []
        best = weights.new_full((len(weights),), torch.inf)
        calm = torch.zeros_like(position, dtype=torch.bool)
        while bool((position < self.sweeps).any()):
            running = position < self.sweeps
            step = schedule[position]
            sweeper.sweep(step.where(~calm, step.clamp_max(1)))
            error = sweeper.relative_error()
            if self.settling is not None and len(history) >= WARM_UP:
                best = torch.minimum(best, error)
                calm = calm | (error > 1.05 * best)
            history.append(error.where(running, torch.nan))
            position = (position + 1).clamp_max(self.sweeps)
            if self.tolerance and len(history) > PATIENCE:
                stalled = history[-1 - PATIENCE] - history[-1] <= self.tolerance * history[-1 - PATIENCE]
                position = position.where(~stalled, position.clamp_min(self.sweeps - self.settling_sweeps))
            if progress is not None:
                progress(len(history), total, tuple(error.tolist()))
        return sweeper.factors(), torch.stack(history)

    def initial(self, weights: Tensor, format: Blast) -> tuple[Tensor, Tensor, Tensor]:
        """The random start ``left, diag, right``, the same for every weight of the batch."""
        (I, J), (P, Q), R = format.blocks, format.block_shape, format.rank
        generator = torch.Generator().manual_seed(self.seed)
        scale = self.start / R**0.5
        left = scale * torch.randn(I, P, R, generator=generator, dtype=torch.float32)
        right = scale * torch.randn(J, R, Q, generator=generator, dtype=torch.float32)
        diag = torch.randn(I, J, R, generator=generator, dtype=torch.float32)
        B = len(weights)
        left, diag, right = (f.to(weights).expand(B, *f.shape).clone() for f in (left, diag, right))
        return left, diag, right

    def _dense_rows(self, format: Blast, factors: Factors) -> Iterator[tuple[slice, Tensor]]:
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
        self.projected = weights.new_empty(*left.shape[:2], left.shape[-1], weights.shape[-1])

    def sweep(self, step: Tensor) -> None:
        """One step for each of the three factors, of size ``step (B,)``."""
        if self.method.balanced:
            self._balance()
        self.diag_step(step, self.outer_steps(step))

    def relative_error(self) -> Tensor:
        """``(B,)``, of the factors before the last step for ``diag``; from the Gram matrices, hence approximate."""
        energy = self.energy.where(self.energy > 0, 1)
        return (self.loss / energy).sqrt().to(self.weights.dtype)

    def factors(self) -> dict[str, Tensor]:
        """The factors in the format's own layout, each component's scale spread evenly over the three."""
        self._balance()
        B, R = len(self.left), self.left.shape[-1]
        return {
            "left": self.left.reshape(B, -1, R),
            "diag": self.diag.reshape(B, -1, R),
            "right": self.right.flatten(1, 2),
        }

    def _balance(self) -> None:
        """Give each component one root mean square in all three factors; the matrix stays."""
        a, b, c = balancing(self.left, self.diag, self.right)
        self.left = self.left * a[:, None, None]
        self.diag = self.diag * b[:, None, None]
        self.right = self.right * c[:, None, :, None]
        self.left_grams.mul_(a[:, None, :, None]).mul_(a[:, None, None])
        self.right_grams.mul_(c[:, None, :, None]).mul_(c[:, None, None])

    def _damping(self, inner: Tensor, quadratic: Tensor) -> Tensor:
        """``epsilon (B, 1)`` from ``loss = |W|^2 - 2 inner + quadratic``, which rounding can make negative."""
        self.loss = (self.energy - 2 * inner.double() + quadratic.double()).clamp_min(0)
        return (self.method.delta * self.loss.sqrt()).to(self.weights.dtype)[:, None]

    def outer_steps(self, step: Tensor) -> Tensor:
        """The steps for ``left`` and ``right``; returns the damping for the step for ``diag``, ``(B, 1)``."""
        gram = systems.left_gram(self.diag, self.right_grams)
        target = systems.left_target(self.weights, self.diag, self.right)
        damping = self._damping((target * self.left).sum((1, 2, 3)), (gram * self.left_grams).sum((1, 2, 3)))
        # left - step (left G - B)(G + eps)^-1 = (1 - step) left + step (B + eps left)(G + eps)^-1
        target.add_(damping[..., None, None] * self.left)
        solved = torch.cholesky_solve(target.mT, factorize(gram, damping)).mT
        self.left = torch.lerp(self.left, solved, step[:, None, None, None])
        self.left_grams = systems.gram_of_columns(self.left)

        self.projected = systems.projected_blocks(self.weights, self.left, self.projected)
        gram = systems.right_gram(self.diag, self.left_grams)
        target = systems.right_target(self.projected, self.diag)
        damping = self._damping((target * self.right).sum((1, 2, 3)), (gram * self.right_grams).sum((1, 2, 3)))
        damped = target + damping[..., None, None] * self.right
        solved = torch.cholesky_solve(damped, factorize(gram.clone(), damping))
        self.right = torch.lerp(self.right, solved, step[:, None, None, None])
        self.right_grams = systems.gram_of_rows(self.right)
        return self._damping((target * self.right).sum((1, 2, 3)), (gram * self.right_grams).sum((1, 2, 3)))

    def diag_step(self, step: Tensor, damping: Tensor) -> None:
        """The step for ``diag``, with the damping that ``outer_steps`` returned."""
        target = systems.diag_target(self.projected, self.right)
        damping = damping[..., None]  # (B, 1, 1)
        buffer: Tensor | None = None
        for rows, columns in systems.diag_chunks(self.left_grams, self.right_grams):
            gram = systems.diag_gram(self.left_grams[:, rows], self.right_grams[:, columns], buffer)
            buffer = gram if buffer is None else buffer  # the first chunk is the largest
            diag = self.diag[:, rows, columns]
            residual = systems.times_vectors(gram, diag) - target[:, rows, columns]
            if diag.shape[-1] <= self.method.direct_rank:
                change = torch.cholesky_solve(residual[..., None], factorize(gram, damping))[..., 0]
            else:
                change = systems.approximately_solved(gram, damping, residual, self.method.cg_iterations)
            diag -= step[:, None, None, None] * change


def balancing(left: Tensor, diag: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The scales ``(B, R)`` of the three factors that give each component one size in all of them."""
    sizes = [left.square().mean((1, 2)).sqrt(), diag.square().mean((1, 2)).sqrt(), right.square().mean((1, 3)).sqrt()]
    logarithms = sizes[0].log() + sizes[1].log() + sizes[2].log()
    target = logarithms.div(3).exp()  # the geometric mean; 0 for a dead component
    a, b, c = (torch.where(target > 0, target / size, 1) for size in sizes)
    return a, b, c
