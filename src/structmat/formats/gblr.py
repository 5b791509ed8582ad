"""GBLR matrices: sums of rank-1 blocks, stored and multiplied inside their segments alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.formats.base import Factors, FactorSpec, Format
from structmat.formats.tiled_gblr import AXES, TiledGblr
from structmat.ops import gblr_matmul
from structmat.ops.tiling import in_full_length, positions, tiling


@dataclass(frozen=True)
class Gblr(Format):
    """``K`` rank-1 blocks at integer segments (Gaudi-GBLR: Lee & Kim 2024, arXiv 2310.18882, section 2).

    ``W = sum_k left_k right_order[k]^T``, where ``left_k`` is zero but for the segment of the output that begins at
    ``start[0, k]`` and has ``width[0, k]`` entries, and ``right_k`` but for the one of the input in row 1. Segments may
    run over an axis' end to its beginning. The contents are flat: ``left`` holds those of the segments one after the
    other, and so does ``right``, each in its own order of the components.

    Attributes:
        M: The number of out features.
        N: The number of in features.
        components: ``K``.
        entries: The sums of the widths on the output and on the input axis, the lengths of ``left`` and ``right``.

    Raises:
        ValueError: If the components do not fit the entries, each having between one and all of an axis.
    """

    components: int
    entries: tuple[int, int]

    name: ClassVar[str] = "gblr"
    made_from: ClassVar[str] = "gaudi_gblr"
    label: ClassVar[str] = "GBLR"
    drawn_by: ClassVar[tuple[str, ...]] = ("start", "width", "order")
    scale_exponents: ClassVar[dict[str, float]] = {"left": 1 / 2, "right": 1 / 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.natural_int(self.components, "components", _checks.MOST_COMPONENTS)
        entries = tuple(self.entries)
        object.__setattr__(self, "entries", entries)
        if len(entries) != 2:
            raise ValueError(f"expected entries on the output and the input axis, got {entries}")
        for count, n, axis in zip(entries, self.shape, ("output", "input"), strict=True):
            _checks.natural_int(count, f"entries of the {axis} axis")
            if not self.components <= count <= self.components * n:
                raise ValueError(
                    f"expected between 1 and {n} entries of the {axis} axis for each of {self.components} components, "
                    f"got {count} in all"
                )

    @classmethod
    def for_budget(cls, M: int, N: int, *, keep: float, components: int | None = None) -> Gblr:
        """Components of equal segments with at most ``keep M N`` entries in all.

        Args:
            M: The number of out features.
            N: The number of in features.
            keep: The share of the dense parameters, in ``(0, 1]``.
            components: ``K``; None for ``min(M, N)``, or fewer where each would have less than one entry on each axis.

        Returns:
            The format.

        Raises:
            ValueError: If the budget gives the components less than one entry on each axis.
        """
        budget = _checks.budget(keep, M * N)
        K = min(M, N, max(1, budget // 2)) if components is None else components
        _checks.positive_int(K, "components")
        if budget < 2 * K:
            needed = _checks.rounded_up(2 * K / (M * N))
            raise ValueError(
                f"expected a keep of at least {needed} for {K} components on a {M} x {N} matrix, got {keep}; raise "
                "keep or take fewer components"
            )
        out_entries = min(K * M, max(K, round(budget * M / (M + N))))
        return cls(M, N, K, (out_entries, min(K * N, budget - out_entries)))

    def factor_specs(self) -> dict[str, FactorSpec]:
        """``left`` and ``right`` flat, ``start`` and ``width`` ``(2, K)`` and ``order (K,)``, buffers of int32."""
        K = self.components
        return {
            "left": FactorSpec((self.entries[0],)),
            "right": FactorSpec((self.entries[1],)),
            "start": FactorSpec((2, K), trainable=False, dtype=torch.int32),
            "width": FactorSpec((2, K), trainable=False, dtype=torch.int32),
            "order": FactorSpec((K,), trainable=False, dtype=torch.int32),
        }

    def check_factors(self, factors: Factors) -> None:
        """Check names and shapes, and that the segments are segments of the axes and sum to ``entries``.

        Args:
            factors: The factors to check.

        Raises:
            ValueError: If they do not fit.
        """
        super().check_factors(factors)
        if any(factors[name].is_meta for name in ("start", "width", "order")):
            return
        start, width, order = (factors[name].long().cpu() for name in ("start", "width", "order"))
        for axis, n in enumerate(self.shape):
            if int(width[axis].sum()) != self.entries[axis] or bool(((width[axis] < 1) | (width[axis] > n)).any()):
                raise ValueError(
                    f"expected widths from 1 to {n} that sum to {self.entries[axis]} on axis {axis} of {self}, "
                    f"got {width[axis].tolist()[:8]}… of sum {int(width[axis].sum())}"
                )
            if bool(((start[axis] < 0) | (start[axis] >= n)).any()):
                raise ValueError(
                    f"expected starts from 0 to {n - 1} on axis {axis} of {self}, got {start[axis].tolist()}"
                )
        if order.sort().values.tolist() != list(range(self.components)):
            raise ValueError(f"expected order to hold each of 0 … {self.components - 1} once, got {order.tolist()}")

    def axes(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """The contents in full length, ``(M, K)`` and ``(K, N)``, zero outside the segments, ordered as ``left``."""
        start, width = factors["start"], factors["width"]
        left = in_full_length(factors["left"], start[0], width[0], self.M)
        right = in_full_length(factors["right"], start[1], width[1], self.N)
        return left.mT, right[factors["order"].long()]

    def to_dense(self, factors: Factors) -> Tensor:
        """The sum of the components."""
        left, right = self.axes(factors)
        return left @ right

    def matmul(self, x: Tensor, factors: Factors, algorithm: str = "") -> Tensor:
        """A few dense products on contiguous slices of the input and the output."""
        return gblr_matmul(x, **factors, M=self.M)

    def overlap(self, factors: Factors) -> Tensor:
        """The product of the segments' indicators."""
        ones = {name: torch.ones_like(factors[name].detach(), dtype=torch.float32) for name in ("left", "right")}
        return self.to_dense({**factors, **ones})

    def for_inference(self, factors: Factors) -> tuple[TiledGblr, dict[str, Tensor]] | None:
        """The matrix in tiles, as ``tile`` lays it out; None for one without components."""
        return tile(self, factors) if self.components else None

    def _how_to_save(self) -> str:
        return "take fewer or smaller segments, or leave this layer dense"

    def _random_factors(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        K = self.components
        widths = torch.stack([even(count, K) for count in self.entries])
        starts = [torch.randint(n, (K,), generator=generator) for n in self.shape]
        left = torch.randn(self.entries[0], generator=generator)
        right = torch.randn(self.entries[1], generator=generator)
        return {
            "left": left / (3 * max(self.entries[0], 1) / self.M) ** 0.5,
            "right": right / widths[1].double().repeat_interleave(widths[1]).sqrt().float(),
            "start": torch.stack(starts),
            "width": widths,
            "order": torch.arange(K),
        }


def from_segments(
    shape: tuple[int, int], left: Tensor, right: Tensor, start: Tensor, width: Tensor
) -> tuple[Gblr, dict[str, Any]]:
    """Crop full-length contents to segments; components without a block are left out.

    Args:
        shape: ``(M, N)``.
        left: ``(M, K)``.
        right: ``(K, N)``.
        start: ``(2, K)``, whole numbers.
        width: ``(2, K)``, whole numbers.

    Returns:
        The format and its factors.
    """
    alive = (width > 0).all(0)
    start, width = start[:, alive], width[:, alive]
    contents = (left.mT[alive], right[alive])
    K = int(alive.sum())
    flat = []
    for axis, content in enumerate(contents):
        rows, columns = positions(start[axis], width[axis], shape[axis], int(width[axis].sum()))
        flat.append(content[rows, columns])
    format = Gblr(*shape, K, (len(flat[0]), len(flat[1])))
    order = torch.arange(K, dtype=torch.int32, device=start.device)
    return format, {
        "left": flat[0],
        "right": flat[1],
        "start": start.to(torch.int32),
        "width": width.to(torch.int32),
        "order": order,
    }


def tile(
    format: Gblr, factors: Factors, *, block_sizes: Sequence[int | None] = (None, None)
) -> tuple[TiledGblr, dict[str, Tensor]]:
    """The same matrix in tiles, laid out for the cheapest product.

    Args:
        format: The GBLR format, with at least one component.
        factors: The factors of the format.
        block_sizes: The sizes of the blocks of the output and the input axis; None for the cheapest.

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
        tiled[name] = one.packed(factors[name])
        tiled[f"{name}_place"] = one.blocks.to(torch.int32)
    outputs, inputs = found
    rows, offsets = inputs.bags(format.components)
    tiled["left_index"] = factors["order"].long()[outputs.index].to(torch.int32)
    tiled["right_rows"], tiled["right_offsets"] = rows.to(torch.int32), offsets.to(torch.int32)
    result = TiledGblr(
        format.M, format.N, format.components, outputs.groups, inputs.groups, (outputs.block, inputs.block)
    )
    return result, {name: tiled[name] for name in result.factor_specs()}


def even(total: int, count: int) -> Tensor:
    """``count`` whole numbers, as equal as can be, that sum to ``total``."""
    whole, rest = divmod(total, max(count, 1))
    edges = torch.arange(count + 1) * rest // max(count, 1)
    return whole + edges.diff()
