"""Fits for matrices that are zero outside some blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.fit.base import Method, Progress, no_history
from structmat.fit.linalg import factorize
from structmat.fit.metric import Metric, roots, times_blocks
from structmat.fit.svd import balanced, split_svd
from structmat.formats import BlockDiagonal, BlockSparse, Factors, Format


@dataclass(frozen=True)
class Magnitude(Method[BlockDiagonal | BlockSparse]):
    """Copy the blocks: the best approximation in Frobenius norm on a given pattern.

    Given the second moment of the inputs, the best one for the output: in each block row the regression of the full
    output on the inputs that the pattern reads, in closed form. The second moment of gradients changes nothing: it
    would couple the rows, which this closed form takes one by one.

    With a low-rank term, blocks and low-rank term are fitted in turn to what the other leaves (alternating
    projections: Zhou & Tao 2011, GoDec), the low-rank term by an SVD first and then by one step of a subspace iteration
    a round; the error never grows from one round to the next.

    Attributes:
        rounds: The largest number of rounds with a low-rank term.
        tolerance: The share of the relative error by which a round has to lower it for another to follow.

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
        self, weights: Tensor, metric: Metric | None, format: BlockDiagonal | BlockSparse, progress: Progress | None
    ) -> tuple[Factors, Tensor]:
        if isinstance(format, BlockDiagonal):
            rows = columns = list(range(format.blocks))
            counts, rank = (format.blocks, format.blocks), 0
        else:
            rows, columns = map(list, zip(*format.positions, strict=True))
            counts, rank = format.blocks, format.rank
        (I, J), (P, Q), B = counts, format.block_shape, len(weights)
        supports = [[j for r, j in zip(rows, columns, strict=True) if r == i] for i in range(I)]
        moment = None if metric is None else metric.inputs
        root, inverse_root = (None, None) if moment is None else roots(moment)

        def grid(matrix: Tensor) -> Tensor:
            return matrix.view(B, I, P, J, Q).transpose(2, 3)  # (B, I, J, P, Q)

        def best_blocks(matrix: Tensor) -> Tensor:
            """The best approximation on the pattern, ``(B, n, P, Q)``."""
            if moment is None:
                return grid(matrix)[:, rows, columns]
            return torch.cat([_regressed(grid(matrix)[:, i], moment, s) for i, s in enumerate(supports) if s], 1)

        def norm(matrix: Tensor) -> Tensor:
            return torch.linalg.matrix_norm(matrix if root is None else times_blocks(matrix, root))

        blocks = best_blocks(weights)
        if not rank:
            return {"blocks": blocks.reshape(B, -1, Q)}, no_history(weights)

        total = norm(weights)
        total = total.where(total > 0, 1)
        running = torch.ones(B, dtype=torch.bool, device=weights.device)
        blocks = 0.9 * blocks  # all of W there is a saddle, which a low-rank term fitted to the rest cannot leave
        left = right = weights.new_empty(0)  # right in the coordinates in which the metric is the identity
        history: list[Tensor] = []
        for step in range(self.rounds):
            rest = weights.clone()
            grid(rest)[:, rows, columns] -= blocks
            rest = rest if root is None else times_blocks(rest, root)
            if step == 0:
                U, S, Vh = torch.linalg.svd(rest, full_matrices=False)
                left, right = split_svd(U, S, Vh, rank)
            else:  # least squares for the column space, then for the rows: one step of a subspace iteration
                basis = torch.linalg.qr(rest @ right.mT).Q
                left = torch.where(running[:, None, None], basis, left)
                right = torch.where(running[:, None, None], basis.mT @ rest, right)
            rest = weights - left @ (right if inverse_root is None else times_blocks(right, inverse_root))
            blocks = best_blocks(rest)
            grid(rest)[:, rows, columns] -= blocks
            error = norm(rest) / total
            history.append(error.where(running, torch.nan))
            if progress is not None:
                progress(step + 1, self.rounds, tuple(error.tolist()))
            if step:
                running = running & (history[-2] - history[-1] > self.tolerance * history[-2])
                if not running.any():
                    break
        U, S, Vh = torch.linalg.svd(right, full_matrices=False)
        left, right = split_svd(left @ U, S, Vh, rank)
        if inverse_root is not None:
            left, right = balanced(left, times_blocks(right, inverse_root))
        return {"blocks": blocks.reshape(B, -1, Q), "left": left, "right": right}, torch.stack(history)


def _regressed(row: Tensor, metric: Tensor, support: list[int]) -> Tensor:
    """The blocks at ``support`` that stand in best for a whole block row: the regression of its output on their inputs.

    Args:
        row: ``(B, J, P, Q)``.
        metric: ``(B, N, N)``.
        support: The columns of the blocks in the grid.

    Returns:
        ``(B, len(support), P, Q)``.
    """
    B, J, P, Q = row.shape
    inputs = [j * Q + q for j in support for q in range(Q)]
    target = row.transpose(1, 2).reshape(B, P, J * Q).double() @ metric[:, :, inputs]
    gram = metric[:, inputs][:, :, inputs]
    solved = torch.cholesky_solve(target.mT, factorize(gram, gram.new_zeros(B))).mT
    return solved.to(row.dtype).view(B, P, len(support), Q).transpose(1, 2)
