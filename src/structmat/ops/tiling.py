"""Products with sums of rank-1 blocks: dense products on contiguous slices, tile by tile.

Each axis is cut into blocks of one size. What a component has in a block is a piece of it; the pieces in one block,
``H`` at a time, make a tile ``(H, B)``, zero where a segment ends within the block. A product is then one batch of
dense ones over all tiles, and sums of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat.ops.common import workspace

BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes to choose from."""

ROW_COST = 16
"""What it takes to gather or add up one number, in multiplications of a product (measured on a CPU)."""

CHUNK = 128
"""Tokens at a time on a CPU, so that the pieces of the components stay in its cache."""


def positions(start: Tensor, width: Tensor, n: int, total: int) -> tuple[Tensor, Tensor]:
    """The component and the place on the axis of each entry of flat contents.

    Args:
        start: ``(K,)``, whole numbers.
        width: ``(K,)``, whole numbers.
        n: Entries of the axis, which is cyclic.
        total: Sum of the widths.

    Returns:
        Both ``(total,)``, int64.
    """
    start, width = start.long(), width.long()
    components = torch.arange(len(width), device=width.device)
    rows = torch.repeat_interleave(components, width, output_size=total)
    offsets = width.cumsum(0) - width
    return rows, (start[rows] + torch.arange(total, device=width.device) - offsets[rows]) % n


@dataclass(frozen=True)
class Tiling:
    """How the segments of one axis fall into tiles.

    Attributes:
        n: Entries of the axis.
        block: ``B``; the last block may be shorter.
        blocks: The block of each of the ``S`` tiles, ascending, ``(S,)``; every block has a tile.
        index: The component of each row of each tile, ``(S, H)``; any for rows without one, whose entries are padding.
        entries: For each entry of a tile its place in the flat contents, ``(S, H, B)``; their number for padding.
        contents: Length of the flat contents.
    """

    n: int
    block: int
    blocks: Tensor
    index: Tensor
    entries: Tensor
    contents: int

    @property
    def padding(self) -> float:
        """Multiplications with padding, relative to those with contents."""
        return self.entries.numel() / max(self.contents, 1) - 1

    def packed(self, contents: Tensor) -> Tensor:
        """Flat contents as tiles ``(S, H, B)``, differentiable."""
        return torch.cat([contents, contents.new_zeros(1)])[self.entries]

    def bags(self, K: int) -> tuple[Tensor, Tensor]:
        """The rows of all tiles, sorted by their components, ``(S H,)``, and where each component's begin, ``(K,)``."""
        return sorted_rows(self.index.flatten(), K)

    def outer(self, x: Tensor, z: Tensor) -> Tensor:
        """``sum_t x[t, place] z[component, t]`` for each entry of the flat contents: their gradient.

        Args:
            x: ``(T, n)``.
            z: ``(K, T)``.

        Returns:
            Flat, as the contents.
        """
        products = outer_products(x, z, self.blocks, self.index, self.entries.shape[2])
        flat = products.new_empty(self.contents + 1).index_put((self.entries,), products)
        return flat[: self.contents]


def tiling(start: Tensor, width: Tensor, n: int, block: int | None = None) -> Tiling:
    """Cut segments into tiles.

    Args:
        start: ``(K,)``, whole numbers.
        width: ``(K,)``, whole numbers of at least 1.
        n: Entries of the axis.
        block: ``B``; None for the one of ``BLOCKS`` at which the product is cheapest.

    Returns:
        The tiles.
    """
    start, width = start.long(), width.long()
    total = int(width.sum())
    rows, places = positions(start, width, n, total)
    if block is None:
        sizes = [size for size in BLOCKS if size < n] + [n]
        block = min(sizes, key=lambda size: _cost(rows, places, n, size))
    pieces, piece_of = torch.unique(places // block * len(width) + rows, return_inverse=True)  # sorted by block
    piece_block, piece_component = pieces // len(width), pieces % len(width)
    counts = torch.bincount(piece_block, minlength=-(-n // block))
    H = _height(counts)
    tiles = (-(-counts // H)).clamp_min(1)
    first_tile, first_piece = tiles.cumsum(0) - tiles, counts.cumsum(0) - counts
    within = torch.arange(len(pieces), device=start.device) - first_piece[piece_block]
    slot = (first_tile[piece_block] + within // H) * H + within % H
    S = int(tiles.sum())
    spread = torch.arange(S * H, device=start.device) % max(len(width), 1)  # no component gets all of the empty rows
    index = spread.index_put((slot,), piece_component)
    entries = slot.new_full((S * H * block,), total)
    entries[slot[piece_of] * block + places % block] = torch.arange(total, device=start.device)
    blocks = torch.repeat_interleave(torch.arange(len(tiles), device=start.device), tiles)
    return Tiling(n, block, blocks, index.view(S, H), entries.view(S, H, block), total)


def _cost(rows: Tensor, places: Tensor, n: int, block: int) -> int:
    count = -(-n // block)
    pieces = torch.unique(rows * count + places // block)
    counts = torch.bincount(pieces % count, minlength=count)
    H = _height(counts)
    return int((-(-counts // H)).clamp_min(1).sum()) * H * (block + ROW_COST)


def _height(counts: Tensor) -> int:
    """Rows per tile: of those that pad by a quarter at most, the most; otherwise, the one that pads least."""
    largest = max(int(counts.max()) if len(counts) else 1, 1)
    total = max(int(counts.sum()), 1)
    heights = sorted({-(-largest // parts) for parts in range(1, 17)}, reverse=True)
    padded = {H: int((-(-counts // H)).clamp_min(1).sum()) * H for H in heights}
    return next((H for H in heights if 4 * padded[H] <= 5 * total), min(heights, key=lambda H: padded[H]))


def tile_matmul(
    x: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor], outputs: tuple[Tensor, Tensor, Tensor], M: int
) -> Tensor:
    """Compute ``x @ W.T`` from tiles, all tokens at once.

    Args:
        x: ``(T, N)``.
        inputs: What ``tile_project`` takes besides.
        outputs: What ``tile_spread`` takes besides.
        M: Entries of the output axis.

    Returns:
        ``(T, M)``.
    """
    return tile_spread(tile_project(x, *inputs), *outputs, M).contiguous()


def in_chunks(x: Tensor) -> bool:
    """Whether ``CHUNK`` tokens at a time are faster than all at once."""
    return x.device.type == "cpu" and x.shape[0] > CHUNK


def tile_matmul_in_chunks(
    x: Tensor, inputs: tuple[Tensor, Tensor, Tensor, Tensor], outputs: tuple[Tensor, Tensor, Tensor], M: int
) -> Tensor:
    """``CHUNK`` tokens at a time, in memory that the thread keeps."""
    (right, right_place, rows, offsets), (left, left_place, left_index) = inputs, outputs
    (S, H, B), (R, G, D) = right.shape, left.shape
    columns, index = -(-x.shape[1] // B), left_index.flatten()
    blocks = torch.arange(-(-M // D), dtype=left_place.dtype, device=x.device)
    ordered, order = left_place.sort(stable=True)
    firsts = torch.searchsorted(ordered, blocks) if len(blocks) != R else None
    most = min(x.shape[0], CHUNK)
    y = x.new_empty(x.shape[0], M)
    buffers = workspace(x, columns * B * most, S * B * most, max(S * H, R * G) * most, R * D * most)
    for some, out in zip(x.split(most), y.split(most), strict=True):
        T = len(some)
        whole = buffers[0][: columns * B * T].view(columns * B, T)
        whole[: x.shape[1]].copy_(some.mT)
        whole[x.shape[1] :] = 0
        segments = whole.view(columns, B, T)
        if columns != S:  # a block has several tiles
            segments = torch.index_select(segments, 0, right_place, out=buffers[1][: S * B * T].view(S, B, T))
        pieces = torch.bmm(right, segments, out=buffers[2][: S * H * T].view(S, H, T)).flatten(0, 1)
        z = F.embedding_bag(rows, pieces, offsets, mode="sum")  # (K, T)
        pieces = torch.index_select(z, 0, index, out=buffers[2][: R * G * T].view(R * G, T)).view(R, G, T)
        products = torch.bmm(pieces.mT, left, out=buffers[3][: R * D * T].view(R, T, D))
        if firsts is not None:
            products = F.embedding_bag(order, products.flatten(1), firsts, mode="sum").view(-1, T, D)
        if M % D:
            out.copy_(products.transpose(0, 1).flatten(1)[:, :M])
        else:
            out.unflatten(1, (-1, D)).copy_(products.transpose(0, 1))
    return y


def rows_to_components(rows: Tensor, offsets: Tensor) -> Tensor:
    """The component of each row of the tiles.

    Args:
        rows: ``(S H,)``, the rows sorted by component.
        offsets: ``(K,)``, where each component's begin.

    Returns:
        ``(S H,)``, int64.
    """
    ends = torch.cat([offsets[1:], offsets.new_full((1,), len(rows))])
    components = torch.repeat_interleave(torch.arange(len(offsets), device=rows.device), (ends - offsets).long())
    return torch.empty_like(components).index_put((rows.long(),), components)


def sorted_rows(index: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Rows sorted by their components ``index (S H,)``, and where each of the ``K`` components' begin."""
    counts = torch.bincount(index, minlength=K)
    return index.argsort(stable=True), counts.cumsum(0) - counts


def outer_products(x: Tensor, z: Tensor, place: Tensor, index: Tensor, block: int) -> Tensor:
    """``sum_t x[t, place] z[component, t]`` for each entry of the tiles ``(S, H, B)``."""
    pieces = z.index_select(0, index.flatten()).view(*index.shape, -1)  # (S, H, T)
    return torch.bmm(pieces, _cut(x, block).transpose(0, 1).index_select(0, place))


def tile_project(x: Tensor, tiles: Tensor, blocks: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """From an axis to components: ``z_k = sum_t content_k[t] x[t]``.

    Args:
        x: ``(T, n)``.
        tiles: ``(S, H, B)``.
        blocks: ``(S,)``.
        rows: ``(S H,)``, the rows of all tiles sorted by component.
        offsets: ``(K,)``, where each component's rows begin.

    Returns:
        ``(K, T)``.
    """
    segments = _cut(x.mT.contiguous().mT, tiles.shape[2]).permute(1, 2, 0)  # (C, B, T), tokens side by side
    if len(segments) != len(tiles):  # a block has several tiles
        segments = segments.index_select(0, blocks)
    pieces = torch.bmm(tiles, segments).flatten(0, 1)  # (S H, T)
    return F.embedding_bag(rows, pieces, offsets, mode="sum")  # on a CPU a tenth of the time of index_add


def tile_spread(z: Tensor, tiles: Tensor, blocks: Tensor, index: Tensor, n: int) -> Tensor:
    """From components to an axis: ``y[t] = sum_k content_k[t] z_k``, the transpose of ``tile_project``.

    Args:
        z: ``(K, T)``.
        tiles: ``(S, H, B)``.
        blocks: ``(S,)``.
        index: ``(S, H)`` or flat.
        n: Entries of the axis.

    Returns:
        ``(T, n)``.
    """
    S, H, B = tiles.shape
    C = -(-n // B)
    pieces = z.index_select(0, index.flatten()).view(S, H, -1)
    segments = torch.bmm(pieces.mT, tiles)  # (S, T, B); this side round, one token is not slow on a CPU
    if C != S:
        segments = segments.new_zeros(C, z.shape[1], B).index_add(0, blocks.long(), segments)
    return segments.transpose(0, 1).flatten(1)[:, :n]


def _cut(x: Tensor, block: int) -> Tensor:
    """``(T, n)`` as ``(T, C, B)``, the last block filled up with zeros."""
    missing = -x.shape[1] % block
    return (F.pad(x, (0, missing)) if missing else x).unflatten(1, (-1, block))
