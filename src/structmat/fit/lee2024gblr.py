"""GBLR fits: segments and contents of rank-1 blocks for a trained weight (Gaudi-GBLR: Lee & Kim 2024, section 4.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.fit.base import Method, Progress
from structmat.fit.metric import Metric, Whitened, times_blocks
from structmat.fit.published_gblr import PublishedGblr
from structmat.fit.segments import Segments
from structmat.fit.svd import split_svd
from structmat.formats import Factors, GaudiGblr

FINAL_SWEEPS = 10
"""The number of sweeps of the contents after the segments have come to rest."""


@dataclass(frozen=True)
class Lee2024Gblr(Method[GaudiGblr]):
    """Alternates between the contents, which are a least-squares problem, and the segments, chosen by what they gain.

    It begins with the low-rank approximation at ``start`` of the budget. Each round fills what is free of the budget
    with new components on blocks of the residual, takes a few over-relaxed conjugate-gradient sweeps towards the
    least-squares contents, and then gives every component, on both axes, the cyclic segment whose gain exceeds its
    price by most, at one price per entry, which the budget sets; components that are not worth it die and make place.
    The paper's own initialisation, which learns contents and structure by Adam, is ``Lee2024Gblr.published()``.

    The budget is the format's number of parameters, which the result does not exceed. ``sigma`` is infinite, so that
    ``harden`` keeps the matrix. ``benchmarks/fit_gblr.py`` compares the settings' errors with those of the paper's.

    Attributes:
        rounds: The number of rounds of births and moves.
        start: The share of the budget for the low-rank start; where the result is worse than the low-rank approximation
            at the whole budget, that is returned.
        free: The share of the budget that the moves of the first round leave for births; it falls linearly to 0 at
            ``settling`` of the rounds.
        settling: The share of the rounds after which the moves leave nothing free.
        sweeps: The number of sweeps of the contents in each round.
        step: The over-relaxation of the sweeps.
        iterations: The conjugate-gradient steps of each sweep, for each factor.
        seed: The seed of the places of the births.

    Raises:
        ValueError: If a setting is out of range.
    """

    rounds: int = 20
    start: float = 0.8
    free: float = 0.12
    settling: float = 0.9
    sweeps: int = 2
    step: float = 1.5
    iterations: int = 3
    seed: int = 0

    formats: ClassVar[tuple[type[GaudiGblr], ...]] = (GaudiGblr,)

    def __post_init__(self) -> None:
        for name in ("rounds", "sweeps", "iterations"):
            _checks.positive_int(getattr(self, name), name)
        for name in ("start", "settling"):
            _checks.fraction(getattr(self, name), name)
        if not 0 <= self.free < 1:
            raise ValueError(f"expected free in [0, 1), got {self.free}")
        if not 0 < self.step < 2:
            raise ValueError(f"expected a step in (0, 2), beyond which the sweeps diverge, got {self.step}")

    @classmethod
    def published(cls, *, steps: int = 1000, learning_rate: float = 1e-2, seed: int = 0) -> PublishedGblr:
        """The paper's initialisation: SVD, mask search, Adam on contents and structure.

        Args:
            steps: The number of steps of Adam.
            learning_rate: The learning rate of Adam.
            seed: A number without effect; the initialisation has nothing random in it.

        Returns:
            The method.
        """
        return PublishedGblr(steps=steps, learning_rate=learning_rate)

    def cost(self, format: GaudiGblr, *, aware: bool = False) -> float:
        """Multiplications of the sweeps' products."""
        (M, N), K = format.shape, format.components
        sweep = 4 * M * N * K + self.iterations * (M + (N if aware else 0) + N) * K * K
        return 20.0 * M * N * min(M, N) + (self.rounds * (self.sweeps + 2) + FINAL_SWEEPS) * sweep

    def _solve(
        self, weights: Tensor, metric: Metric | None, format: GaudiGblr, progress: Progress | None
    ) -> tuple[Factors, Tensor]:
        budget = format.num_parameters()
        low_rank, segments = (
            self._low_rank(weights, metric, format, 1.0),
            self._low_rank(weights, metric, format, self.start),
        )
        generators = [torch.Generator().manual_seed(self.seed) for _ in weights]
        budgets = torch.full((len(weights),), budget, device=weights.device)
        history = []
        total = self.rounds + FINAL_SWEEPS
        for k in range(self.rounds):
            segments.bear(budgets, generators)
            for _ in range(self.sweeps):
                segments.sweep(self.step, self.iterations)
            free = self.free * max(0.0, 1 - k / (self.settling * self.rounds))
            segments.move((budgets * (1 - free)).long())
            history.append(segments.errors())
            if progress is not None:
                progress(k + 1, total, tuple(history[-1].tolist()))
        for k in range(FINAL_SWEEPS):
            segments.sweep(1.0, self.iterations)
            history.append(segments.errors())
            if progress is not None:
                progress(self.rounds + k + 1, total, tuple(history[-1].tolist()))
        better = segments.errors() <= low_rank.errors()
        chosen = [_factors(segments if better[b] else low_rank, b) for b in range(len(weights))]
        return {name: torch.stack([one[name] for one in chosen]) for name in chosen[0]}, torch.stack(history)

    def _low_rank(self, weights: Tensor, metric: Metric | None, format: GaudiGblr, share: float) -> Segments:
        """Components of whole axes, as many as a share of the budget allows."""
        B, (M, N), K = len(weights), format.shape, format.components
        rank = min(int(share * format.num_parameters()) // (M + N), K, M, N)
        left, right = weights.new_zeros(B, M, K), weights.new_zeros(B, K, N)
        if rank:
            whitened = None if metric is None else Whitened.of(weights, metric, (1, 1))
            U, S, Vh = torch.linalg.svd(weights if whitened is None else whitened.weights, full_matrices=False)
            bases = split_svd(U, S, Vh, rank)
            rows = None if whitened is None else whitened.rows
            left[:, :, :rank] = bases[0] if rows is None else rows[:, 0] @ bases[0]
            right[:, :rank] = bases[1] if whitened is None else times_blocks(bases[1], whitened.columns)
        alive = torch.arange(K, device=weights.device) < rank
        out, inn = (alive[None, :, None].repeat(B, 1, n) for n in (M, N))
        segments = Segments(
            weights, None if metric is None else metric.to(weights), left, right, out, inn, format.multiple
        )
        segments.balance()
        return segments


def _factors(segments: Segments, b: int) -> dict[str, Tensor]:
    """The factors of one weight of the batch."""
    location, width = zip(*(_run(mask[b]) for mask in (segments.out, segments.inn)), strict=True)
    return {
        "left": segments.left[b],
        "right": segments.right[b],
        "location": torch.stack(location),
        "width": torch.stack(width),
        "sigma": torch.full((1,), torch.inf, device=segments.left.device),
    }


def _run(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Location and width of the cyclic run of each row ``(K, n)``, as shares of the axis."""
    n = mask.shape[1]
    begins = mask & ~mask.roll(1, 1)
    start = begins.to(torch.uint8).argmax(1)  # 0 for an empty or a full row
    return (start.double() / n).float(), (mask.sum(1).double() / n).float()
