"""Fits for matrices that are zero outside some blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.fit.base import Method, Progress, no_history
from structmat.fit.svd import split_svd
from structmat.formats import BlockDiagonal, BlockSparse, Factors, Format


@dataclass(frozen=True)
class Magnitude(Method[BlockDiagonal | BlockSparse]):
    """Copy the blocks: the best approximation in Frobenius norm on a given pattern.

    With a low-rank term, blocks and low-rank term are fitted in turn to what the other leaves (alternating
    projections: Zhou & Tao 2011, GoDec), the low-rank term by an SVD first and then by one step of a subspace iteration
    a round; the error never grows from one round to the next.

    Attributes:
        rounds: Most rounds with a low-rank term.
        tolerance: Stop once a round lowers the relative error by less than this share of it.

    Raises:
        ValueError: If ``rounds`` is below 1 or ``tolerance`` is negative.
    """

    rounds: int = 100
    tolerance: float = 1e-4

    formats: ClassVar[tuple[type[Format], ...]] = (BlockDiagonal, BlockSparse)

    def __post_init__(self) -> None:
        _checks.positive_int(self.rounds, "rounds")
        if not self.tolerance >= 0:
            raise ValueError(f"expected tolerance to be at least 0, got {self.tolerance}")

    def _solve(
        self, weights: Tensor, format: BlockDiagonal | BlockSparse, progress: Progress | None
    ) -> tuple[Factors, Tensor]:
        if isinstance(format, BlockDiagonal):
            rows = columns = list(range(format.blocks))
            counts, rank = (format.blocks, format.blocks), 0
        else:
            rows, columns = map(list, zip(*format.positions, strict=True))
            counts, rank = format.blocks, format.rank
        (I, J), (P, Q), B = counts, format.block_shape, len(weights)

        def grid(matrix: Tensor) -> Tensor:
            return matrix.view(B, I, P, J, Q).transpose(2, 3)  # (B, I, J, P, Q)

        def on_pattern(matrix: Tensor) -> Tensor:
            return grid(matrix)[:, rows, columns]  # (B, n, P, Q)

        blocks = on_pattern(weights)
        if not rank:
            return {"blocks": blocks.reshape(B, -1, Q)}, no_history(weights)

        norm = torch.linalg.matrix_norm(weights)
        norm = norm.where(norm > 0, 1)
        running = torch.ones(B, dtype=torch.bool, device=weights.device)
        blocks = 0.9 * blocks  # all of W there is a saddle, which a low-rank term fitted to the rest cannot leave
        left = right = weights.new_empty(0)
        history: list[Tensor] = []
        for step in range(self.rounds):
            rest = weights.clone()
            grid(rest)[:, rows, columns] -= blocks
            if step == 0:
                U, S, Vh = torch.linalg.svd(rest, full_matrices=False)
                left, right = split_svd(U, S, Vh, rank)
            else:  # least squares for the column space, then for the rows: one step of a subspace iteration
                basis = torch.linalg.qr(rest @ right.mT).Q
                left = torch.where(running[:, None, None], basis, left)
                right = torch.where(running[:, None, None], basis.mT @ rest, right)
            rest = weights - left @ right
            blocks = on_pattern(rest)
            grid(rest)[:, rows, columns] = 0
            error = torch.linalg.matrix_norm(rest) / norm
            history.append(error.where(running, torch.nan))
            if progress is not None:
                progress(step + 1, self.rounds, tuple(error.tolist()))
            if step:
                running = running & (history[-2] - history[-1] > self.tolerance * history[-2])
                if not running.any():
                    break
        U, S, Vh = torch.linalg.svd(right, full_matrices=False)
        left, right = split_svd(left @ U, S, Vh, rank)
        return {"blocks": blocks.reshape(B, -1, Q), "left": left, "right": right}, torch.stack(history)
