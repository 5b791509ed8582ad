"""The kernels for GBLR in tiles, which ``gblr`` launches."""

# pyright: reportArgumentType=false

import triton
import triton.language as tl


@triton.jit
def pieces_kernel(
    x,
    tiles,
    place,
    pieces,
    tokens,
    n,
    H,
    B,
    x_row,
    piece_row,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
):
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
def pieces_vector_kernel(
    x,
    tiles,
    place,
    pieces,
    tokens,
    n,
    H,
    B,
    x_row,
    piece_row,
    HEIGHT: tl.constexpr,
    DEPTH: tl.constexpr,
):
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
def bags_kernel(
    pieces,
    rows,
    offsets,
    z,
    tokens,
    K,
    count,
    row_stride,
    COMPONENTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
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
def spread_kernel(
    z,
    tiles,
    place,
    index,
    y,
    tokens,
    n,
    H,
    B,
    z_row,
    y_row,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
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
def spread_vector_kernel(
    z,
    tiles,
    place,
    index,
    y,
    tokens,
    n,
    H,
    B,
    z_row,
    y_row,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
):
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
def outer_kernel(
    z,
    x,
    place,
    index,
    gradient,
    tokens,
    n,
    H,
    B,
    z_row,
    x_row,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
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
