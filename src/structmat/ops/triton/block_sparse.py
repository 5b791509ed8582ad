"""Block-sparse matrices: each program goes over the blocks of one block row, listed as in compressed sparse rows."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (launches of kernels, which triton does not type)

import torch
import triton
import triton.language as tl
from torch import Tensor

from structmat.ops.triton import tuning
from structmat.ops.triton.products import FEW_TOKENS, FEWEST_TOKENS, arithmetic, precision, tile_choices
from structmat.ops.triton.tuning import Choice


@triton.jit
def _rows_kernel(
    x,
    blocks,
    starts,
    columns,
    order,
    y,
    tokens,
    P,
    Q,
    x_row,
    y_row,
    block_p,
    block_q,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    ORDERED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile ``(TOKENS, ROWS)`` of one block row of the output."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(P, ROWS)
    token_tiles = tl.cdiv(tokens, TOKENS)
    i = program // (row_tiles * token_tiles)
    token = (program % token_tiles * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    p = program // token_tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    along = tl.arange(0, DEPTH)
    token_inside = (token < tokens)[:, None]
    p_inside = (p < P)[None, :]
    first = tl.load(starts + i)
    steps = tl.cdiv(Q, DEPTH)  # of a block
    total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for step in range((tl.load(starts + i + 1) - first) * steps):
        entry = first + step // steps
        q = step % steps * DEPTH + along
        column = tl.load(columns + entry).to(tl.int64)
        block = (tl.load(order + entry) if ORDERED else entry).to(tl.int64)
        x_at = x + token[:, None] * x_row + column * Q + q[None, :]
        block_at = blocks + block * P * Q + p[None, :] * block_p + q[:, None] * block_q
        x_tile = tl.load(x_at, mask=token_inside & (q < Q)[None, :], other=0.0)
        block_tile = tl.load(block_at, mask=p_inside & (q < Q)[:, None], other=0.0)
        total = tl.dot(x_tile.to(COMPUTE), block_tile.to(COMPUTE), total, input_precision=PRECISION)
    y_at = y + token[:, None] * y_row + i.to(tl.int64) * P + p[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=token_inside & p_inside)


@triton.jit
def _rows_vector_kernel(
    x,
    blocks,
    starts,
    columns,
    order,
    y,
    tokens,
    P,
    Q,
    x_row,
    y_row,
    block_p,
    block_q,
    ORDERED: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``ROWS`` entries of one block row of the output for one token."""
    program = tl.program_id(0)
    token = (program % tokens).to(tl.int64)
    row_tiles = tl.cdiv(P, ROWS)
    i = program // (tokens * row_tiles)
    p = program // tokens % row_tiles * ROWS + tl.arange(0, ROWS)
    along = tl.arange(0, DEPTH)
    first = tl.load(starts + i)
    steps = tl.cdiv(Q, DEPTH)
    total = tl.zeros((ROWS, DEPTH), dtype=tl.float32)
    for step in range((tl.load(starts + i + 1) - first) * steps):
        entry = first + step // steps
        q = step % steps * DEPTH + along
        column = tl.load(columns + entry).to(tl.int64)
        block = (tl.load(order + entry) if ORDERED else entry).to(tl.int64)
        x_tile = tl.load(x + token * x_row + column * Q + q, mask=q < Q, other=0.0).to(tl.float32)
        block_at = blocks + block * P * Q + p[:, None] * block_p + q[None, :] * block_q
        block_tile = tl.load(block_at, mask=(p < P)[:, None] & (q < Q)[None, :], other=0.0).to(tl.float32)
        total += block_tile * x_tile[None, :]
    y_at = y + token * y_row + i.to(tl.int64) * P + p
    tl.store(y_at, tl.sum(total, 1).to(y.dtype.element_ty), mask=p < P)


@triton.jit
def _outer_kernel(
    upstream,
    x,
    rows,
    columns,
    gradient,
    tokens,
    P,
    Q,
    y_row,
    x_row,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A tile ``(ROWS, COLUMNS)`` of the gradient of one block."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(P, ROWS)
    column_tiles = tl.cdiv(Q, COLUMNS)
    block = (program // (row_tiles * column_tiles)).to(tl.int64)
    p = program // column_tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    q = program % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.arange(0, TOKENS)
    p_inside = (p < P)[:, None]
    q_inside = (q < Q)[None, :]
    y_at = upstream + tl.load(rows + block).to(tl.int64) * P + p[:, None] + token.to(tl.int64)[None, :] * y_row
    x_at = x + tl.load(columns + block).to(tl.int64) * Q + q[None, :] + token.to(tl.int64)[:, None] * x_row
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, tokens, TOKENS):
        inside = token < tokens - start
        y_tile = tl.load(y_at, mask=p_inside & inside[None, :], other=0.0)
        x_tile = tl.load(x_at, mask=q_inside & inside[:, None], other=0.0)
        total = tl.dot(y_tile.to(COMPUTE), x_tile.to(COMPUTE), total, input_precision=PRECISION)
        y_at += TOKENS * y_row
        x_at += TOKENS * x_row
    gradient_at = gradient + block * P * Q + p[:, None] * Q + q[None, :]
    tl.store(gradient_at, total.to(gradient.dtype.element_ty), mask=p_inside & q_inside)


def block_sparse_forward(x: Tensor, blocks: Tensor, rows_ptr: Tensor, columns: Tensor, J: int) -> Tensor:
    """Compute ``x @ W.T`` for ``W`` made of dense blocks on a fixed pattern.

    Args:
        x: ``(T, J Q)``.
        blocks: ``(n, P, Q)``, row by row; none at all is fine, and so are rows without any.
        rows_ptr: The places where the blocks of each block row begin, and ``n``, ``(I + 1,)``, int32.
        columns: The block column of each block, ``(n,)``, int32.
        J: The number of block columns.

    Returns:
        ``(T, I P)``.
    """
    return _multiply(x, blocks, rows_ptr, columns, None, J)


def block_sparse_backward(
    upstream: Tensor, x: Tensor, blocks: Tensor, rows_ptr: Tensor, columns: Tensor, J: int
) -> tuple[Tensor, Tensor]:
    """The gradients of ``block_sparse_forward``; the pattern is transposed by sorting, on the device, each time.

    Args:
        upstream: ``(T, I P)``.
        x: ``(T, J Q)``.
        blocks: ``(n, P, Q)``.
        rows_ptr: ``(I + 1,)``, int32.
        columns: ``(n,)``, int32.
        J: The number of block columns.

    Returns:
        The gradients of ``x`` and ``blocks``.
    """
    n, I = len(blocks), len(rows_ptr) - 1
    rows = torch.searchsorted(
        rows_ptr[1:], torch.arange(n, dtype=rows_ptr.dtype, device=x.device), right=True, out_int32=True
    )
    ordered, order = columns.sort(stable=True)
    columns_ptr = torch.searchsorted(ordered, torch.arange(J + 1, dtype=columns.dtype, device=x.device), out_int32=True)
    x_gradient = _multiply(upstream, blocks.mT, columns_ptr, rows[order], order, I)
    return x_gradient, _outer(upstream, x, rows, columns, torch.empty_like(blocks))


def _outer(upstream: Tensor, x: Tensor, rows: Tensor, columns: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the blocks, each of which is in a block row and a block column."""
    (n, P, Q), T = gradient.shape, x.shape[0]
    if n == 0:
        return gradient

    def launch(choice: Choice) -> None:
        height, width = int(choice["rows"]), int(choice["columns"])
        options = arithmetic(x.dtype) | {"ROWS": height, "COLUMNS": width, "TOKENS": choice["tokens"]}
        options |= {"num_warps": choice["warps"], "num_stages": choice["stages"]}
        arguments = (upstream, x, rows, columns, gradient, T, P, Q, upstream.stride(0), x.stride(0))
        _outer_kernel[(n * triton.cdiv(P, height) * triton.cdiv(Q, width),)](*arguments, **options)

    shapes = [(128, 128, 64, 8, 3), (64, 64, 64, 4, 4), (64, 64, 128, 4, 3), (32, 32, 128, 4, 3)]
    choices = tile_choices(shapes, ("rows", "columns", "tokens"), (P, Q, T), x.dtype)
    key = f"block-sparse-outer {_key(x, n, P, Q, upstream.shape[1] // P, x.shape[1] // Q)}"
    launch(tuning.choose(key, x.device, choices, launch))
    return gradient


def _multiply(x: Tensor, blocks: Tensor, rows_ptr: Tensor, columns: Tensor, order: Tensor | None, count: int) -> Tensor:
    """``x @ W.T``, for blocks on any strides, of which the ``e``-th listed is ``order[e]``."""
    (n, P, Q), I, T = blocks.shape, len(rows_ptr) - 1, x.shape[0]
    y = torch.empty(T, I * P, dtype=x.dtype, device=x.device)
    arguments = (x, blocks, rows_ptr, columns, columns if order is None else order, y, T, P, Q)
    strides = (x.stride(0), y.stride(0), *blocks.stride()[1:])

    def launch(choice: Choice) -> None:
        rows, depth = int(choice["rows"]), int(choice["depth"])
        options = {"ORDERED": order is not None, "ROWS": rows, "DEPTH": depth, "num_warps": choice["warps"]}
        if choice["tokens"] == 1:
            _rows_vector_kernel[(I * triton.cdiv(P, rows) * T,)](*arguments, *strides, **options)
            return
        tokens = int(choice["tokens"])
        options |= arithmetic(x.dtype) | {"TOKENS": tokens, "num_stages": choice["stages"]}
        _rows_kernel[(I * triton.cdiv(P, rows) * triton.cdiv(T, tokens),)](*arguments, *strides, **options)

    side = "columns" if order is not None else "rows"
    key = f"block-sparse-{side} {_key(x, n, P, Q, I, count)}"
    launch(tuning.choose(key, x.device, _multiply_choices(x, P, Q), launch))
    return y


def _multiply_choices(x: Tensor, P: int, Q: int) -> list[Choice]:
    T = x.shape[0]
    few: list[Choice] = []
    if T <= FEWEST_TOKENS:
        for rows, depth, warps in [(16, 16, 1)] if tuning.interpreted() else [(8, 512, 4), (16, 256, 4), (4, 1024, 4)]:
            rows, depth = min(rows, triton.next_power_of_2(P)), min(depth, triton.next_power_of_2(Q))
            few.append({"tokens": 1, "rows": rows, "depth": depth, "warps": warps, "stages": 3})
    shapes = [(128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)]
    if T <= FEW_TOKENS:
        shapes = [(16, 32, 128, 4, 4), (16, 16, 256, 2, 4), (16, 64, 64, 4, 4)]
    return few + tile_choices(shapes, ("tokens", "rows", "depth"), (T, P, Q), x.dtype)


def _key(x: Tensor, n: int, P: int, Q: int, I: int, J: int) -> str:
    return f"{n}x{P}x{Q} in {I}x{J} t{tuning.bucket(x.shape[0])} {x.dtype} {precision(x.dtype)}"
