"""Exact conversions between formats: one matrix, other factors."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat.formats.base import Factors, Format
from structmat.formats.blast import Blast
from structmat.formats.block_diagonal import BlockDiagonal
from structmat.formats.low_rank import LowRank
from structmat.formats.monarch import Monarch


def to_blast(format: Format, factors: Factors) -> tuple[Blast, dict[str, Tensor]]:
    """The same matrix as BLAST (BLAST paper, section 2, and appendix A.1).

    A low-rank matrix is BLAST with one block and couplings 1. A block-diagonal one has couplings 1 on the diagonal and
    0 elsewhere, at ``R = min(P, Q)``. A Monarch matrix of rank ``t`` needs ``R = t max(I, J)``: the components fall
    into ``max(I, J)`` groups, and group ``(i + j) mod max(I, J)``, a Latin square, serves block ``(i, j)`` alone.

    Args:
        format: A low-rank, block-diagonal, BLAST, or (without the output permutation) Monarch format.
        factors: The factors of the format.

    Returns:
        The BLAST format and its factors.

    Raises:
        ValueError: If the format is not contained in BLAST at a rank known beforehand.
    """
    format.check_factors(factors)
    if isinstance(format, Blast):
        return format, dict(factors)
    if isinstance(format, LowRank):
        ones = torch.ones_like(factors["left"][:1])
        target = Blast(format.M, format.N, (1, 1), format.rank)
        return target, {"left": factors["left"], "diag": ones, "right": factors["right"]}
    if isinstance(format, BlockDiagonal):
        return _block_diagonal_to_blast(format, factors)
    if isinstance(format, Monarch) and not format.permute_output:
        return _monarch_to_blast(format, factors)
    raise ValueError(
        "expected a LowRank, BlockDiagonal, Blast or unpermuted Monarch format (with the output permutation contiguous "
        f"blocks of a Monarch matrix do not have rank t), got {format}"
    )


def _block_diagonal_to_blast(format: BlockDiagonal, factors: Factors) -> tuple[Blast, dict[str, Tensor]]:
    I, (P, Q) = format.blocks, format.block_shape
    R = min(P, Q)
    blocks = factors["blocks"].view(I, P, Q)
    identity = torch.eye(R, dtype=blocks.dtype, device=blocks.device).expand(I, R, R)
    left, right = (identity, blocks) if P <= Q else (blocks, identity)
    diag = torch.eye(I, dtype=blocks.dtype, device=blocks.device).view(I * I, 1).repeat(1, R)
    target = Blast(format.M, format.N, (I, I), R)
    return target, {"left": left.reshape(I * P, R), "diag": diag, "right": right.reshape(I * R, Q)}


def _monarch_to_blast(format: Monarch, factors: Factors) -> tuple[Blast, dict[str, Tensor]]:
    (I, J), (P, Q), t = format.blocks, format.block_shape, format.rank
    groups = max(I, J)
    monarch_left, monarch_right = format.views(factors)
    left = monarch_left.new_zeros(I, P, groups, t)
    diag = monarch_left.new_zeros(I, J, groups, t)
    right = monarch_left.new_zeros(J, groups, t, Q)
    for i in range(I):
        for j in range(J):
            group = (i + j) % groups
            left[i, :, group] = monarch_left[i, :, j]
            diag[i, j, group] = 1
            right[j, group] = monarch_right[j, i]
    R = groups * t
    target = Blast(format.M, format.N, (I, J), R)
    return target, {"left": left.view(I * P, R), "diag": diag.view(I * J, R), "right": right.view(J * R, Q)}
