"""Low-rank fits: the truncated singular value decomposition, exact or randomised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.fit.base import Method, Progress, no_history
from structmat.fit.metric import Metric, Whitened, times_blocks
from structmat.formats import Factors, Format, LowRank


@dataclass(frozen=True)
class TruncatedSvd(Method[LowRank]):
    """The best approximation of rank ``R`` in Frobenius norm (Eckart & Young 1936), split evenly over the factors.

    Given the second moment ``C`` of the inputs, the best one for the output: the truncated SVD of ``W C^(1/2)``, times
    ``C^(-1/2)`` (Chen et al. 2021, arXiv 2106.01979; known as whitened SVD); with that of gradients, ``G``, the best
    one for ``tr(G E C E^T)``: that of ``G^(1/2) W C^(1/2)``, between the inverses of both.

    The randomised form finds the range by power iterations on a random sketch (Halko, Martinsson & Tropp 2011,
    algorithm 4.4); its error is within a fraction of a percent of the exact one for the spectra of trained weights.

    Attributes:
        randomized: Whether to use the randomised form; None for using it where it is much faster, which is at
            ``16 R <= min(M, N)`` and ``min(M, N) >= 512``.
        oversample: The number of columns of the sketch beyond the rank.
        power_iterations: The number of times that the sketch is multiplied by ``W W^T``.
        seed: The seed of the sketch.

    Raises:
        ValueError: If ``oversample`` or ``power_iterations`` is negative.
    """

    randomized: bool | None = None
    oversample: int = 16
    power_iterations: int = 4
    seed: int = 0

    formats: ClassVar[tuple[type[Format], ...]] = (LowRank,)

    def __post_init__(self) -> None:
        _checks.natural_int(self.oversample, "oversample")
        _checks.natural_int(self.power_iterations, "power_iterations")

    def is_randomized(self, format: LowRank) -> bool:
        """Whether this format's fit is randomised."""
        if self.randomized is not None:
            return self.randomized
        return format.max_rank >= 512 and 16 * format.rank <= format.max_rank

    def _solve(
        self, weights: Tensor, metric: Metric | None, format: LowRank, progress: Progress | None
    ) -> tuple[Factors, Tensor]:
        whitened = None if metric is None else Whitened.of(weights, metric, (1, 1))
        weights = weights if whitened is None else whitened.weights
        if self.is_randomized(format):
            U, S, Vh = self._randomized_svd(weights, format.rank)
        else:
            U, S, Vh = torch.linalg.svd(weights, full_matrices=False)
        left, right = split_svd(U, S, Vh, format.rank)
        if whitened is not None:
            left = left if whitened.rows is None else whitened.rows[:, 0] @ left
            left, right = balanced(left, times_blocks(right, whitened.columns))
        return {"left": left, "right": right}, no_history(weights)

    def _randomized_svd(self, weights: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        N = weights.shape[-1]
        columns = min(rank + self.oversample, *weights.shape[1:])
        generator = torch.Generator().manual_seed(self.seed)
        sketch = torch.randn(N, columns, generator=generator).to(weights)
        basis = torch.linalg.qr(weights @ sketch).Q  # (B, M, columns)
        for _ in range(self.power_iterations):
            basis = torch.linalg.qr(weights @ torch.linalg.qr(weights.mT @ basis).Q).Q
        U, S, Vh = torch.linalg.svd(basis.mT @ weights, full_matrices=False)
        return basis @ U, S, Vh


def split_svd(U: Tensor, S: Tensor, Vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first ``rank`` components as ``U sqrt(S)`` and ``sqrt(S) V^T``."""
    root = S[..., :rank].sqrt()
    return U[..., :rank] * root[..., None, :], root[..., :, None] * Vh[..., :rank, :]


def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``left (..., M, R)`` and ``right (..., R, N)`` with each component's root mean square the same in both."""
    sizes = left.square().mean(-2).sqrt(), right.square().mean(-1).sqrt()
    target = (sizes[0] * sizes[1]).sqrt()
    a, b = (torch.where(target > 0, target / size, 1) for size in sizes)
    return left * a[..., None, :], right * b[..., :, None]
