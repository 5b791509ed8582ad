"""Products with sums of rank-1 blocks: dense products on contiguous slices, tile by tile.

Each axis is cut into ``C`` blocks of ``B`` entries. What a component has in a block is a piece of it; the pieces in one
block make a tile, zero where a segment ends within the block. Tiles of similar heights are made equally high, ``H``,
and form a group of ``S``; a few groups, ``G``, hold the tiles of an axis, whose ``sum S H`` rows lie one after the
other. A product is then a batch of dense ones for each group, and sums of rows.

The numbers were tuned by measurement on a CPU; ``benchmarks/gblr_speed.py`` times the products in which a change of
them shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from structmat.ops.common import tokens_within, traced, workspace

Inputs = tuple[Tensor, Sequence[int], Tensor, Tensor, Tensor]
"""The input axis: tiles, groups, blocks, the rows sorted by component, and where the rows of each component begin."""

Outputs = tuple[Tensor, Sequence[int], Tensor, Tensor]
"""The output axis: tiles, groups, blocks, and the component of each row."""

BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""The block sizes to choose from."""

ROW_COST = 16
"""The cost of gathering or adding up one number, in multiplications of a product (tuned with
``benchmarks/gblr_speed.py``)."""

MOST_GROUPS = 4
"""The most batches of products that replace one whose tiles are all as high as the highest (tuned with
``benchmarks/gblr_speed.py``)."""

MOST_CUTS = 16
"""The number of places at which a group may end, so that the best groups are found quickly."""

GROUP_COST = 0.015
"""The cost of one more group, relative to all multiplications without padding (tuned with
``benchmarks/gblr_speed.py``)."""

CHUNK = 128
"""The number of tokens at a time on a CPU, at least (tuned with ``benchmarks/gblr_speed.py``)."""

PIECES = 6
"""The MiB of the pieces of the components at a time, so that they stay in a CPU's cache (tuned with
``benchmarks/gblr_speed.py``)."""


def positions(start: Tensor, width: Tensor, n: int, total: int) -> tuple[Tensor, Tensor]:
    """The component and the place on the axis of each entry of flat contents.

    Args:
        start: The first entries of the segments, ``(K,)``, whole numbers.
        width: The widths of the segments, ``(K,)``, whole numbers.
        n: The number of entries of the axis, which is cyclic.
        total: The sum of the widths.

    Returns:
        Both ``(total,)``, int64.
    """
    start, width = start.long(), width.long()
    offsets = width.cumsum(0) - width
    rows = _parts(offsets, total)
    return rows, (start[rows] + torch.arange(total, device=width.device) - offsets[rows]) % n


def _parts(offsets: Tensor, total: int) -> Tensor:
    """The part of each of ``total`` entries, where parts begin at ``offsets``; ONNX has no ``repeat_interleave``."""
    marks = offsets.new_zeros(total + 1).index_add(0, offsets, torch.ones_like(offsets))
    return marks[:-1].cumsum(0) - 1


def in_full_length(contents: Tensor, start: Tensor, width: Tensor, n: int) -> Tensor:
    """Flat contents as vectors along the axis, zero outside of their segments.

    Args:
        contents: The entries of all segments, one segment after the other.
        start: The first entries of the segments, ``(K,)``, whole numbers.
        width: The widths of the segments, ``(K,)``, whole numbers of at least 1.
        n: The number of entries of the axis, which is cyclic.

    Returns:
        ``(K, n)``.
    """
    rows, columns = positions(start, width, n, contents.shape[0])
    return contents.new_zeros(width.shape[0], n).index_put((rows, columns), contents)


@dataclass(frozen=True)
class Tiling:
    """How the segments of one axis fall into tiles.

    Attributes:
        n: The number of entries of the axis.
        block: The size of a block, ``B``; the last block may be shorter.
        groups: The ``S`` and ``H`` of each group, one after the other, ``(2 G,)``.
        blocks: The block of each tile, each block once, ``(C,)``; in order if there is one group.
        index: The component of each row, ``(rows,)``; any component for rows of padding.
        entries: The place of each entry of a tile in the flat contents, ``(rows, B)``; the length of the contents for
            padding.
        contents: The length of the flat contents.
    """

    n: int
    block: int
    groups: tuple[int, ...]
    blocks: Tensor
    index: Tensor
    entries: Tensor
    contents: int

    @property
    def padding(self) -> float:
        """The multiplications with padding, relative to those with contents."""
        return self.entries.numel() / max(self.contents, 1) - 1

    def packed(self, contents: Tensor) -> Tensor:
        """Flat contents as tiles ``(rows, B)``, differentiable."""
        return torch.cat([contents, contents.new_zeros(1)])[self.entries]

    def bags(self, K: int) -> tuple[Tensor, Tensor]:
        """The rows of all tiles, sorted by component, ``(rows,)``, and where each component's begin, ``(K,)``."""
        return sorted_rows(self.index, K)

    def outer(self, x: Tensor, z: Tensor) -> Tensor:
        """``sum_t x[t, place] z[component, t]`` for each entry of the flat contents: their gradient.

        Args:
            x: ``(T, n)``.
            z: ``(K, T)``.

        Returns:
            Flat, as the contents.
        """
        products = outer_products(x, z, self.groups, self.blocks, self.index, self.block)
        flat = products.new_empty(self.contents + 1).index_put((self.entries,), products)
        return flat[: self.contents]


def tiling(start: Tensor, width: Tensor, n: int, block: int | None = None) -> Tiling:
    """Cut segments into tiles.

    Args:
        start: The first entries of the segments, ``(K,)``, whole numbers.
        width: The widths of the segments, ``(K,)``, whole numbers of at least 1.
        n: The number of entries of the axis.
        block: The size of a block, ``B``; None for the one of ``BLOCKS`` at which the product is cheapest.

    Returns:
        The tiles.
    """
    start, width = start.long(), width.long()
    total, K = int(width.sum()), max(len(width), 1)
    components, places = positions(start, width, n, total)
    if block is None:
        sizes = [size for size in BLOCKS if size < n] + [n]
        block = min(sizes, key=lambda size: _cost(components, places, n, size))
    pieces, piece_of = torch.unique(places // block * K + components, return_inverse=True)  # sorted by block
    counts = torch.bincount(pieces // K, minlength=-(-n // block))
    blocks, heights, groups = _grouped(counts)
    first_row, first_piece = torch.empty_like(counts), counts.cumsum(0) - counts
    first_row[blocks] = heights.cumsum(0) - heights
    row = first_row[pieces // K] + torch.arange(len(pieces), device=start.device) - first_piece[pieces // K]
    rows = int(heights.sum())
    index = torch.arange(rows, device=start.device) % K  # no component gets all of the empty rows
    index[row] = pieces % K
    entries = row.new_full((rows * block,), total)
    entries[row[piece_of] * block + places % block] = torch.arange(total, device=start.device)
    return Tiling(n, block, groups, blocks, index, entries.view(rows, block), total)


def _cost(components: Tensor, places: Tensor, n: int, block: int) -> int:
    count = -(-n // block)
    counts = torch.bincount(torch.unique(components * count + places // block) % count, minlength=count)
    groups = _groups(counts.clamp_min(1).sort(descending=True).values.tolist())
    return sum(S * H for S, H in groups) * (block + ROW_COST)


def _groups(heights: list[int]) -> list[tuple[int, int]]:
    """``S`` and ``H`` of groups of tiles, from their descending heights: the fewest rows in all for the groups."""
    C = len(heights)
    cuts = sorted({C * part // MOST_CUTS for part in range(MOST_CUTS + 1)})  # where a group may begin or end
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # before each cut: rows, and the groups' ends
    choices: list[tuple[float, tuple[int, ...]]] = []
    for count in range(1, min(MOST_GROUPS, C) + 1):
        best = {
            end: min(
                (rows + (end - begin) * heights[begin], (*ends, end))
                for begin, (rows, ends) in best.items()
                if begin < end
            )
            for end in cuts[count:]
        }
        rows, ends = best[C]
        choices.append((rows + count * GROUP_COST * sum(heights), ends))
    return [(end - begin, heights[begin]) for begin, end in itertools.pairwise((0, *min(choices)[1]))]


def _grouped(counts: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Blocks with ``counts (C,)`` pieces in groups of similar numbers.

    Returns:
        The blocks by group, ``(C,)``; the height of the tile of each, ``(C,)``; ``S`` and ``H`` of each group.
    """
    ordered, blocks = counts.clamp_min(1).sort(descending=True, stable=True)
    groups = _groups(ordered.tolist())
    blocks = torch.cat([part.sort().values for part in blocks.split([S for S, _ in groups])])
    heights = torch.tensor([H for S, H in groups for _ in range(S)], device=counts.device)
    return blocks, heights, tuple(itertools.chain.from_iterable(groups))


def by_group(groups: Sequence[int], rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The tiles of each group, as a slice, and its rows ``(S, H, ...)``.

    Args:
        groups: The ``S`` and ``H`` of each group, one after the other.
        rows: The rows of all groups, ``(rows, ...)``.

    Yields:
        The slice of a group's tiles among the blocks, and its rows.
    """
    tile, row = 0, 0
    for S, H in zip(groups[::2], groups[1::2], strict=True):
        yield slice(tile, tile + S), rows[row : row + S * H].unflatten(0, (S, H))
        tile, row = tile + S, row + S * H


def tile_matmul(x: Tensor, inputs: Inputs, outputs: Outputs, M: int) -> Tensor:
    """Compute ``x @ W.T`` from tiles, all tokens at once.

    Args:
        x: ``(T, N)``.
        inputs: The other arguments of ``tile_project``.
        outputs: The other arguments of ``tile_spread``.
        M: The number of entries of the output axis.

    Returns:
        ``(T, M)``.
    """
    return tile_spread(tile_project(x, *inputs), *outputs, M).contiguous()


def tile_matmul_plainly(x: Tensor, inputs: Inputs, outputs: Outputs, M: int) -> Tensor:
    """The same by operators that have derivatives of any order and that other runtimes know."""
    tiles, groups, blocks, rows, offsets = inputs
    pieces, components = _pieces(x, tiles, groups, blocks), rows_to_components(rows, offsets)
    z = pieces.new_zeros(offsets.shape[0], x.shape[0]).index_add(0, components, pieces)
    return tile_spread(z, *outputs, M).contiguous()


def tile_matmul_in_chunks(x: Tensor, inputs: Inputs, outputs: Outputs, M: int) -> Tensor:
    """The same for some of the tokens at a time, in memory that the thread keeps."""
    (right, right_groups, right_place, bag, offsets), (left, left_groups, left_place, index) = inputs, outputs
    (in_rows, B), (out_rows, D) = right.shape, left.shape
    columns, blocks = len(right_place), len(left_place)
    places = left_place.argsort() if len(left_groups) > 2 else left_place
    most = min(x.shape[0], max(CHUNK, tokens_within(PIECES, max(in_rows, out_rows), x)))
    y = x.new_empty(x.shape[0], M)
    width = max(columns * B, blocks * D)
    segments_memory, products_memory, rows = workspace(x, width * most, width * most, max(in_rows, out_rows) * most)
    for some, out in zip(_cut(x, B).split(most), y.split(most), strict=True):
        T, segments = len(some), some.transpose(0, 1)  # (C, T, B)
        if len(right_groups) > 2:
            memory = segments_memory[: columns * T * B].view(columns, T, B)
            segments = torch.index_select(segments, 0, right_place, out=memory)
        pieces = rows[: in_rows * T].view(in_rows, T)
        for (tiles, tile), (_, piece) in zip(
            by_group(right_groups, right), by_group(right_groups, pieces), strict=True
        ):
            torch.bmm(tile, segments[tiles].mT, out=piece)
        z = F.embedding_bag(bag, pieces, offsets, mode="sum")  # (K, T)
        pieces = torch.index_select(z, 0, index, out=rows[: out_rows * T].view(out_rows, T))
        products = products_memory[: blocks * T * D].view(blocks, T, D)
        for (tiles, tile), (_, piece) in zip(by_group(left_groups, left), by_group(left_groups, pieces), strict=True):
            torch.bmm(piece.mT, tile, out=products[tiles])
        if len(left_groups) > 2:
            memory = segments_memory[: blocks * T * D].view(blocks, T, D)
            products = torch.index_select(products, 0, places, out=memory)
        if M % D:
            out.copy_(products.transpose(0, 1).flatten(1)[:, :M])
        else:
            out.unflatten(1, (-1, D)).copy_(products.transpose(0, 1))
    return y


def rows_to_components(rows: Tensor, offsets: Tensor) -> Tensor:
    """The component of each row of the tiles.

    Args:
        rows: The rows sorted by component, ``(rows,)``.
        offsets: The places where the rows of each component begin, ``(K,)``.

    Returns:
        ``(rows,)``, int64.
    """
    components = _parts(offsets.long(), rows.shape[0])
    return torch.empty_like(components).index_put((rows.long(),), components)


def sorted_rows(index: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Rows sorted by their components ``index (rows,)``, and where each of the ``K`` components' begin."""
    counts = torch.bincount(index, minlength=K)
    return index.argsort(stable=True), counts.cumsum(0) - counts


def outer_products(x: Tensor, z: Tensor, groups: Sequence[int], blocks: Tensor, index: Tensor, block: int) -> Tensor:
    """``sum_t x[t, place] z[component, t]`` for each entry of the tiles ``(rows, B)``."""
    segments = _arranged(_cut(x, block).transpose(0, 1), groups, blocks)  # (C, T, B)
    rows = by_group(groups, z.index_select(0, index))
    return _joined([torch.bmm(some, segments[tiles]).flatten(0, 1) for tiles, some in rows])


def tile_project(
    x: Tensor, tiles: Tensor, groups: Sequence[int], blocks: Tensor, rows: Tensor, offsets: Tensor
) -> Tensor:
    """From an axis to components: ``z_k = sum_t content_k[t] x[t]``.

    Args:
        x: ``(T, n)``.
        tiles: ``(rows, B)``.
        groups: The ``S`` and ``H`` of each group of tiles, one after the other.
        blocks: The block of each tile, ``(C,)``, as in ``Tiling``.
        rows: The rows of all tiles sorted by component, ``(rows,)``.
        offsets: The places where the rows of each component begin, ``(K,)``.

    Returns:
        ``(K, T)``.
    """
    pieces = _pieces(x, tiles, groups, blocks)
    return F.embedding_bag(rows, pieces, offsets, mode="sum")  # on a CPU a tenth of the time of index_add


def _pieces(x: Tensor, tiles: Tensor, groups: Sequence[int], blocks: Tensor) -> Tensor:
    """The products of the rows of all tiles with what is in their blocks, ``(rows, T)``."""
    segments = _arranged(_cut(x, tiles.shape[1]).permute(1, 2, 0), groups, blocks)  # (C, B, T)
    return _joined([torch.bmm(some, segments[chosen]).flatten(0, 1) for chosen, some in by_group(groups, tiles)])


def tile_spread(z: Tensor, tiles: Tensor, groups: Sequence[int], blocks: Tensor, index: Tensor, n: int) -> Tensor:
    """From components to an axis: ``y[t] = sum_k content_k[t] z_k``, the transpose of ``tile_project``.

    Args:
        z: ``(K, T)``.
        tiles: ``(rows, B)``.
        groups: The ``S`` and ``H`` of each group of tiles, one after the other.
        blocks: The block of each tile, ``(C,)``, as in ``Tiling``.
        index: The component of each row, ``(rows,)``.
        n: The number of entries of the axis.

    Returns:
        ``(T, n)``.
    """
    pairs = zip(by_group(groups, z.index_select(0, index)), by_group(groups, tiles), strict=True)
    # this side round, one token is not slow on a CPU
    segments = _joined([torch.bmm(rows.mT, some) for (_, rows), (_, some) in pairs])  # (C, T, B)
    if len(groups) > 2:
        segments = segments.index_select(0, blocks.argsort())
    return segments.transpose(0, 1).flatten(1)[:, :n]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _arranged(segments: Tensor, groups: Sequence[int], blocks: Tensor) -> Tensor:
    """Segments ``(C, ...)`` in the order of ``blocks``."""
    return segments if len(groups) == 2 else segments.index_select(0, blocks)


def _cut(x: Tensor, block: int) -> Tensor:
    """``(T, n)`` as ``(T, C, B)``, the last block filled up with zeros."""
    missing = -x.shape[1] % block
    return (F.pad(x, (0, missing)) if traced() or missing else x).unflatten(1, (-1, block))
