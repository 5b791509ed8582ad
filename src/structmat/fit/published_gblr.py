"""The published initialisation of Gaudi-GBLR from a trained weight (Lee & Kim 2024, section 4.3 and appendix)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.fit.base import Method, Progress
from structmat.fit.metric import Metric
from structmat.formats import Factors, GaudiGblr

SMOOTHING = 1 / 32
"""The standard deviation of the mask search's Gaussian, as a share of the axis (the paper gives none)."""


@dataclass(frozen=True)
class PublishedGblr(Method[GaudiGblr]):
    """Singular value decomposition, mask search, then Adam on contents and structure together.

    The contents are ``U sqrt(S)`` and ``sqrt(S) V^T``. The correlations ``|W W^T|`` and ``|W^T W|`` are smoothed along
    their rows and thresholded at the rows' means; the longest cyclic run is the segment of that row or column. The
    k-th most energetic row and column give component ``k`` its segments, until the budget is spent. Adam then lowers
    the relative squared error; after every step the widths' excess over the budget is subtracted. Given the second
    moments of inputs and gradients, the error is that of the output.

    Attributes:
        steps: The number of steps of Adam.
        learning_rate: The learning rate of Adam, for contents and structure.

    Raises:
        ValueError: If a setting is out of range.
    """

    steps: int = 1000
    learning_rate: float = 1e-2

    formats: ClassVar[tuple[type[GaudiGblr], ...]] = (GaudiGblr,)

    def __post_init__(self) -> None:
        _checks.positive_int(self.steps, "steps")
        if not self.learning_rate > 0:
            raise ValueError(f"expected a positive learning_rate, got {self.learning_rate}")

    def cost(self, format: GaudiGblr, *, aware: bool = False) -> float:
        """Multiplications of the steps' products."""
        (M, N), K = format.shape, format.components
        return 20.0 * M * N * min(M, N) + self.steps * (6.0 * M * N * K + (2.0 * M * N * N if aware else 0))

    def _solve(
        self, weights: Tensor, metric: Metric | None, format: GaudiGblr, progress: Progress | None
    ) -> tuple[Factors, Tensor]:
        results, histories = [], []
        for b, weight in enumerate(weights):
            factors = self._start(weight, format)
            one = None if metric is None else metric.of(b).to(weight)
            histories.append(self._refine(weight, one, format, factors, progress))
            results.append({name: factor.detach() for name, factor in factors.items()})
        stacked = {name: torch.stack([result[name] for result in results]) for name in results[0]}
        return stacked, torch.stack(histories, 1)

    def _start(self, weight: Tensor, format: GaudiGblr) -> dict[str, Tensor]:
        (M, N), K = format.shape, format.components
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        rank = min(K, len(S))
        left, right = weight.new_zeros(M, K), weight.new_zeros(K, N)
        left[:, :rank] = U[:, :rank] * S[:rank].sqrt()
        right[:rank] = S[:rank].sqrt()[:, None] * Vh[:rank]
        location, width = torch.zeros(2, K, device=weight.device), torch.zeros(2, K, device=weight.device)
        for axis, matrix in enumerate((weight, weight.mT)):
            n = len(matrix)
            begins, lengths = longest_runs(_smoothed((matrix @ matrix.mT).abs()))
            order = matrix.square().sum(1).argsort(descending=True)[: min(K, n)]
            location[axis, : len(order)] = begins[order] / n
            width[axis, : len(order)] = lengths[order] / n
        sizes = torch.tensor(format.shape, device=weight.device)[:, None]
        spent = (width * sizes).sum(0).cumsum(0)
        width[:, spent > format.num_parameters()] = 0
        sigma = torch.full((1,), torch.inf, device=weight.device)
        return {"left": left, "right": right, "location": location, "width": width, "sigma": sigma}

    def _refine(
        self,
        weight: Tensor,
        metric: Metric | None,
        format: GaudiGblr,
        factors: dict[str, Tensor],
        progress: Progress | None,
    ) -> Tensor:
        """Adam on all factors, in place, back to the start if that was better; the relative error before each step."""
        start = {name: factor.clone() for name, factor in factors.items()}
        learned = [factors[name].requires_grad_() for name in ("left", "right", "location", "width")]
        optimizer = torch.optim.Adam(learned, lr=self.learning_rate)
        budget = format.num_parameters()
        energy = self._energy(weight, metric).clamp_min(torch.finfo(weight.dtype).tiny)
        history = []
        for step in range(self.steps):
            with torch.enable_grad():
                loss = self._energy(weight - format.to_dense(factors), metric) / energy
                gradients = torch.autograd.grad(loss, learned)
            history.append(loss.detach().clamp_min(0).sqrt())
            for tensor, gradient in zip(learned, gradients, strict=True):
                tensor.grad = gradient
            optimizer.step()
            subtract_excess_(factors["width"], format, budget)
            if progress is not None:
                progress(step + 1, self.steps, (float(history[-1]),))
        with torch.no_grad():
            if not float(self._energy(weight - format.to_dense(factors), metric) / energy) <= float(history[0]) ** 2:
                for name, factor in start.items():
                    factors[name].copy_(factor)
        return torch.stack(history)

    @staticmethod
    def _energy(matrix: Tensor, metric: Metric | None) -> Tensor:
        return (matrix * (matrix if metric is None else metric.times(matrix)[0])).sum()


def subtract_excess_(width: Tensor, format: GaudiGblr, budget: int) -> None:
    """Clamp widths ``(2, K)`` to [0, 1] and take the least amount off all of them that keeps the budget, in place."""
    with torch.no_grad():
        width.clamp_(0, 1)
        low, high = 0.0, 1.0
        if float(format.cost(width, "parameters")) <= budget:
            return
        for _ in range(20):
            middle = (low + high) / 2
            within = float(format.cost((width - middle).clamp_min(0), "parameters")) <= budget
            low, high = (low, middle) if within else (middle, high)
        width.sub_(high).clamp_min_(0)


def longest_runs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Find the longest cyclic run of entries above the mean of each row: its beginning and its length.

    Args:
        matrix: ``(n, n)``.

    Returns:
        Both ``(n,)``, whole numbers.
    """
    n = matrix.shape[1]
    above = matrix >= matrix.mean(1, keepdim=True)
    twice = torch.cat([above, above], 1)
    places = torch.arange(2 * n, device=matrix.device)
    last_below = torch.where(twice, -1, places).cummax(1).values
    lengths = (places - last_below).clamp_max(n).where(twice, 0)
    length, end = lengths.max(1)
    return (end - length + 1) % n, length


def _smoothed(matrix: Tensor) -> Tensor:
    """Each row convolved with a Gaussian, cyclically."""
    n = matrix.shape[1]
    frequencies = torch.arange(n // 2 + 1, device=matrix.device, dtype=matrix.dtype)
    response = torch.exp(-2 * (math.pi * SMOOTHING * frequencies).square())
    return torch.fft.irfft(torch.fft.rfft(matrix) * response, n)
