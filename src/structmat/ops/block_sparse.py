"""Product with a block-sparse matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from structmat.ops.common import (
    TRITON,
    cast,
    plain,
    plain_backward,
    plain_gradients,
    save_inputs,
    shaped_like,
    side_by_side,
    triton_kernels,
)


def block_sparse_matmul(
    x: Tensor, blocks: Tensor, columns: Sequence[Sequence[int]], block_columns: int, algorithm: str = ""
) -> Tensor:
    """Compute ``x @ W.T`` for ``W`` made of dense blocks on a fixed pattern, in ``P Q`` multiplications per block.

    Block rows that hold equally many blocks go through one batched product: their input segments are gathered side by
    side, so that each block row is one dense product of width ``count Q``. The operator is
    ``torch.ops.structmat.block_sparse_matmul``.

    Args:
        x: Input ``(..., J Q)``.
        blocks: ``(n, P, Q)``, the blocks that are on, row by row, each row's from left to right.
        columns: The columns of the blocks of each of the ``I`` block rows, ascending.
        block_columns: The number of block columns, ``J``.
        algorithm: One of ``ALGORITHMS``; empty for the one that suits the device.

    Returns:
        Output ``(..., I P)``.
    """
    x, blocks = cast(x, blocks)
    counts, flat = [len(row) for row in columns], [column for row in columns for column in row]
    arguments = (x.reshape(-1, x.shape[-1]), blocks, counts, flat, block_columns)
    y = _whole(*arguments) if plain() else torch.ops.structmat.block_sparse_matmul(*arguments, algorithm)
    return y.view(*x.shape[:-1], len(counts) * blocks.shape[1])


def _whole(x: Tensor, blocks: Tensor, counts: Sequence[int], columns: Sequence[int], block_columns: int) -> Tensor:
    P, Q = blocks.shape[1:]
    segments = x.unflatten(1, (block_columns, Q)).transpose(0, 1)  # (J, T, Q)
    pieces: list[Tensor | None] = [None] * len(counts)
    for rows, entries in _equal_rows(counts):
        products = torch.bmm(_gathered(segments, columns, entries), _rows(blocks, entries).mT)  # (rows, T, P)
        for i, product in zip(rows, products.unbind(), strict=True):
            pieces[i] = product
    empty = x.new_zeros(x.shape[0], P)
    return torch.cat([empty if piece is None else piece for piece in pieces], 1)


def _equal_rows(counts: Sequence[int]) -> Iterator[tuple[list[int], list[range]]]:
    """Block rows that hold equally many blocks, but for empty ones, and where the blocks of each of them are."""
    starts = list(accumulate(counts, initial=0))
    for count in sorted(set(counts) - {0}):
        rows = [i for i, other in enumerate(counts) if other == count]
        yield rows, [range(starts[i], starts[i] + count) for i in rows]


def _gathered(segments: Tensor, columns: Sequence[int], entries: Sequence[range]) -> Tensor:
    """The input segments that each block row reads, side by side: ``(rows, T, count Q)``."""
    return torch.stack([torch.cat([segments[columns[entry]] for entry in row], -1) for row in entries])


def _rows(blocks: Tensor, entries: Sequence[range]) -> Tensor:
    """The blocks of each block row, side by side: ``(rows, P, count Q)``."""
    kept = torch.stack([blocks[row.start : row.stop] for row in entries])  # (rows, count, P, Q)
    return kept.transpose(1, 2).flatten(2)


def _triton(x: Tensor, blocks: Tensor, counts: Sequence[int], columns: Sequence[int], block_columns: int) -> Tensor:
    """Kernels of our own, for a GPU."""
    kernels = triton_kernels("block_sparse")

    pattern = _pattern(tuple(counts), tuple(columns), x.device)
    x, blocks = side_by_side(x, blocks)
    return kernels.block_sparse_forward(x, blocks, *pattern, block_columns)


@lru_cache(maxsize=1024)
def _pattern(counts: tuple[int, ...], columns: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Where each block row begins and the columns, on the device; made once, since a CUDA graph cannot copy them."""
    starts = torch.tensor(list(accumulate(counts, initial=0)), dtype=torch.int32, device=device)
    return starts, torch.tensor(columns, dtype=torch.int32, device=device)


ALGORITHMS: dict[str, Callable[[Tensor, Tensor, Sequence[int], Sequence[int], int], Tensor]] = {
    "whole": _whole,
    TRITON: _triton,
}
"""Ways to compute the product: right for every shape, dtype and device, but for triton's, which are for GPUs."""


@torch.library.custom_op("structmat::block_sparse_matmul", mutates_args=())
def _matmul(
    x: Tensor, blocks: Tensor, counts: Sequence[int], columns: Sequence[int], block_columns: int, algorithm: str
) -> Tensor:
    name = "whole" if x.shape[0] == 0 else algorithm or "whole"
    return ALGORITHMS[name](x, blocks, counts, columns, block_columns)


_matmul.register_fake(lambda x, blocks, counts, *_: x.new_empty(x.shape[0], len(counts) * blocks.shape[1]))


@torch.library.custom_op("structmat::block_sparse_matmul_backward", mutates_args=())
def _matmul_backward(
    upstream: Tensor,
    x: Tensor,
    blocks: Tensor,
    counts: Sequence[int],
    columns: Sequence[int],
    block_columns: int,
    algorithm: str,
) -> tuple[Tensor, Tensor]:
    if algorithm == TRITON and x.shape[0]:
        kernels = triton_kernels("block_sparse")

        pattern = _pattern(tuple(counts), tuple(columns), x.device)
        upstream, x, blocks = side_by_side(upstream, x, blocks)
        return kernels.block_sparse_backward(upstream, x, blocks, *pattern, block_columns)
    return _gradients(upstream, x, blocks, counts, columns, block_columns)


def _gradients(
    upstream: Tensor, x: Tensor, blocks: Tensor, counts: Sequence[int], columns: Sequence[int], block_columns: int
) -> tuple[Tensor, Tensor]:
    P, Q = blocks.shape[1:]
    segments = x.unflatten(1, (block_columns, Q)).transpose(0, 1)  # (J, T, Q)
    upstream_segments = upstream.unflatten(1, (len(counts), P)).transpose(0, 1)  # (I, T, P)
    x_gradient = segments.new_zeros(segments.shape)
    blocks_gradient = torch.zeros_like(blocks, memory_format=torch.contiguous_format)
    for rows, entries in _equal_rows(counts):
        count = len(entries[0])
        here = torch.stack([upstream_segments[i] for i in rows])  # (rows, T, P)
        products = torch.bmm(here.mT, _gathered(segments, columns, entries)).unflatten(2, (count, Q)).transpose(1, 2)
        inputs = torch.bmm(here, _rows(blocks, entries)).unflatten(2, (count, Q))  # (rows, T, count, Q)
        for row, product, back in zip(entries, products, inputs, strict=True):
            blocks_gradient[row.start : row.stop] = product
            for place, entry in enumerate(row):
                x_gradient[columns[entry]] += back[:, place]
    return x_gradient.transpose(0, 1).flatten(1).contiguous(), blocks_gradient


_matmul_backward.register_fake(lambda upstream, x, blocks, *_: shaped_like(x, blocks))


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    if plain_backward():
        counts, columns, block_columns, _ = ctx.options
        product = functools.partial(_whole, counts=counts, columns=columns, block_columns=block_columns)
        return *plain_gradients(product, ctx.needs_input_grad, upstream, *ctx.saved_tensors), None, None, None, None
    gradients = torch.ops.structmat.block_sparse_matmul_backward(upstream, *ctx.saved_tensors, *ctx.options)
    return *gradients, None, None, None, None


_matmul.register_autograd(_backward, setup_context=save_inputs)


@register_flop_formula(torch.ops.structmat.block_sparse_matmul)
def _flops(x_shape: Any, blocks_shape: Any, *args: Any, **kwargs: Any) -> int:
    n, P, Q = blocks_shape
    return 2 * x_shape[0] * n * P * Q


@register_flop_formula(torch.ops.structmat.block_sparse_matmul_backward)
def _backward_flops(upstream_shape: Any, x_shape: Any, blocks_shape: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * _flops(x_shape, blocks_shape)
