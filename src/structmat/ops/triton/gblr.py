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
from torch import Tensor

from structmat.ops.tiling import Inputs, Outputs, by_group
from structmat.ops.triton import tuning
from structmat.ops.triton.gblr_kernels import (
    bags_kernel,
    outer_kernel,
    pieces_kernel,
    pieces_vector_kernel,
    spread_kernel,
    spread_vector_kernel,
)
from structmat.ops.triton.products import FEW_TOKENS, FEWEST_TOKENS, arithmetic, precision, tile_choices, tokens_last
from structmat.ops.triton.tuning import Choice


def tile_matmul_forward(x: Tensor, inputs: Inputs, outputs: Outputs, M: int) -> Tensor:
    """Compute ``x @ W.T`` from tiles.

    Args:
        x: ``(T, N)``.
        inputs: The other arguments of ``tile_project``.
        outputs: The other arguments of ``tile_spread``.
        M: The number of entries of the output axis.

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
        inputs: The same as in the forward product.
        outputs: The same as in the forward product.

    Returns:
        The gradients of ``x``, of the tiles of the input axis and of those of the output axis.
    """
    right, right_groups, right_place, right_rows, right_offsets = inputs
    left, left_groups, left_place, left_index = outputs
    ordered, left_rows = left_index.sort(stable=True)
    components = torch.arange(len(right_offsets), dtype=ordered.dtype, device=x.device)
    left_offsets, right_index = torch.searchsorted(ordered, components), _components(right_rows, right_offsets)
    z = tile_project(x, *inputs)
    left_gradient = _outer(z, upstream, left, left_groups, left_place, left_index)
    z_gradient = tile_project(upstream, left, left_groups, left_place, left_rows, left_offsets)
    right_gradient = _outer(z_gradient, x, right, right_groups, right_place, right_index)
    x_gradient = tile_spread(z_gradient, right, right_groups, right_place, right_index, x.shape[1])
    return x_gradient, right_gradient, left_gradient


def _components(rows: Tensor, offsets: Tensor) -> Tensor:
    """``tiling.rows_to_components`` without waiting for the device."""
    places = torch.arange(len(rows), dtype=offsets.dtype, device=rows.device)
    components = torch.searchsorted(offsets, places, right=True) - 1  # of the sorted rows
    return torch.empty_like(components).index_put((rows.long(),), components)


def tile_project(
    x: Tensor, tiles: Tensor, groups: Sequence[int], place: Tensor, rows: Tensor, offsets: Tensor
) -> Tensor:
    """``tiling.tile_project`` with kernels; the rows of the result ``(K, T)`` begin at multiples of 16 entries."""
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
                pieces_vector_kernel[(S * triton.cdiv(H, height),)](*arguments, **options)
                continue
            wide = arithmetic(x.dtype) | {"TOKENS": tokens, "num_stages": choice["stages"]}
            pieces_kernel[(S * triton.cdiv(H, height) * triton.cdiv(T, tokens),)](*arguments, **options, **wide)

    key = f"gblr-project {_named(groups)}x{B} {n} t{tuning.bucket(T)} {x.dtype} {precision(x.dtype)}"
    multiply(tuning.choose(key, x.device, _project_choices(x, max(groups[1::2]), B), multiply))
    tokens = min(triton.next_power_of_2(T), 128)
    components = max(32 // tokens, 8)
    options = {"COMPONENTS": components, "TOKENS": tokens, "num_warps": 4 if tokens > 16 else 1}
    programs = triton.cdiv(K, components) * triton.cdiv(T, tokens)
    bags_kernel[(programs,)](pieces, rows, offsets, z, T, K, len(rows), stride, **options)
    return z


def tile_spread(z: Tensor, tiles: Tensor, groups: Sequence[int], place: Tensor, index: Tensor, n: int) -> Tensor:
    """``tiling.tile_spread`` with kernels; the entries of a row of ``z`` lie side by side."""
    B, T = tiles.shape[1], z.shape[1]
    y = torch.empty(T, n, dtype=z.dtype, device=z.device)

    def launch(choice: Choice) -> None:
        width, depth, tokens = int(choice["width"]), int(choice["depth"]), int(choice["tokens"])
        options = {"WIDTH": width, "DEPTH": depth, "num_warps": choice["warps"]}
        for (chosen, tile), (_, components) in zip(by_group(groups, tiles), by_group(groups, index), strict=True):
            S, H, _ = tile.shape
            arguments = (z, tile, place[chosen], components, y, T, n, H, B, z.stride(0), n)
            if tokens == 1:
                spread_vector_kernel[(S * triton.cdiv(B, width) * T,)](*arguments, **options)
                continue
            wide = arithmetic(z.dtype) | {"TOKENS": tokens, "num_stages": choice["stages"]}
            spread_kernel[(S * triton.cdiv(B, width) * triton.cdiv(T, tokens),)](*arguments, **options, **wide)

    key = f"gblr-spread {_named(groups)}x{B} {n} t{tuning.bucket(T)} {z.dtype} {precision(z.dtype)}"
    launch(tuning.choose(key, z.device, _spread_choices(z, max(groups[1::2]), B), launch))
    return y


def _outer(z: Tensor, x: Tensor, tiles: Tensor, groups: Sequence[int], place: Tensor, index: Tensor) -> Tensor:
    """The gradient of tiles: ``sum_t z[component, t] x[t, place]`` for each of their entries."""
    B, (T, n) = tiles.shape[1], x.shape
    gradient = torch.empty_like(tiles)

    def launch(choice: Choice) -> None:
        height, width = int(choice["height"]), int(choice["width"])
        options = arithmetic(x.dtype) | {"HEIGHT": height, "WIDTH": width, "TOKENS": choice["tokens"]}
        options |= {"num_warps": choice["warps"], "num_stages": choice["stages"]}
        for (chosen, part), (_, components) in zip(by_group(groups, gradient), by_group(groups, index), strict=True):
            S, H, _ = part.shape
            arguments = (z, x, place[chosen], components, part, T, n, H, B, z.stride(0), x.stride(0))
            outer_kernel[(S * triton.cdiv(H, height) * triton.cdiv(B, width),)](*arguments, **options)

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
