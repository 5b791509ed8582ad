"""Small maps of a matrix as PNG images with a transparent background, which are seen on light and on dark pages."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from structmat.nn import StructuredModule

LEVELS = 15
"""The largest level of a map; an entry of the palette has four bits."""

MORE, LESS = (74, 134, 232), (226, 110, 40)
"""The colours of what is above zero and of what is below it, which are seen on white and on black."""

COMPONENTS = 128
"""The largest number of components in a picture of couplings."""


def patches(counts: Tensor, pixels: int) -> Tensor:
    """Average a map over patches.

    Args:
        counts: The map, ``(M, N)``.
        pixels: The largest size along each axis.

    Returns:
        The map, of at most ``pixels`` along each axis.
    """
    M, N = counts.shape
    return torch.nn.functional.adaptive_avg_pool2d(counts[None], (min(M, pixels), min(N, pixels)))[0]


def overlap_map(layer: StructuredModule, pixels: int) -> Tensor:
    """Count the components over each entry of a layer whose format has segments, averaged over patches.

    Args:
        layer: The layer.
        pixels: The largest size along each axis.

    Returns:
        The map.
    """
    return patches(layer.format.overlap(layer.factors).cpu(), pixels)


def strength_map(layer: StructuredModule) -> Tensor:
    """Measure how strongly each block of a layer with couplings is used: the root mean square over the components.

    Args:
        layer: The layer.

    Returns:
        The map, ``(I, J)``.
    """
    return layer.format.couplings(layer.factors).detach().float().cpu().square().mean(-1).sqrt()


def coupling_map(layer: StructuredModule) -> Tensor:
    """Give the couplings of every block with the components that the blocks use most unevenly.

    Args:
        layer: A layer whose format has couplings.

    Returns:
        The map, at most ``COMPONENTS`` rows for components and ``I J`` columns for blocks, most uneven first.
    """
    diag = layer.format.couplings(layer.factors).detach().float().cpu()  # (I, J, R)
    spread = diag.abs().std((0, 1), correction=0) / diag.abs().mean((0, 1)).clamp_min(1e-12)
    return diag.flatten(0, 1)[:, spread.argsort(descending=True)[:COMPONENTS]].T


def image_of(values: Tensor, most: float) -> str:
    """Draw values from zero on, as the strength of one colour.

    Args:
        values: The values, ``(H, W)``.
        most: The value of the full colour.

    Returns:
        The image as a ``data:`` address.
    """
    levels = (values / max(most, 1e-30) * LEVELS).round().clamp(0, LEVELS).to(torch.uint8)
    return _data(_png(levels, [(*MORE, 255 * k // LEVELS) for k in range(LEVELS + 1)]))


def signed_image_of(values: Tensor, most: float) -> str:
    """Draw values of both signs, as the strength of two colours.

    Args:
        values: The values, ``(H, W)``.
        most: The absolute value of the full colours.

    Returns:
        The image as a ``data:`` address.
    """
    half = LEVELS // 2
    levels = ((values / max(most, 1e-30) * half).round().clamp(-half, half) + half).to(torch.uint8)
    palette = [(*(MORE if k > half else LESS), 255 * abs(k - half) // half) for k in range(2 * half + 1)]
    return _data(_png(levels, palette))


def _data(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _png(levels: Tensor, palette: Sequence[tuple[int, int, int, int]]) -> bytes:
    """A PNG file with a palette, four bits for each pixel (PNG specification, third edition, sections 5 and 11)."""
    height, width = levels.shape
    padded = torch.nn.functional.pad(levels, (0, width % 2))
    packed = padded[:, ::2] * 16 + padded[:, 1::2]
    rows = b"".join(b"\0" + bytes(row) for row in packed.tolist())
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)),
            _chunk(b"PLTE", bytes(value for color in palette for value in color[:3])),
            _chunk(b"tRNS", bytes(color[3] for color in palette)),
            _chunk(b"IDAT", zlib.compress(rows, 9)),
            _chunk(b"IEND", b""),
        ]
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
