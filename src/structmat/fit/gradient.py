"""A fit by gradient descent for any format, through its dense matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.fit.base import Method, Progress
from structmat.fit.metric import Metric
from structmat.formats import Factors, Format


@dataclass(frozen=True)
class GradientFit(Method[Format]):
    """Adam on the relative squared error, with a cosine schedule, from the format's random init.

    This fits every format, and is the default of those that have no better method. It keeps the best factors that it
    met.

    Attributes:
        steps: The number of steps.
        learning_rate: The learning rate at the start, relative to the root mean square of each factor.
        seed: The seed of the init.

    Raises:
        ValueError: If ``steps`` is below 1 or ``learning_rate`` is not positive.
    """

    steps: int = 1000
    learning_rate: float = 0.02
    seed: int = 0

    formats: ClassVar[tuple[type[Format], ...]] = (Format,)

    def __post_init__(self) -> None:
        _checks.positive_int(self.steps, "steps")
        if not self.learning_rate > 0:
            raise ValueError(f"expected a positive learning_rate, got {self.learning_rate}")

    @torch.enable_grad()
    def _solve(
        self, weights: Tensor, metric: Metric | None, format: Format, progress: Progress | None
    ) -> tuple[Factors, Tensor]:
        measured = _same if metric is None else metric.halved(weights)
        trainable = [name for name, spec in format.factor_specs().items() if spec.trainable]
        candidates = [self._start(weight, format, trainable) for weight in weights]
        groups = [
            {"params": [factors[name]], "lr": self.learning_rate * _root_mean_square(factors[name])}
            for factors in candidates
            for name in trainable
        ]
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        energy = measured(weights).square().sum((1, 2))
        energy = energy.where(energy > 0, 1)

        best = [{n: f.detach().clone() for n, f in factors.items()} for factors in candidates]
        best_loss = torch.full_like(energy, torch.inf)
        history: list[Tensor] = []
        for step in range(self.steps):
            optimizer.zero_grad()
            approximations = torch.stack([format.to_dense(factors) for factors in candidates])
            losses = measured(weights - approximations).square().sum((1, 2)) / energy
            history.append(losses.detach().sqrt())
            for b in (losses.detach() < best_loss).nonzero().flatten().tolist():
                best_loss[b] = losses[b].detach()
                best[b] = {n: f.detach().clone() for n, f in candidates[b].items()}
            losses.sum().backward()
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, self.steps, tuple(history[-1].tolist()))
        return {name: torch.stack([factors[name] for factors in best]) for name in best[0]}, torch.stack(history)

    def _start(self, weight: Tensor, format: Format, trainable: list[str]) -> dict[str, Tensor]:
        """The format's init, scaled to entries of variance 1, as the weight's."""
        generator = torch.Generator().manual_seed(self.seed)
        start = format.init(generator=generator, dtype=weight.dtype, device=weight.device)
        start = format.scaled(start, (3 * format.N) ** 0.5)
        return {n: f.detach().clone().requires_grad_() if n in trainable else f for n, f in start.items()}


def _same(matrix: Tensor) -> Tensor:
    return matrix


def _root_mean_square(factor: Tensor) -> float:
    return max(factor.detach().square().mean().sqrt().item(), 1e-8)
