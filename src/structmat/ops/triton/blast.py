"""BLAST: ``y_i = left_i (sum_j diag_ij ∘ (right_j x_j))``, never with an intermediate per pair of blocks.

Three variants, of which ``tuning`` picks the fastest for a shape and a number of tokens:

- ``vector``, for few tokens: two launches. The first holds all of ``right`` that belongs to some ranks, over all block
  columns, in registers, and so can apply the couplings before it writes ``h (I, T, R)``; the second is the product with
  ``left``. Every factor is read once, both launches split their work over ``R`` or rows alone.
- ``fused``: the second of two launches builds ``h`` tile by tile in registers, on its way into the product with
  ``left``. It reads ``z (J, T, R)`` once for each block row and tile of ``P``, which pays where ``I`` is small.
- ``coupled``: three batched products. The couplings are the one over ``R`` of ``(I, J)`` with ``(J, T)``, on the tensor
  cores; ``z`` is read once and ``h`` written once, ``(I + J) R T`` entries, however many blocks there are. At 16 x 16
  blocks and many tokens ``fused`` would read 16 times as much.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (launches of kernels, which triton does not type)

import torch
import triton
import triton.language as tl
from torch import Tensor

from structmat.ops.triton import tuning
from structmat.ops.triton.products import (
    FEW_TOKENS,
    LARGEST_VECTOR,
    arithmetic,
    batched_product,
    precision,
    segments,
    tile_choices,
    tokens_last,
    vector_choices,
)
from structmat.ops.triton.tuning import Choice

MOST_FUSED_COLUMNS = 16
"""With more block columns than this, ``fused`` is not tried: its kernel unrolls the sum over them."""


@triton.jit
def _coupled_vector_kernel(
    x,
    diag,
    right,
    h,
    tokens,
    I,
    J,
    Q,
    R,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """``h[:, :, some ranks]``: the products with ``right`` over all block columns, and their sums by the couplings."""
    rank = (tl.program_id(0) * RANKS + tl.arange(0, RANKS)).to(tl.int64)
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    q = tl.arange(0, WIDTH)
    rank_inside = rank < R
    q_inside = (j < J)[:, None] & (q < Q)[None, :]
    right_at = right + (j[:, None, None] * R + rank[None, :, None]) * Q + q[None, None, :]
    right_tile = tl.load(right_at, mask=q_inside[:, None, :] & rank_inside[None, :, None], other=0.0).to(tl.float32)
    diag_inside = (i < I)[:, None, None] & (j < J)[None, :, None] & rank_inside[None, None, :]
    diag_at = diag + (i[:, None, None] * J + j[None, :, None]) * R + rank[None, None, :]
    coupling = tl.load(diag_at, mask=diag_inside, other=0.0).to(tl.float32)
    x_at = x + j[:, None] * Q + q[None, :]
    h_at = h + i[:, None].to(tl.int64) * tokens * R + rank[None, :]
    for _ in range(tokens):
        x_tile = tl.load(x_at, mask=q_inside, other=0.0).to(tl.float32)
        z = tl.sum(right_tile * x_tile[:, None, :], 2)  # (COLUMNS, RANKS)
        total = tl.sum(coupling * z[None, :, :], 1)  # (ROWS, RANKS)
        tl.store(h_at, total, mask=(i < I)[:, None] & rank_inside[None, :])
        x_at += J * Q
        h_at += R


@triton.jit
def _fused_kernel(
    z,
    diag,
    left,
    y,
    tokens,
    I,
    P,
    R,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    J: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """A tile ``(TOKENS, ROWS)`` of one block row of the output, ``RANKS`` at a time."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(P, ROWS)
    i = program // row_tiles % I  # all that reads the same tokens of z runs together
    token = (program // (row_tiles * I) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row = program % row_tiles * ROWS + tl.arange(0, ROWS)
    along = tl.arange(0, RANKS)
    token_inside = (token < tokens)[:, None]
    row_inside = (row < P)[None, :]
    left_at = left + (i * P + row).to(tl.int64)[None, :] * R + along[:, None]
    diag_at = diag + i.to(tl.int64) * J * R + along
    total = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
    for start in range(0, R, RANKS):
        inside = along < R - start
        h = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
        for j in tl.static_range(J):  # pyright: ignore[reportGeneralTypeIssues]
            coupling = tl.load(diag_at + j * R, mask=inside, other=0.0).to(tl.float32)
            z_at = z + ((j * tokens + token) * R)[:, None] + (start + along)[None, :]
            z_tile = tl.load(z_at, mask=token_inside & inside[None, :], other=0.0)
            h += coupling[None, :] * z_tile.to(tl.float32)
        left_tile = tl.load(left_at, mask=row_inside & inside[:, None], other=0.0)
        total = tl.dot(h.to(left_tile.dtype).to(COMPUTE), left_tile.to(COMPUTE), total, input_precision=PRECISION)
        left_at += RANKS
        diag_at += RANKS
    y_at = y + token[:, None] * (I * P) + (i * P + row)[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=token_inside & row_inside)


def blast_forward(x: Tensor, left: Tensor, diag: Tensor, right: Tensor, variant: str | None = None) -> Tensor:
    """Compute ``x @ W.T`` for blocks ``W_ij = left_i Diag(diag_ij) right_j``.

    Args:
        x: ``(T, J Q)``.
        left: ``(I, P, R)``.
        diag: ``(I, J, R)``.
        right: ``(J, R, Q)``.
        variant: One of ``blast_variants``; None for the one that ``tuning`` finds fastest.

    Returns:
        ``(T, I P)``.
    """
    (I, P, R), (J, _, Q), T = left.shape, right.shape, x.shape[0]
    y = torch.empty(T, I * P, dtype=x.dtype, device=x.device)

    def run(choice: Choice) -> None:
        _WAYS[str(choice["variant"])](x, left, diag, right, y)

    names = blast_variants(T, I, J, Q) if variant is None else [variant]
    key = f"blast {I}x{J}x{P}x{Q}x{R} t{tuning.bucket(T)} {x.dtype} {precision(x.dtype)}"
    run(tuning.choose(key, x.device, [{"variant": name} for name in names], run))
    return y


def blast_variants(T: int, I: int, J: int, Q: int) -> list[str]:
    """The variants that can compute a product, the one that is taken unmeasured first.

    Args:
        T: The number of tokens.
        I: The number of block rows.
        J: The number of block columns.
        Q: The width of a block.

    Returns:
        Some of ``vector``, ``fused`` and ``coupled``, always with the last.
    """
    names = ["vector"] if T <= FEW_TOKENS and _vector_tiles(I, J, Q) else []
    fused = ["fused"] if J <= MOST_FUSED_COLUMNS else []
    return names + ([*fused, "coupled"] if I <= 2 else ["coupled", *fused])


def blast_backward(
    upstream: Tensor, x: Tensor, left: Tensor, diag: Tensor, right: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``blast_forward``, in eight batched products; ``z`` and ``h`` are computed anew.

    Args:
        upstream: ``(T, I P)``.
        x: ``(T, J Q)``.
        left: ``(I, P, R)``.
        diag: ``(I, J, R)``.
        right: ``(J, R, Q)``.

    Returns:
        The gradients of ``x``, ``left``, ``diag`` and ``right``.
    """
    (I, _, R), (J, _, _), T = left.shape, right.shape, x.shape[0]
    x_in, y_in = segments(x, J), segments(upstream, I)
    x_gradient, left_gradient = torch.empty_like(x), torch.empty_like(left)
    diag_gradient, right_gradient = torch.empty_like(diag), torch.empty_like(right)
    z, h, z_gradient, h_gradient = (tokens_last(count, R, T, x) for count in (J, I, J, I))
    batched_product(x_in, right, z.mT, T)
    _couple(z, diag, h)
    batched_product(y_in.mT, h, left_gradient, T)
    batched_product(y_in, left.mT, h_gradient.mT, T)
    batched_product(h_gradient.transpose(0, 1), z.transpose(0, 1), diag_gradient.permute(2, 0, 1), T)
    _couple(h_gradient, diag.transpose(0, 1), z_gradient)
    batched_product(z_gradient.mT, right.mT, segments(x_gradient, J), T)
    batched_product(z_gradient, x_in.mT, right_gradient, T)
    return x_gradient, left_gradient, diag_gradient, right_gradient


def _couple(z: Tensor, diag: Tensor, h: Tensor) -> None:
    """``h_i = sum_j diag_ij ∘ z_j``: ``z (J, R, T)`` and ``diag (I, J, R)`` to ``h (I, R, T)``."""
    batched_product(z.permute(1, 2, 0), diag.permute(2, 0, 1), h.permute(1, 2, 0), z.shape[2])


def _coupled(x: Tensor, left: Tensor, diag: Tensor, right: Tensor, y: Tensor) -> None:
    (I, _, R), J, T = left.shape, right.shape[0], x.shape[0]
    z, h = tokens_last(J, R, T, x), tokens_last(I, R, T, x)
    batched_product(segments(x, J), right, z.mT, T)
    _couple(z, diag, h)
    batched_product(h.mT, left, segments(y, I), T)


def _fused(x: Tensor, left: Tensor, diag: Tensor, right: Tensor, y: Tensor) -> None:
    (I, P, R), J, T = left.shape, right.shape[0], x.shape[0]
    z = torch.empty(J, T, R, dtype=x.dtype, device=x.device)
    batched_product(segments(x, J), right, z, T)

    def launch(choice: Choice) -> None:
        tokens, rows = int(choice["tokens"]), int(choice["rows"])
        options = arithmetic(x.dtype) | {"J": J, "TOKENS": tokens, "ROWS": rows, "RANKS": choice["ranks"]}
        options |= {"num_warps": choice["warps"], "num_stages": choice["stages"]}
        programs = triton.cdiv(T, tokens) * I * triton.cdiv(P, rows)
        _fused_kernel[(programs,)](z, diag, left, y, T, I, P, R, **options)

    key = f"blast-fused {I}x{J}x{P}x{R} t{tuning.bucket(T)} {x.dtype} {precision(x.dtype)}"
    launch(tuning.choose(key, x.device, _fused_choices(T, P, R, x.dtype), launch))


def _fused_choices(T: int, P: int, R: int, dtype: torch.dtype) -> list[Choice]:
    shapes = [(128, 256, 32, 8, 2), (128, 128, 32, 8, 2), (64, 256, 32, 8, 2), (64, 128, 64, 4, 2), (64, 64, 64, 4, 2)]
    if T <= FEW_TOKENS:
        shapes = [(16, 64, 64, 4, 2), (16, 32, 128, 4, 2), (16, 16, 128, 4, 2)]
    return tile_choices(shapes, ("tokens", "rows", "ranks"), (T, P, R), dtype)


def _vector(x: Tensor, left: Tensor, diag: Tensor, right: Tensor, y: Tensor) -> None:
    (I, P, R), (J, _, Q), T = left.shape, right.shape, x.shape[0]
    h = torch.empty(I, T, R, dtype=torch.float32, device=x.device)

    def launch(choice: Choice) -> None:
        ranks = int(choice["ranks"])
        options = {"RANKS": ranks, "num_warps": choice["warps"]}
        options |= {name: triton.next_power_of_2(n) for name, n in (("ROWS", I), ("COLUMNS", J), ("WIDTH", Q))}
        _coupled_vector_kernel[(triton.cdiv(R, ranks),)](x, diag, right, h, T, I, J, Q, R, **options)

    shapes = f"{I}x{J}x{P}x{Q}x{R} t{tuning.bucket(T)} {x.dtype}"
    launch(tuning.choose(f"blast-vector {shapes}", x.device, _vector_tiles(I, J, Q), launch))
    choices, out = vector_choices(P, R), segments(y, I)
    if not choices:  # a rank of more than LARGEST_VECTOR
        batched_product(h.to(x.dtype), left, out, T)
        return

    def multiply(choice: Choice) -> None:
        batched_product(h, left, out, T, choice)

    multiply(tuning.choose(f"blast-vector-left {shapes}", x.device, choices, multiply))


def _vector_tiles(I: int, J: int, Q: int) -> list[Choice]:
    """The launches of ``_coupled_vector_kernel`` that fit the registers, if any."""
    columns = triton.next_power_of_2(J)
    entries, couplings = columns * triton.next_power_of_2(Q), columns * triton.next_power_of_2(I)
    sizes = [(2, 8)] if tuning.interpreted() else [(4, 8), (2, 4), (8, 8), (2, 8), (4, 4), (1, 8)]
    return [
        {"ranks": ranks, "warps": warps}
        for ranks, warps in sizes
        if ranks * entries <= LARGEST_VECTOR * warps // 8 and ranks * couplings <= LARGEST_VECTOR // 2
    ]


_WAYS = {"vector": _vector, "fused": _fused, "coupled": _coupled}
