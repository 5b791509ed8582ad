"""GBLR matrices in tiles: the same matrix, stored as it is multiplied, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.formats.base import Factors, FactorSpec, Format
from structmat.formats.gblr import Gblr
from structmat.ops.tiled_gblr import ALGORITHMS, tiled_gblr_matmul
from structmat.ops.tiling import rows_to_components, tiling

AXES = ("left", "right")


@dataclass(frozen=True)
class TiledGblr(Format):
    """A GBLR matrix whose contents lie in dense tiles, zero where a segment ends within one; made by ``tile``.

    Each axis is cut into blocks of ``block`` entries. What a component has in a block is a row of a tile there; a tile
    has ``height`` rows. Factors: ``left (S H, B)`` and ``right (S H, B)``, with the axes' own numbers of tiles ``S``,
    heights and blocks, and for each axis the buffer ``place (S,)``, the block of each tile. ``left_index (S H,)`` is
    the component of each row of ``left``; ``right_rows (S H,)`` the rows of ``right`` sorted by component, of which
    those of component ``k`` begin at ``right_offsets[k]``. A product is two batches of dense ones, without packing. The
    padding counts as parameters and multiplications; it learns if the layer is trained.

    Attributes:
        M: Out features.
        N: In features.
        components: ``K``.
        tiles: ``S`` of the output and of the input axis.
        heights: ``H``, likewise.
        block_sizes: ``B``, likewise.

    Raises:
        ValueError: If a number is not positive or a block is longer than its axis.
    """

    components: int
    tiles: tuple[int, int]
    heights: tuple[int, int]
    block_sizes: tuple[int, int]

    name: ClassVar[str] = "tiled_gblr"
    must_save: ClassVar[bool] = False
    algorithms: ClassVar[tuple[str, ...]] = tuple(ALGORITHMS)
    scale_exponents: ClassVar[dict[str, float]] = {"left": 1 / 2, "right": 1 / 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.natural_int(self.components, "components")
        for field in ("tiles", "heights", "block_sizes"):
            pair = tuple(getattr(self, field))
            if len(pair) != 2:
                raise ValueError(f"expected {field} of the output and the input axis, got {pair}")
            for count in pair:
                _checks.positive_int(count, field)
            object.__setattr__(self, field, pair)
        if self.block_sizes[0] > self.M or self.block_sizes[1] > self.N:
            raise ValueError(f"expected blocks of at most {self.shape} entries, got {self.block_sizes}")

    def factor_specs(self) -> dict[str, FactorSpec]:
        """``left`` and ``right`` as tiles, and the indices that say where they belong."""
        specs: dict[str, FactorSpec] = {}
        for axis, name in enumerate(AXES):
            S, H, B = self._sizes(axis)
            specs[name] = FactorSpec((S * H, B))
        for axis, name in enumerate(AXES):
            rows = self.tiles[axis] * self.heights[axis]
            specs[f"{name}_place"] = FactorSpec((self.tiles[axis],), trainable=False, dtype=torch.int32)
            specs["left_index" if axis == 0 else "right_rows"] = FactorSpec((rows,), trainable=False, dtype=torch.int32)
        specs["right_offsets"] = FactorSpec((self.components,), trainable=False, dtype=torch.int32)
        return specs

    def to_dense(self, factors: Factors) -> Tensor:
        """The sum of the components, each put together from its rows of tiles."""
        full = []
        for axis, (name, index) in enumerate(zip(AXES, self._components(factors), strict=True)):
            (_, H, B), n = self._sizes(axis), self.shape[axis]
            blocks = -(-n // B)
            place = factors[f"{name}_place"].long().repeat_interleave(H)
            rows = factors[name].new_zeros(self.components * blocks, B)
            rows = rows.index_add(0, index * blocks + place, factors[name])
            full.append(rows.view(self.components, blocks * B)[:, :n])
        return full[0].mT @ full[1]

    def matmul(self, x: Tensor, factors: Factors, algorithm: str = "") -> Tensor:
        """Two batches of dense products on slices of the input and the output, and sums of rows between them."""
        left, right = (factors[name].view(self._sizes(axis)) for axis, name in enumerate(AXES))
        inputs = (right, factors["right_place"], factors["right_rows"], factors["right_offsets"])
        outputs = (left, factors["left_place"], factors["left_index"])
        return tiled_gblr_matmul(x, inputs, outputs, self.M, algorithm)

    def _sizes(self, axis: int) -> tuple[int, int, int]:
        return self.tiles[axis], self.heights[axis], self.block_sizes[axis]

    def _components(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """The component of every row of ``left`` and of ``right``."""
        return factors["left_index"].long(), rows_to_components(factors["right_rows"], factors["right_offsets"])

    def _how_to_save(self) -> str:
        return "keep the GBLR layer, which has no padding"

    def _random_factors(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        factors: dict[str, Tensor] = {}
        for axis, name in enumerate(AXES):
            S, H, B = self._sizes(axis)
            blocks = -(-self.shape[axis] // B)
            factors[name] = torch.randn(S * H, B, generator=generator)
            factors[f"{name}_place"] = torch.arange(S) % blocks
        rows = [self.tiles[axis] * self.heights[axis] for axis in (0, 1)]
        factors["left_index"] = torch.arange(rows[0]) % max(self.components, 1)
        factors["right_rows"] = torch.arange(rows[1])
        factors["right_offsets"] = torch.arange(self.components) * rows[1] // max(self.components, 1)
        variance = self.to_dense(factors).square().mean().item()
        scaled = self.scaled(factors, (3 * self.N * variance) ** -0.5)
        return {name: scaled[name] for name in self.factor_specs()}


def tile(format: Gblr, factors: Factors, *, block_sizes: Sequence[int | None] = (None, None)) -> tuple[TiledGblr, Any]:
    """The same matrix in tiles, laid out for the cheapest product.

    Args:
        format: The GBLR format, with at least one component.
        factors: Its factors.
        block_sizes: Of the output and the input axis; None for the cheapest.

    Returns:
        The tiled format and its factors; ``format.num_parameters()`` of both tell the padding.

    Raises:
        TypeError: If the format is another.
        ValueError: If there is no component, or the factors do not fit the format.
    """
    if not isinstance(format, Gblr):
        raise TypeError(f"expected a Gblr format to tile, got {format}")
    format.check_factors(factors)
    if format.components == 0:
        raise ValueError("expected at least one component to tile, got a GBLR matrix without any")
    found = [
        tiling(factors["start"][axis], factors["width"][axis], format.shape[axis], block_sizes[axis]) for axis in (0, 1)
    ]
    tiled: dict[str, Tensor] = {}
    for name, one in zip(AXES, found, strict=True):
        tiled[name] = one.packed(factors[name]).flatten(0, 1)
    for name, one in zip(AXES, found, strict=True):
        tiled[f"{name}_place"] = one.blocks.to(torch.int32)
    outputs, inputs = found
    rows, offsets = inputs.bags(format.components)
    tiled["left_index"] = factors["order"].long()[outputs.index].flatten().to(torch.int32)
    tiled["right_rows"], tiled["right_offsets"] = rows.to(torch.int32), offsets.to(torch.int32)
    (So, Ho, Bo), (Si, Hi, Bi) = (tuple(one.entries.shape) for one in found)
    return TiledGblr(format.M, format.N, format.components, (So, Si), (Ho, Hi), (Bo, Bi)), tiled
