"""GBLR matrices in tiles: the same matrix, stored as it is multiplied, for inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.formats.base import Factors, FactorSpec, Format
from structmat.ops.tiled_gblr import ALGORITHMS, tiled_gblr_matmul
from structmat.ops.tiling import rows_to_components

AXES = ("left", "right")


@dataclass(frozen=True)
class TiledGblr(Format):
    """A GBLR matrix whose contents lie in dense tiles, zero where a segment ends within one; made by ``tile``.

    Each axis is cut into ``C`` blocks of ``B`` entries, and has a tile for each: its rows are what the components have
    there. Tiles of equal heights ``H`` form a group of ``S``. Factors: ``left (rows, B)`` and ``right (rows, B)``, the
    tiles one after the other, with the axes' own groups and blocks, and for each axis the buffer ``place (C,)``, the
    block of each tile, in order if there is one group. ``left_index (rows,)`` is the component of each row of ``left``;
    ``right_rows (rows,)`` the rows of ``right`` sorted by component, of which those of component ``k`` begin at
    ``right_offsets[k]``. A product is a batch of dense ones for each group, without packing. The padding counts as
    parameters and multiplications; it learns if the layer is trained.

    Attributes:
        M: The number of out features.
        N: The number of in features.
        components: ``K``.
        out_groups: ``S`` and ``H`` of each group of the output axis, one after the other.
        in_groups: ``S`` and ``H`` of each group of the input axis.
        block_sizes: ``B`` of the output and of the input axis.

    Raises:
        ValueError: If a number is not positive or too large, a block is longer than its axis, or there is not a tile
            for each block.
    """

    components: int
    out_groups: tuple[int, ...]
    in_groups: tuple[int, ...]
    block_sizes: tuple[int, int]

    name: ClassVar[str] = "tiled_gblr"
    label: ClassVar[str] = "tiled GBLR"
    must_save: ClassVar[bool] = False
    algorithms: ClassVar[tuple[str, ...]] = tuple(ALGORITHMS)
    scale_exponents: ClassVar[dict[str, float]] = {"left": 1 / 2, "right": 1 / 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.positive_int(self.components, "components", _checks.MOST_COMPONENTS)
        for field in ("out_groups", "in_groups", "block_sizes"):
            numbers = tuple(getattr(self, field))
            for number in numbers:
                _checks.positive_int(number, field)
            object.__setattr__(self, field, numbers)
        if len(self.block_sizes) != 2 or self.block_sizes[0] > self.M or self.block_sizes[1] > self.N:
            raise ValueError(f"expected two block_sizes of at most {self.shape} entries, got {self.block_sizes}")
        for groups, n, B in zip((self.out_groups, self.in_groups), self.shape, self.block_sizes, strict=True):
            if max(groups[1::2], default=0) > _checks.MOST_COMPONENTS:
                raise ValueError(f"expected tiles of at most {_checks.MOST_COMPONENTS} rows, got {groups}")
            if len(groups) % 2 or sum(groups[::2]) != -(-n // B):
                raise ValueError(
                    f"expected groups as numbers and heights of tiles, {-(-n // B)} tiles in all for blocks of {B} on "
                    f"an axis of {n}, got {groups}"
                )

    @property
    def rows(self) -> tuple[int, int]:
        """The number of rows of all tiles of the output and of the input axis."""
        out_rows, in_rows = (
            sum(S * H for S, H in zip(groups[::2], groups[1::2], strict=True))
            for groups in (self.out_groups, self.in_groups)
        )
        return out_rows, in_rows

    @property
    def tiles(self) -> tuple[int, int]:
        """The number ``C`` of tiles, or blocks, of the output and of the input axis."""
        return sum(self.out_groups[::2]), sum(self.in_groups[::2])

    def factor_specs(self) -> dict[str, FactorSpec]:
        """``left`` and ``right`` as tiles, and the indices that say where they belong."""
        specs = {name: FactorSpec((self.rows[axis], self.block_sizes[axis])) for axis, name in enumerate(AXES)}
        lengths = {
            "left_place": self.tiles[0],
            "left_index": self.rows[0],
            "right_place": self.tiles[1],
            "right_rows": self.rows[1],
            "right_offsets": self.components,
        }
        return specs | {name: FactorSpec((n,), trainable=False, dtype=torch.int32) for name, n in lengths.items()}

    def check_factors(self, factors: Factors) -> None:
        """Check names and shapes, that each block has one tile, and that every row belongs to a component.

        Args:
            factors: The factors to check.

        Raises:
            ValueError: If they do not fit.
        """
        super().check_factors(factors)
        for name, groups in zip(AXES, (self.out_groups, self.in_groups), strict=True):
            place = factors[f"{name}_place"]
            found = [] if place.is_meta else place.tolist()
            expected = list(range(len(found)))
            if (found if len(groups) == 2 else sorted(found)) != expected:
                order = " in order" if len(groups) == 2 else ""
                raise ValueError(f"expected {name}_place to hold each of 0 … {len(found) - 1} once{order}, got {found}")
        if not any(factors[name].is_meta for name in ("left_index", "right_rows", "right_offsets")):
            self._check_rows(factors)

    def _check_rows(self, factors: Factors) -> None:
        """Check the indices that say which component each row of a tile belongs to."""
        index, rows, offsets = (factors[name].long().cpu() for name in ("left_index", "right_rows", "right_offsets"))
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.components:
            raise ValueError(f"expected left_index from 0 to {self.components - 1} in {self}, got others")
        if not torch.equal(rows.sort().values, torch.arange(len(rows))):
            raise ValueError(f"expected right_rows of {self} to hold each of 0 … {len(rows) - 1} once")
        ascending = bool((offsets.diff() >= 0).all())
        if len(offsets) and not (int(offsets[0]) == 0 and ascending and int(offsets[-1]) <= len(rows)):
            raise ValueError(f"expected right_offsets of {self} to ascend from 0 to {len(rows)} at most")

    def to_dense(self, factors: Factors) -> Tensor:
        """The sum of the components, each put together from its rows of tiles."""
        full = []
        for axis, (name, index) in enumerate(zip(AXES, self._components(factors), strict=True)):
            B, blocks, n = self.block_sizes[axis], self.tiles[axis], self.shape[axis]
            heights = torch.tensor(self._heights(axis), device=factors[name].device)
            place = factors[f"{name}_place"].long().repeat_interleave(heights, output_size=self.rows[axis])
            rows = factors[name].new_zeros(self.components * blocks, B)
            rows = rows.index_add(0, index * blocks + place, factors[name])
            full.append(rows.view(self.components, blocks * B)[:, :n])
        return full[0].mT @ full[1]

    def matmul(self, x: Tensor, factors: Factors, algorithm: str = "") -> Tensor:
        """Batches of dense products on slices of the input and the output, and sums of rows between them."""
        right, place = factors["right"], factors["right_place"]
        inputs = right, self.in_groups, place, factors["right_rows"], factors["right_offsets"]
        outputs = factors["left"], self.out_groups, factors["left_place"], factors["left_index"]
        return tiled_gblr_matmul(x, inputs, outputs, self.M, algorithm)

    def _heights(self, axis: int) -> list[int]:
        """The height of each tile."""
        groups = (self.out_groups, self.in_groups)[axis]
        return [H for S, H in zip(groups[::2], groups[1::2], strict=True) for _ in range(S)]

    def _components(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """The component of every row of ``left`` and of ``right``."""
        return factors["left_index"].long(), rows_to_components(factors["right_rows"], factors["right_offsets"])

    def _how_to_save(self) -> str:
        return "keep the GBLR layer, which has no padding"

    def _random_factors(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        factors: dict[str, Tensor] = {}
        for axis, name in enumerate(AXES):
            factors[name] = torch.randn(self.rows[axis], self.block_sizes[axis], generator=generator)
            factors[f"{name}_place"] = torch.arange(self.tiles[axis])
        factors["left_index"] = torch.arange(self.rows[0]) % self.components
        factors["right_rows"] = torch.arange(self.rows[1])
        factors["right_offsets"] = torch.arange(self.components) * self.rows[1] // self.components
        variance = self.to_dense(factors).square().mean().item()
        scaled = self.scaled(factors, (3 * self.N * variance) ** -0.5)
        return {name: scaled[name] for name in self.factor_specs()}
