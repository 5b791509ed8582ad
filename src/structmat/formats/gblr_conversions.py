"""Exact conversions to and between sums of rank-1 blocks (Gaudi-GBLR paper, section 2, Theorems 1 and 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from structmat.formats.base import Factors, Format
from structmat.formats.block_diagonal import BlockDiagonal
from structmat.formats.block_sparse import BlockSparse
from structmat.formats.gaudi_gblr import GaudiGblr
from structmat.formats.gblr import Gblr, from_segments
from structmat.formats.low_rank import LowRank
from structmat.formats.monarch import Monarch

Result = tuple[Gblr, dict[str, Tensor]]


def harden(format: GaudiGblr, factors: Factors) -> Result:
    """Keep what a Gaudi-GBLR matrix has inside its segments; components without a block are left out.

    Where ``sigma`` is infinite the matrix stays the same. A finite one smooths the masks over the segments' edges: the
    contents then take over the masks' values inside, and what lies outside is lost; ``hardening_gap`` tells how much.

    Args:
        format: The Gaudi-GBLR format.
        factors: The factors of the format.

    Returns:
        The GBLR format and its factors.

    Raises:
        TypeError: If the format is another.
        ValueError: If the factors do not fit it.
    """
    if not isinstance(format, GaudiGblr):
        raise TypeError(f"expected a GaudiGblr format to harden, got {format}")
    return format.hardened(factors)


def hardening_gap(format: Format, factors: Factors) -> float:
    """Measure how far the hardened matrix is from the one that learned: ``|W - W_hard|_F / |W|_F``.

    Args:
        format: A format that learns its structure.
        factors: The factors of that format.

    Returns:
        The relative error, 0 for a zero matrix; 0 up to rounding where ``sigma`` is infinite.
    """
    W = format.to_dense(factors).detach().double()
    hard, hardened = format.hardened(factors)
    norm = W.norm()
    return float((W - hard.to_dense(hardened).detach().double()).norm() / norm) if norm > 0 else 0.0


def to_gaudi(format: Gblr, factors: Factors, *, multiple: int = 1) -> tuple[GaudiGblr, dict[str, Tensor]]:
    """The same matrix as Gaudi-GBLR at infinite ``sigma``, ready to learn on.

    Args:
        format: The GBLR format, with at least one component.
        factors: The factors of the format.
        multiple: The multiple of the Gaudi-GBLR format, to which the segments are rounded; at 1 the matrix is the same.

    Returns:
        The Gaudi-GBLR format and its factors.

    Raises:
        ValueError: If there is no component, or the factors do not fit the format.
    """
    format.check_factors(factors)
    if format.components == 0:
        raise ValueError("expected at least one component to learn on, got a GBLR matrix without any")
    left, right = format.axes(factors)
    order = factors["order"].long()
    sizes = torch.tensor(format.shape, device=left.device, dtype=torch.float64)[:, None]
    start, width = (
        torch.stack([factors[name][0].long(), factors[name][1].long()[order]]).double() / sizes
        for name in ("start", "width")
    )
    share = min(1.0, sum(format.entries) / (format.components * (format.M + format.N)))
    target = GaudiGblr(format.M, format.N, format.components, share, multiple)
    return target, {
        "left": left.contiguous(),
        "right": right.contiguous(),
        "location": start.float(),
        "width": width.float(),
        "sigma": torch.full((1,), torch.inf, device=left.device),
    }


def to_gblr(format: Format, factors: Factors) -> Result:
    """The same matrix as a sum of rank-1 blocks (Theorem 1).

    A low-rank matrix costs the same, its segments being the whole axes; so does a Monarch matrix, whose blocks of rank
    ``t`` are ``t`` components of one segment. A dense block of a block-diagonal or block-sparse matrix costs
    ``P Q + min(P, Q)``: one component for each line along its shorter axis.

    Args:
        format: A low-rank, block-diagonal, block-sparse, GBLR, Gaudi-GBLR or (without the output permutation) Monarch
            format.
        factors: The factors of the format.

    Returns:
        The GBLR format and its factors.

    Raises:
        ValueError: If the format is another.
    """
    if isinstance(format, GaudiGblr):
        return harden(format, factors)
    format.check_factors(factors)
    if isinstance(format, Gblr):
        return format, dict(factors)
    if isinstance(format, LowRank):
        return _whole_axes(format, factors["left"], factors["right"])
    if isinstance(format, BlockDiagonal):
        I, (P, Q) = format.blocks, format.block_shape
        places = torch.arange(I, device=factors["blocks"].device)
        return _dense_blocks(format, factors["blocks"].reshape(I, P, Q), places, places)
    if isinstance(format, BlockSparse):
        P, Q = format.block_shape
        places = torch.tensor(format.positions, device=factors["blocks"].device).T
        result = _dense_blocks(format, factors["blocks"].reshape(-1, P, Q), *places)
        return result if not format.rank else add_gblr(result, _whole_axes(format, factors["left"], factors["right"]))
    if isinstance(format, Monarch) and not format.permute_output:
        return _monarch(format, factors)
    raise ValueError(
        "expected a LowRank, BlockDiagonal, BlockSparse, Gblr, GaudiGblr or unpermuted Monarch format (with the output "
        f"permutation the blocks of a Monarch matrix are not contiguous), got {format}"
    )


def add_gblr(first: Result, second: Result) -> Result:
    """The sum of two GBLR matrices: the components of both.

    Args:
        first: A format and its factors.
        second: Another format of the same shape, and its factors, of the same dtype and device.

    Returns:
        The format of the sum and its factors.

    Raises:
        ValueError: If the shapes differ.
    """
    (one, a), (two, b) = first, second
    if one.shape != two.shape:
        raise ValueError(f"expected two matrices of one shape, got {one.shape} and {two.shape}")
    one.check_factors(a)
    two.check_factors(b)
    entries = (one.entries[0] + two.entries[0], one.entries[1] + two.entries[1])
    factors = {name: torch.cat([a[name], b[name]], -1) for name in ("left", "right", "start", "width")}
    factors["order"] = torch.cat([a["order"], b["order"] + one.components])
    return Gblr(*one.shape, one.components + two.components, entries), factors


def interpolate_gaudi(format: GaudiGblr, first: Factors, second: Factors, weight: float) -> dict[str, Tensor]:
    """Interpolate between two Gaudi-GBLR matrices, contents and structural parameters alike (Theorem 2).

    The result is of the same format, and its widths cost between what those of the two cost.

    Args:
        format: The format of both.
        first: The factors at weight 0.
        second: The factors at weight 1.
        weight: A number between 0 and 1.

    Returns:
        The factors; ``sigma`` is that of the first.

    Raises:
        ValueError: If the weight is out of range, or factors do not fit the format.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"expected a weight between 0 and 1, got {weight}")
    format.check_factors(first)
    format.check_factors(second)
    mixed = {name: torch.lerp(first[name], second[name], weight) for name in ("left", "right", "location", "width")}
    return {**mixed, "sigma": first["sigma"]}


def _whole_axes(format: Format, left: Tensor, right: Tensor) -> Result:
    start = torch.zeros(2, left.shape[1], dtype=torch.long, device=left.device)
    width = torch.tensor(format.shape, device=left.device)[:, None].expand_as(start)
    return from_segments(format.shape, left, right, start, width)


def _dense_blocks(format: Format, blocks: Tensor, rows: Tensor, columns: Tensor) -> Result:
    """Dense blocks ``(n, P, Q)`` at these places of the grid of blocks."""
    count, P, Q = blocks.shape
    lines = min(P, Q)
    within = torch.arange(lines, device=blocks.device).repeat(count)  # (count lines,)
    rows, columns = (rows * P).repeat_interleave(lines), (columns * Q).repeat_interleave(lines)
    ones = blocks.new_ones(count * lines)
    if P <= Q:  # a component for each row
        start, widths, left, right = torch.stack([rows + within, columns]), (1, Q), ones, blocks.flatten()
    else:
        start, widths, left, right = torch.stack([rows, columns + within]), (P, 1), blocks.mT.flatten(), ones
    return _flat(format, left, right, start, widths)


def _monarch(format: Monarch, factors: Factors) -> Result:
    (I, J), (P, Q), t = format.blocks, format.block_shape, format.rank
    left, right = format.views(factors)  # (I, P, J, t), (J, I, t, Q)
    device = left.device
    rows = (torch.arange(I, device=device) * P).repeat_interleave(J * t)
    columns = (torch.arange(J, device=device) * Q).repeat_interleave(t).repeat(I)
    contents = left.permute(0, 2, 3, 1).flatten(), right.transpose(0, 1).flatten()
    return _flat(format, *contents, torch.stack([rows, columns]), (P, Q))


def _flat(format: Format, left: Tensor, right: Tensor, start: Tensor, widths: tuple[int, int]) -> Result:
    """From flat contents whose segments have one width per axis."""
    K = start.shape[1]
    width = torch.tensor(widths, device=start.device)[:, None].expand(2, K)
    order = torch.arange(K, device=start.device)
    buffers = {"start": start, "width": width, "order": order}
    factors = {"left": left, "right": right} | {name: tensor.to(torch.int32) for name, tensor in buffers.items()}
    return Gblr(*format.shape, K, (K * widths[0], K * widths[1])), factors
