"""Monarch fit: the best approximation in closed form (Dao et al. 2022, arXiv 2204.00595, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structmat.fit.base import Method, Progress, no_history
from structmat.fit.svd import split_svd
from structmat.formats import Factors, Format, Monarch


@dataclass(frozen=True)
class Dao2022Monarch(Method[Monarch]):
    """The best Monarch approximation in Frobenius norm: a truncated SVD of every block (of the permuted matrix)."""

    formats: ClassVar[tuple[type[Format], ...]] = (Monarch,)

    def _solve(self, weights: Tensor, format: Monarch, progress: Progress | None) -> tuple[Factors, Tensor]:
        (I, J), (P, Q), t = format.blocks, format.block_shape, format.rank
        B = len(weights)
        rows = weights.view(B, P, I, J, Q).transpose(1, 2) if format.permute_output else weights.view(B, I, P, J, Q)
        U, S, Vh = torch.linalg.svd(rows.transpose(2, 3), full_matrices=False)  # of (B, I, J, P, Q)
        left, right = split_svd(U, S, Vh, t)  # (B, I, J, P, t), (B, I, J, t, Q)
        factors = {
            "left": left.transpose(2, 3).reshape(B, I * P, J * t),
            "right": right.transpose(1, 2).reshape(B, J * I * t, Q),
        }
        return factors, no_history(weights)
