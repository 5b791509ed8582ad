"""A fit by gradient descent for any format, through its dense matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.fit.base import Method, Progress
from structmat.formats import Factors, Format


@dataclass(frozen=True)
class GradientFit(Method[Format]):
    """Adam on the relative squared error, with a cosine schedule, from the format's random init.

    The method for a format that has no better one, and an independent check of those that have. It keeps the best
    factors that it met.

    Attributes:
        steps: Number of steps.
        learning_rate: At the start, relative to the root mean square of each factor.
        seed: Of the init.

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

    def _solve(self, weights: Tensor, format: Format, progress: Progress | None) -> tuple[Factors, Tensor]:
        solved = [self._solve_one(weight, format, progress) for weight in weights]
        factors = {name: torch.stack([factors[name] for factors, _ in solved]) for name in solved[0][0]}
        return factors, torch.stack([history for _, history in solved], 1)

    @torch.enable_grad()
    def _solve_one(self, weight: Tensor, format: Format, progress: Progress | None) -> tuple[dict[str, Tensor], Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        start = format.init(generator=generator, dtype=weight.dtype, device=weight.device)
        start = format.scaled(start, (3 * format.N) ** 0.5)  # entries of variance 1, as the weight's
        trainable = [name for name, spec in format.factor_specs().items() if spec.trainable]
        factors = {n: f.requires_grad_() if n in trainable else f for n, f in start.items()}
        groups = [
            {
                "params": [factors[n]],
                "lr": self.learning_rate * max(factors[n].detach().square().mean().sqrt().item(), 1e-8),
            }
            for n in trainable
        ]
        optimizer = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        energy = weight.square().sum()
        energy = energy.where(energy > 0, 1)

        best = {n: f.detach().clone() for n, f in factors.items()}
        best_loss, history = weight.new_tensor(torch.inf), []
        for step in range(self.steps):
            optimizer.zero_grad()
            loss = (weight - format.to_dense(factors)).square().sum() / energy
            history.append(loss.detach().sqrt())
            if loss < best_loss:
                best_loss, best = loss.detach(), {n: f.detach().clone() for n, f in factors.items()}
            loss.backward()
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, self.steps, (float(history[-1]),))
        return best, torch.stack(history)
