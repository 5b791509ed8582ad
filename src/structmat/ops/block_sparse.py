"""Product with a block-sparse matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def block_sparse_matmul(x: Tensor, blocks: Tensor, columns: Sequence[Sequence[int]], block_columns: int) -> Tensor:
    """Compute ``x @ W.T`` for ``W`` made of dense blocks on a fixed pattern, in ``P Q`` multiplications per block.

    Block rows that hold equally many blocks go through one batched product: their input segments are gathered side by
    side, so that each block row is one dense product of width ``count Q``.

    Args:
        x: Input ``(..., J Q)``.
        blocks: ``(n, P, Q)``, the blocks that are on, row by row, each row's from left to right.
        columns: For each of the ``I`` block rows the columns of its blocks, ascending.
        block_columns: ``J``.

    Returns:
        Output ``(..., I P)``.
    """
    P, Q = blocks.shape[1:]
    I = len(columns)
    segments = x.reshape(-1, block_columns, Q).transpose(0, 1)  # (J, T, Q)
    rows_by_count: dict[int, list[int]] = {}
    for i, row in enumerate(columns):
        rows_by_count.setdefault(len(row), []).append(i)
    if len(rows_by_count) == 1:
        y = _equal_rows(segments, blocks, columns)
        return y.transpose(0, 1).reshape(*x.shape[:-1], I * P)

    starts = [0]
    for row in columns:
        starts.append(starts[-1] + len(row))
    pieces: list[Tensor] = [segments[0]] * I
    for count, rows in rows_by_count.items():
        if count:
            kept = torch.cat([blocks[starts[i] : starts[i] + count] for i in rows])
            products = _equal_rows(segments, kept, [columns[i] for i in rows])
        else:
            products = [segments.new_zeros(segments.shape[1], P)] * len(rows)
        for i, product in zip(rows, products, strict=True):
            pieces[i] = product
    dtype = next(pieces[i] for i, row in enumerate(columns) if row).dtype  # under autocast not that of x
    return torch.cat([piece.to(dtype) for piece in pieces], -1).reshape(*x.shape[:-1], I * P)


def _equal_rows(segments: Tensor, blocks: Tensor, columns: Sequence[Sequence[int]]) -> Tensor:
    """Block rows of ``count`` blocks: ``segments (J, T, Q)``, ``blocks (rows count, P, Q)`` to ``(rows, T, P)``."""
    rows, count, (P, Q) = len(columns), len(columns[0]), blocks.shape[1:]
    gathered = torch.stack([torch.cat([segments[j] for j in row], -1) for row in columns])  # (rows, T, count Q)
    weight = blocks.view(rows, count, P, Q).transpose(1, 2).reshape(rows, P, count * Q)
    return torch.bmm(gathered, weight.mT)
