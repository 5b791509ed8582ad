"""GBLR in tiles: products of tiles with slices of an axis, and sums of rows between them.

A tile is ``H`` rows by ``B`` entries of one block of an axis; ``place`` says of which block, and each row belongs to a
component. Each block has one tile; tiles of one height form a group, for which there is a launch. ``project`` goes from
an axis to components: a product for each tile, then for each component the sum of its rows, gathered, so that the
result does not depend on the order in which programs run. ``spread`` goes back: a program goes over the rows of the
tile of its block and gathers the rows of ``z`` as it loads them.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (launches of kernels, which triton does not type)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from structmat.ops.tiling import Inputs, Outputs, by_group
from structmat.ops.triton import tuning
from structmat.ops.triton.products import FEW_TOKENS, FEWEST_TOKENS, arithmetic, precision, tile_choices, tokens_last
from structmat.ops.triton.tuning import Choice


@triton.jit
def _pieces_kernel(
    x, tiles, place, pieces, tokens, n, H, B, x_row, piece_row,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr, HEIGHT: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile ``(HEIGHT, TOKENS)`` of the product of one tile with its slices."""
    program = tl.program_id(0)
    token_tiles = tl.cdiv(tokens, TOKENS)
    height_tiles = tl.cdiv(H, HEIGHT)
    s = (program // (height_tiles * token_tiles)).to(tl.int64)
    h = program // token_tiles % height_tiles * HEIGHT + tl.arange(0, HEIGHT)
    token = (program % token_tiles * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    along = tl.arange(0, DEPTH)
    begin = tl.load(place + s) * B  # of the block, on the axis
    width = tl.minimum(n - begin, B)
    h_inside = (h < H)[:, None]
    token_inside = (token < tokens)[None, :]
    tile_at = tiles + s * H * B + h[:, None] * B + along[None, :]
    x_at = x + token[None, :] * x_row + (begin + along)[:, None]
    total = tl.zeros((HEIGHT, TOKENS), dtype=tl.float32)
    for start in range(0, B, DEPTH):
        inside = along < width - start
        tile = tl.load(tile_at, mask=h_inside & inside[None, :], other=0.0)
        x_tile = tl.load(x_at, mask=token_inside & inside[:, None], other=0.0)
        total = tl.dot(tile.to(COMPUTE), x_tile.to(COMPUTE), total, input_precision=PRECISION)
        tile_at += DEPTH
        x_at += DEPTH
    piece_at = pieces + (s * H + h)[:, None] * piece_row + token[None, :]
    tl.store(piece_at, total.to(pieces.dtype.element_ty), mask=h_inside & token_inside)


@triton.jit
def _pieces_vector_kernel(
    x, tiles, place, pieces, tokens, n, H, B, x_row, piece_row,
    HEIGHT: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``HEIGHT`` rows of one tile, held in registers, for all tokens."""
    program = tl.program_id(0)
    height_tiles = tl.cdiv(H, HEIGHT)
    s = (program // height_tiles).to(tl.int64)
    h = program % height_tiles * HEIGHT + tl.arange(0, HEIGHT)
    along = tl.arange(0, DEPTH)
    begin = tl.load(place + s) * B
    inside = along < tl.minimum(n - begin, B)
    tile_at = tiles + s * H * B + h[:, None] * B + along[None, :]
    tile = tl.load(tile_at, mask=(h < H)[:, None] & inside[None, :], other=0.0).to(tl.float32)
    x_at = x + begin + along
    piece_at = pieces + (s * H + h) * piece_row
    for _ in range(tokens):
        x_tile = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        total = tl.sum(tile * x_tile[None, :], 1)
        tl.store(piece_at, total.to(pieces.dtype.element_ty), mask=h < H)
        x_at += x_row
        piece_at += 1


@triton.jit
def _bags_kernel(
    pieces, rows, offsets, z, tokens, K, count, row_stride,
    COMPONENTS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """``COMPONENTS`` sums of rows, those of component ``k`` listed from ``offsets[k]`` on."""
    program = tl.program_id(0)
    token_tiles = tl.cdiv(tokens, TOKENS)
    k = program // token_tiles * COMPONENTS + tl.arange(0, COMPONENTS)
    token = program % token_tiles * TOKENS + tl.arange(0, TOKENS)
    token_inside = (token < tokens)[None, :]
    first = tl.load(offsets + k, mask=k < K, other=0)
    after = tl.load(offsets + k + 1, mask=k + 1 < K, other=0)
    length = tl.where(k + 1 < K, after, count) - first
    length = tl.where(k < K, length, 0)
    total = tl.zeros((COMPONENTS, TOKENS), dtype=tl.float32)
    for step in range(tl.max(length, 0)):
        inside = step < length
        row = tl.load(rows + first + step, mask=inside, other=0).to(tl.int64)
        piece_at = pieces + row[:, None] * row_stride + token[None, :]
        total += tl.load(piece_at, mask=inside[:, None] & token_inside, other=0.0).to(tl.float32)
    z_at = z + k.to(tl.int64)[:, None] * row_stride + token[None, :]
    tl.store(z_at, total.to(z.dtype.element_ty), mask=(k < K)[:, None] & token_inside)


@triton.jit
def _spread_kernel(
    z, tiles, place, index, y, tokens, n, H, B, z_row, y_row,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile ``(TOKENS, WIDTH)`` of one block of the axis, from all rows of the tile of the block."""
    program = tl.program_id(0)
    token_tiles = tl.cdiv(tokens, TOKENS)
    width_tiles = tl.cdiv(B, WIDTH)
    s = (program // (width_tiles * token_tiles)).to(tl.int64)
    block = tl.load(place + s)
    b = program // token_tiles % width_tiles * WIDTH + tl.arange(0, WIDTH)
    token = (program % token_tiles * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    along = tl.arange(0, DEPTH)
    token_inside = (token < tokens)[:, None]
    b_inside = ((b < B) & (b < n - block * B))[None, :]
    total = tl.zeros((TOKENS, WIDTH), dtype=tl.float32)
    for begin in range(0, H, DEPTH):
        h = begin + along
        component = tl.load(index + s * H + h, mask=h < H, other=0).to(tl.int64)
        z_at = z + component[None, :] * z_row + token[:, None]
        tile_at = tiles + (s * H + h)[:, None] * B + b[None, :]
        z_tile = tl.load(z_at, mask=token_inside & (h < H)[None, :], other=0.0)
        tile = tl.load(tile_at, mask=b_inside & (h < H)[:, None], other=0.0)
        total = tl.dot(z_tile.to(COMPUTE), tile.to(COMPUTE), total, input_precision=PRECISION)
    y_at = y + token[:, None] * y_row + (block * B + b)[None, :]
    tl.store(y_at, total.to(y.dtype.element_ty), mask=token_inside & b_inside)


@triton.jit
def _spread_vector_kernel(
    z, tiles, place, index, y, tokens, n, H, B, z_row, y_row,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``WIDTH`` entries of one block of the axis for one token."""
    program = tl.program_id(0)
    width_tiles = tl.cdiv(B, WIDTH)
    s = (program // (width_tiles * tokens)).to(tl.int64)
    block = tl.load(place + s)
    b = program // tokens % width_tiles * WIDTH + tl.arange(0, WIDTH)
    token = (program % tokens).to(tl.int64)
    along = tl.arange(0, DEPTH)
    b_inside = (b < B) & (b < n - block * B)
    total = tl.zeros((DEPTH, WIDTH), dtype=tl.float32)
    for begin in range(0, H, DEPTH):
        h = begin + along
        component = tl.load(index + s * H + h, mask=h < H, other=0).to(tl.int64)
        z_tile = tl.load(z + component * z_row + token, mask=h < H, other=0.0).to(tl.float32)
        tile_at = tiles + (s * H + h)[:, None] * B + b[None, :]
        tile = tl.load(tile_at, mask=b_inside[None, :] & (h < H)[:, None], other=0.0).to(tl.float32)
        total += tile * z_tile[:, None]
    tl.store(y + token * y_row + block * B + b, tl.sum(total, 0).to(y.dtype.element_ty), mask=b_inside)


@triton.jit
def _outer_kernel(
    z, x, place, index, gradient, tokens, n, H, B, z_row, x_row,
    PRECISION: tl.constexpr, COMPUTE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A tile ``(HEIGHT, WIDTH)`` of the gradient of one tile: rows of ``z`` times a slice of the axis."""
    program = tl.program_id(0)
    width_tiles = tl.cdiv(B, WIDTH)
    height_tiles = tl.cdiv(H, HEIGHT)
    s = (program // (height_tiles * width_tiles)).to(tl.int64)
    h = program // width_tiles % height_tiles * HEIGHT + tl.arange(0, HEIGHT)
    b = program % width_tiles * WIDTH + tl.arange(0, WIDTH)
    token = tl.arange(0, TOKENS)
    begin = tl.load(place + s) * B
    h_inside = (h < H)[:, None]
    b_inside = ((b < B) & (b < n - begin))[None, :]
    component = tl.load(index + s * H + h, mask=h < H, other=0).to(tl.int64)
    z_at = z + component[:, None] * z_row + token[None, :]
    x_at = x + token.to(tl.int64)[:, None] * x_row + (begin + b)[None, :]
    total = tl.zeros((HEIGHT, WIDTH), dtype=tl.float32)
    for start in range(0, tokens, TOKENS):
        inside = token < tokens - start
        z_tile = tl.load(z_at, mask=h_inside & inside[None, :], other=0.0)
        x_tile = tl.load(x_at, mask=b_inside & inside[:, None], other=0.0)
        total = tl.dot(z_tile.to(COMPUTE), x_tile.to(COMPUTE), total, input_precision=PRECISION)
        z_at += TOKENS
        x_at += TOKENS * x_row
    gradient_at = gradient + (s * H + h)[:, None] * B + b[None, :]
    tl.store(gradient_at, total.to(gradient.dtype.element_ty), mask=h_inside & (b < B)[None, :])


def tile_matmul_forward(x: Tensor, inputs: Inputs, outputs: Outputs, M: int) -> Tensor:
    """Compute ``x @ W.T`` from tiles.

    Args:
        x: ``(T, N)``.
        inputs: What ``tile_project`` takes besides.
        outputs: What ``tile_spread`` takes besides.
        M: Entries of the output axis.

    Returns:
        ``(T, M)``.
    """
    return tile_spread(tile_project(x, *inputs), *outputs, M)


def tile_matmul_backward(
    upstream: Tensor, x: Tensor, inputs: Inputs, outputs: Outputs
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``tile_matmul_forward``; what lies between the axes is computed anew.

    Args:
        upstream: ``(T, M)``.
        x: ``(T, N)``.
        inputs: As there.
        outputs: As there.

    Returns:
        The gradients of ``x``, of the tiles of the input axis and of those of the output axis.
    """
    (right, right_groups, right_place, right_rows, right_offsets), (left, left_groups, left_place, left_index) = (
        inputs, outputs
    )  # fmt: skip
    K = len(right_offsets)
    ordered, left_rows = left_index.sort(stable=True)
    left_offsets = torch.searchsorted(ordered, torch.arange(K, dtype=ordered.dtype, device=x.device))
    places = torch.arange(len(right_rows), dtype=right_offsets.dtype, device=x.device)
    components = torch.searchsorted(right_offsets, places, right=True) - 1  # of the sorted rows
    right_index = torch.empty_like(components).index_put((right_rows.long(),), components)
    z = tile_project(x, *inputs)
    left_gradient = _outer(z, upstream, left, left_groups, left_place, left_index)
    z_gradient = tile_project(upstream, left, left_groups, left_place, left_rows, left_offsets)
    right_gradient = _outer(z_gradient, x, right, right_groups, right_place, right_index)
    x_gradient = tile_spread(z_gradient, right, right_groups, right_place, right_index, x.shape[1])
    return x_gradient, right_gradient, left_gradient


def tile_project(
    x: Tensor, tiles: Tensor, groups: Sequence[int], place: Tensor, rows: Tensor, offsets: Tensor
) -> Tensor:
    """From an axis to components: ``z_k = sum_t content_k[t] x[t]``.

    Args:
        x: ``(T, n)``.
        tiles: ``(rows, B)``.
        groups: ``S`` and ``H`` of each group of tiles, one after the other.
        place: The block of each tile, ``(C,)``, int32 or int64.
        rows: ``(rows,)``, the rows of all tiles sorted by component.
        offsets: ``(K,)``, where each component's rows begin.

    Returns:
        ``(K, T)``, its rows a multiple of 16 entries apart.
    """
    (count, B), (T, n), K = tiles.shape, x.shape, len(offsets)
    pieces, z = tokens_last(1, count, T, x)[0], tokens_last(1, K, T, x)[0]
    stride = pieces.stride(0)

    def multiply(choice: Choice) -> None:
        height, depth, tokens = int(choice["height"]), int(choice["depth"]), int(choice["tokens"])
        options = {"HEIGHT": height, "DEPTH": depth, "num_warps": choice["warps"]}
        for (chosen, tile), (_, piece) in zip(by_group(groups, tiles), by_group(groups, pieces), strict=True):
            S, H, _ = tile.shape
            arguments = (x, tile, place[chosen], piece, T, n, H, B, x.stride(0), stride)
            if tokens == 1:
                _pieces_vector_kernel[(S * triton.cdiv(H, height),)](*arguments, **options)
                continue
            wide = arithmetic(x.dtype) | {"TOKENS": tokens, "num_stages": choice["stages"]}
            _pieces_kernel[(S * triton.cdiv(H, height) * triton.cdiv(T, tokens),)](*arguments, **options, **wide)

    key = f"gblr-project {_named(groups)}x{B} {n} t{tuning.bucket(T)} {x.dtype} {precision(x.dtype)}"
    multiply(tuning.choose(key, x.device, _project_choices(x, max(groups[1::2]), B), multiply))
    tokens = min(triton.next_power_of_2(T), 128)
    components = max(32 // tokens, 8)
    _bags_kernel[(triton.cdiv(K, components) * triton.cdiv(T, tokens),)](
        pieces, rows, offsets, z, T, K, len(rows), stride,
        COMPONENTS=components, TOKENS=tokens, num_warps=4 if tokens > 16 else 1,
    )  # fmt: skip
    return z


def tile_spread(z: Tensor, tiles: Tensor, groups: Sequence[int], place: Tensor, index: Tensor, n: int) -> Tensor:
    """From components to an axis: ``y[t] = sum_k content_k[t] z_k``, the transpose of ``tile_project``.

    Args:
        z: ``(K, T)``, its entries of a row side by side.
        tiles: ``(rows, B)``.
        groups: ``S`` and ``H`` of each group of tiles, one after the other.
        place: The block of each tile, each block once, ``(C,)``.
        index: ``(rows,)``, the component of each row.
        n: Entries of the axis.

    Returns:
        ``(T, n)``.
    """
    B, T = tiles.shape[1], z.shape[1]
    y = torch.empty(T, n, dtype=z.dtype, device=z.device)

    def launch(choice: Choice) -> None:
        width, depth, tokens = int(choice["width"]), int(choice["depth"]), int(choice["tokens"])
        options = {"WIDTH": width, "DEPTH": depth, "num_warps": choice["warps"]}
        for (chosen, tile), (_, components) in zip(by_group(groups, tiles), by_group(groups, index), strict=True):
            S, H, _ = tile.shape
            arguments = (z, tile, place[chosen], components, y, T, n, H, B, z.stride(0), n)
            if tokens == 1:
                _spread_vector_kernel[(S * triton.cdiv(B, width) * T,)](*arguments, **options)
                continue
            wide = arithmetic(z.dtype) | {"TOKENS": tokens, "num_stages": choice["stages"]}
            _spread_kernel[(S * triton.cdiv(B, width) * triton.cdiv(T, tokens),)](*arguments, **options, **wide)

    key = f"gblr-spread {_named(groups)}x{B} {n} t{tuning.bucket(T)} {z.dtype} {precision(z.dtype)}"
    launch(tuning.choose(key, z.device, _spread_choices(z, max(groups[1::2]), B), launch))
    return y


def _outer(z: Tensor, x: Tensor, tiles: Tensor, groups: Sequence[int], place: Tensor, index: Tensor) -> Tensor:
    """The gradient of tiles: ``sum_t z[component, t] x[t, place]`` for each of their entries."""
    B, (T, n) = tiles.shape[1], x.shape
    gradient = torch.empty_like(tiles)

    def launch(choice: Choice) -> None:
        height, width = int(choice["height"]), int(choice["width"])
        for (chosen, part), (_, components) in zip(by_group(groups, gradient), by_group(groups, index), strict=True):
            S, H, _ = part.shape
            _outer_kernel[(S * triton.cdiv(H, height) * triton.cdiv(B, width),)](
                z, x, place[chosen], components, part, T, n, H, B, z.stride(0), x.stride(0),
                **arithmetic(x.dtype), HEIGHT=height, WIDTH=width, TOKENS=choice["tokens"],
                num_warps=choice["warps"], num_stages=choice["stages"],
            )  # fmt: skip

    shapes = [(128, 128, 64, 8, 3), (64, 64, 64, 4, 4), (64, 64, 128, 4, 3), (32, 64, 128, 4, 3)]
    choices = tile_choices(shapes, ("height", "width", "tokens"), (max(groups[1::2]), B, T), x.dtype)
    key = f"gblr-outer {_named(groups)}x{B} {n} t{tuning.bucket(T)} {x.dtype} {precision(x.dtype)}"
    launch(tuning.choose(key, x.device, choices, launch))
    return gradient


def _named(groups: Sequence[int]) -> str:
    return "+".join(f"{S}x{H}" for S, H in zip(groups[::2], groups[1::2], strict=True))


def _project_choices(x: Tensor, H: int, B: int) -> list[Choice]:
    T, depth = x.shape[0], triton.next_power_of_2(B)
    few: list[Choice] = []
    if T <= FEW_TOKENS:
        for entries, warps in [(64, 1)] if tuning.interpreted() else [(8192, 4), (4096, 4), (16384, 8)]:
            height = min(max(entries // depth, 1), triton.next_power_of_2(H))
            few.append({"tokens": 1, "height": height, "depth": depth, "warps": warps})
    shapes = [(128, 128, 64, 8, 3), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4), (32, 128, 64, 4, 4)]
    if T <= FEW_TOKENS:
        shapes = [(32, 16, 128, 4, 4), (16, 16, 256, 2, 4), (64, 16, 64, 4, 4)]
    few = [choice for choice in few if depth <= 16384]
    return few + tile_choices(shapes, ("height", "tokens", "depth"), (H, T, B), x.dtype)


def _spread_choices(z: Tensor, H: int, B: int) -> list[Choice]:
    T = z.shape[1]
    few: list[Choice] = []
    if T <= FEWEST_TOKENS:
        wide = [(512, 32, 8), (512, 16, 4), (128, 64, 4), (32, 128, 4)]
        for depth, width, warps in [(8, 16, 1)] if tuning.interpreted() else wide:
            depth, width = min(depth, triton.next_power_of_2(H)), min(width, triton.next_power_of_2(B))
            few.append({"tokens": 1, "depth": depth, "width": width, "warps": warps})
    shapes = [(128, 128, 64, 8, 3), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4)]
    if T <= FEW_TOKENS:
        shapes = [(16, 32, 128, 4, 4), (16, 16, 128, 2, 4), (16, 64, 64, 4, 4)]
    return few + tile_choices(shapes, ("tokens", "width", "depth"), (T, B, H), z.dtype)
