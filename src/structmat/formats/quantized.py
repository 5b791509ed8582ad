"""Another structure with its factors in integers: a quarter or an eighth of the bytes of float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat import _checks
from structmat.formats.base import Factors, FactorSpec, Format
from structmat.formats.blast import Blast
from structmat.formats.dense import Dense
from structmat.formats.low_rank import LowRank
from structmat.formats.registry import format_from_json

BITS = (4, 8)
"""The numbers of bits of the integers."""

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""The shares of the largest entry of a group that the largest integer may stand for; the best one is taken."""


@dataclass(frozen=True)
class Quantized(Format):
    """A structured matrix whose factors are integers with one scale for each group of a row; made by ``quantize_``.

    Each factor ``f`` of the other format that holds a basis becomes ``f_scale`` in the dtype of the layer and
    ``f_integers``, int8, or two numbers of 4 bits in each byte. The one that meets the inputs, where there is one, also
    has ``f_columns``, a scale for each input, since the weights of a quiet input may be far larger than others. A
    product makes the factors in floating point first. The layer cannot be trained.

    Attributes:
        M: The number of out features.
        N: The number of in features.
        base: The format whose factors are quantised; its JSON form is taken too.
        bits: 8 or 4.
        group: The number of entries of a row with one scale; 0 for whole rows.

    Raises:
        ValueError: If the other format has another shape, still learns its structure or is quantised already, or a
            number is not one of those above.
    """

    base: Format
    bits: int = 8
    group: int = 0

    name: ClassVar[str] = "quantized"
    label: ClassVar[str] = "integers"
    scale_exponents: ClassVar[dict[str, float]] = {}
    must_save: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.base, Mapping):
            object.__setattr__(self, "base", format_from_json(self.base))
        _checks.one_of(self.bits, BITS, "bits")
        _checks.typed(self.group, int, "group")
        if self.group < 0:
            raise ValueError(f"expected group of at least 0, got {self.group}")
        if not isinstance(self.base, Format) or self.base.shape != self.shape:
            raise ValueError(f"expected a base of shape {self.shape}, got {self.base}")
        if self.base.learns or isinstance(self.base, Quantized):
            remedy = "harden_ the network first" if self.base.learns else "it is quantised already"
            raise ValueError(f"expected a base with final factors in floating point, got {self.base}; {remedy}")

    @property
    def kind(self) -> str:
        """The kind of the other format, and the integers."""
        return f"{self.base.kind} in int{self.bits}"

    @property
    def rounded_factors(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the factors that are integers here, by their names in the other format.

        Coefficients (``no_decay``), such as the couplings of BLAST, become bfloat16: they are few, and components that
        cancel each other make the matrix depend on them most.
        """
        specs = {name: spec for name, spec in self.base.factor_specs().items() if name not in self.base.no_decay}
        learned = {name: spec.shape for name, spec in specs.items() if spec.trainable and spec.dtype is None}
        return {name: shape for name, shape in learned.items() if 0 not in shape}

    @property
    def input_factor(self) -> str | None:
        """The name of the factor whose columns are inputs, for the formats in which there is just one."""
        name = "weight" if isinstance(self.base, Dense) else "right"
        return name if isinstance(self.base, (Dense, LowRank, Blast)) and name in self.rounded_factors else None

    def over_inputs(self, factor: Tensor, columns: Tensor) -> Tensor:
        """Multiply the columns of the input factor.

        Args:
            factor: The factor, ``(J R, Q)`` for ``N = J Q`` inputs.
            columns: A number for each input, ``(N,)``.

        Returns:
            The factor in its shape.
        """
        width = factor.shape[-1]
        parts = factor.reshape(self.N // width, -1, width) * columns.view(-1, 1, width)
        return parts.reshape(factor.shape)

    def columns_of(self, matrix: Tensor, energies: Tensor | None = None) -> Tensor:
        """The scales of inputs with which the rows of the input factor lose least.

        With the sizes ``w`` of columns and the energies ``c`` of inputs the product of a row's step and of what it does
        to the output is least for ``s^4 = w^2 / c``; without data, inputs with large weights are taken to be quiet.

        Args:
            matrix: The matrix ``(M, N)``.
            energies: The second moment of each input, ``(N,)``; None where it is not known.

        Returns:
            ``(N,)``, float64; 1 where a column is 0.
        """
        sizes = matrix.double().square().mean(0)  # w^2
        wanted = sizes.sqrt() if energies is None else (sizes / energies.double()).pow(0.25)
        alive = torch.isfinite(wanted) & (wanted > 0)
        typical = wanted.where(alive, 1).log().sum() / alive.sum().clamp_min(1)
        return (wanted / typical.exp()).where(alive, 1).clamp(1e-4, 1e4)

    def groups(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The number of groups of a row of a factor, and their length; the last one is padded.

        Args:
            shape: The shape of the factor.

        Returns:
            The number and the length.
        """
        length = min(self.group or shape[-1], shape[-1])
        length += length % 2 if self.bits == 4 else 0
        return -(-shape[-1] // length), length

    def factor_specs(self) -> dict[str, FactorSpec]:
        """The scales and integers of each factor, and the factors that stay."""
        specs: dict[str, FactorSpec] = {}
        for name, shape in self.rounded_factors.items():
            count, length = self.groups(shape)
            per_byte = 8 // self.bits
            kind = torch.int8 if self.bits == 8 else torch.uint8
            width = shape[-1] if self.bits == 8 else count * length // per_byte
            specs[f"{name}_scale"] = FactorSpec((*shape[:-1], count), trainable=False)
            specs[f"{name}_integers"] = FactorSpec((*shape[:-1], width), trainable=False, dtype=kind)
        if self.input_factor is not None:
            specs[f"{self.input_factor}_columns"] = FactorSpec((self.N,), trainable=False)
        kept = {n: s for n, s in self.base.factor_specs().items() if n not in self.rounded_factors}
        return specs | {name: FactorSpec(spec.shape, False, self._stays(name, spec)) for name, spec in kept.items()}

    def _stays(self, name: str, spec: FactorSpec) -> torch.dtype | None:
        """The dtype of a factor that is not rounded to integers."""
        return torch.bfloat16 if name in self.base.no_decay and spec.trainable and spec.dtype is None else spec.dtype

    def rounded(self, factors: Factors) -> dict[str, Tensor]:
        """Round factors to integers.

        Args:
            factors: The factors of the other format; the scales get their dtype.

        Returns:
            The factors of this one.
        """
        found: dict[str, Tensor] = {}
        for name, shape in self.rounded_factors.items():
            count, length = self.groups(shape)
            values = factors[name].float()
            if name == self.input_factor:
                columns = self.columns_of(self.base.to_dense(factors)).to(factors[name].dtype)
                found[f"{name}_columns"] = columns
                values = self.over_inputs(values, columns.float().reciprocal())
            grouped = nn.functional.pad(values, (0, count * length - shape[-1]))
            scale, integers = round_group(grouped.unflatten(-1, (count, length)), self.bits, factors[name].dtype)
            found |= self.stored(name, scale, integers.flatten(-2))
        specs = self.factor_specs()
        kept = {name: factor for name, factor in factors.items() if name not in self.rounded_factors}
        return found | {name: factor.to(specs[name].dtype or factor.dtype) for name, factor in kept.items()}

    def stored(self, name: str, scale: Tensor, integers: Tensor) -> dict[str, Tensor]:
        """The factors of this format that hold one factor of the other.

        Args:
            name: The name of the factor in the other format.
            scale: The scale of each group.
            integers: The integers, int8, of padded rows; leading dimensions may be split.

        Returns:
            Scale and integers in their layout here.
        """
        shape = self.rounded_factors[name]
        integers = integers.reshape(*shape[:-1], -1)
        integers = integers[..., : shape[-1]].contiguous() if self.bits == 8 else _packed(integers)
        return {f"{name}_scale": scale.reshape(*shape[:-1], -1), f"{name}_integers": integers}

    def opened(self, factors: Factors) -> dict[str, Tensor]:
        """The factors of the other format in floating point, in the dtype of the scales."""
        found = {name: self.open_factor(name, factors) for name in self.rounded_factors}
        dtype = next((one.dtype for one in found.values()), None)
        specs = self.base.factor_specs()
        kept = {name: factors[name] for name in specs if name not in found}
        return found | {name: factor.to(specs[name].dtype or dtype) for name, factor in kept.items()}

    def open_factor(self, name: str, factors: Factors) -> Tensor:
        """One factor of the other format in floating point.

        Args:
            name: Its name there.
            factors: The factors of this format, of which its scales and integers are used, and scales of inputs if
                they are there.

        Returns:
            The factor, in the dtype of the scales.
        """
        shape = self.rounded_factors[name]
        scale, integers = factors[f"{name}_scale"], factors[f"{name}_integers"]
        count, length = self.groups(shape)
        values = (integers if self.bits == 8 else _unpacked(integers)).to(scale.dtype)
        if count > 1:
            values = nn.functional.pad(values, (0, count * length - values.shape[-1]))
            values = (values.unflatten(-1, (count, length)) * scale.unsqueeze(-1)).flatten(-2)
        else:
            values = values * scale
        values = values[..., : shape[-1]]
        columns = factors.get(f"{name}_columns")
        return values.contiguous() if columns is None else self.over_inputs(values, columns)

    def part(self, factors: Factors, axis: int, index: int, count: int) -> tuple[Format, dict[str, Tensor]]:
        """The same integers; in floating point where the part is not made of entries, or bytes would have to be cut."""
        base, cut = self.base.part(self.base.init(device="meta"), axis, index, count)
        widths = [cut[n].shape[-1] for n, s in self.rounded_factors.items() if n in cut and cut[n].shape[-1] < s[-1]]
        group = math.gcd(self.group, *widths) if self.group else 0
        if type(base) is not type(self.base) or (self.bits == 4 and group % 2):
            return self.base.part(self.opened(factors), axis, index, count)
        kept = {name: factors[name] for name in self.base.factor_specs() if name not in self.rounded_factors}
        entries = {name: self._entries(name, factors) for name in self.rounded_factors}
        base, integers = self.base.part({n: e[0] for n, e in entries.items()} | kept, axis, index, count)
        _, scales = self.base.part({n: e[1] for n, e in entries.items()} | kept, axis, index, count)
        format = Quantized(*base.shape, base, self.bits, group)
        found = {name: factor for name, factor in integers.items() if name in kept}
        for name, shape in format.rounded_factors.items():
            groups, length = format.groups(shape)
            grouped, values = (F.pad(one[name], (0, groups * length - shape[-1])) for one in (scales, integers))
            found |= format.stored(name, grouped.unflatten(-1, (groups, length))[..., 0], values)
        if format.input_factor is not None:
            columns = factors[f"{format.input_factor}_columns"]
            found[f"{format.input_factor}_columns"] = columns.chunk(count)[index] if axis else columns
        return format, found

    def _entries(self, name: str, factors: Factors) -> tuple[Tensor, Tensor]:
        """The integer and the scale of each entry of a factor of the other format."""
        shape = self.rounded_factors[name]
        stored, scale = factors[f"{name}_integers"], factors[f"{name}_scale"]
        integers = (stored if self.bits == 8 else _unpacked(stored))[..., : shape[-1]]
        return integers, scale.repeat_interleave(self.groups(shape)[1], -1)[..., : shape[-1]]

    def to_dense(self, factors: Factors) -> Tensor:
        """The matrix of the rounded factors."""
        return self.base.to_dense(self.opened(factors))

    def matmul(self, x: Tensor, factors: Factors, algorithm: str = "") -> Tensor:
        """The product of the other format, once its factors are in floating point."""
        return self.base.matmul(x, self.opened(factors), algorithm)

    def unrolled(self, factors: Factors, sums: bool = True) -> nn.Module | None:
        """The form of the other format, in floating point."""
        return self.base.unrolled(self.opened(factors), sums)

    def num_parameters(self, factors: Factors | None = None) -> int:
        """The number of entries of the factors of the other format."""
        return self.base.num_parameters(None if factors is None else self.opened(factors))

    def multiplications(self, tokens: int = 1, factors: Factors | None = None) -> int:
        """The multiplications of the other format."""
        return self.base.multiplications(tokens, None if factors is None else self.opened(factors))

    def scaled(self, factors: Factors, scale: float | Tensor) -> dict[str, Tensor]:
        """Factors of ``scale * W``: the scales take all of it."""
        rounded, coefficients = self.rounded_factors, self.base.no_decay
        exponents = {f"{n}_scale" if n in rounded else n: power for n, power in self.base.scale_exponents.items()}
        first = next((name for name in exponents if name.endswith("_scale")), None)
        if first is not None:  # what coefficients would take goes there: they have few digits
            exponents[first] += sum(exponents.pop(name) for name in coefficients if name in exponents)
        if not isinstance(scale, Tensor):
            return {n: f * scale ** exponents[n] if n in exponents else f for n, f in factors.items()}
        axes = {name: len(spec.shape) for name, spec in self.factor_specs().items()}
        return {
            n: f * scale.pow(exponents[n]).reshape(*scale.shape, *[1] * axes[n]) if n in exponents else f
            for n, f in factors.items()
        }

    def _random_factors(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        return self.rounded(self.base._random_factors(generator))

    def settings(self) -> str:
        """The bits, and what is quantised."""
        return f"int{self.bits}, {self.base.label} {self.base.settings()}".rstrip()

    def to_json(self) -> dict[str, Any]:
        """The format as JSON-compatible data, with the other format under ``"base"``."""
        return {
            "format": self.name,
            "M": self.M,
            "N": self.N,
            "base": self.base.to_json(),
            "bits": self.bits,
            "group": self.group,
        }


def round_group(values: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round groups of numbers to integers, with the best clip of each group.

    Args:
        values: Groups ``(..., length)``, float32.
        bits: 8 or 4.
        dtype: The dtype of the scales.

    Returns:
        The scales ``(...)`` and the integers ``(..., length)``, int8.
    """
    most = 2 ** (bits - 1) - 1
    largest = values.abs().amax(-1)
    best = torch.full_like(largest, torch.inf)
    scales, integers = torch.ones_like(largest).to(dtype), torch.zeros_like(values)
    for clip in CLIPS:
        scale = torch.where(largest > 0, largest * clip / most, 1.0).to(dtype)  # what is stored is what is used
        wide = scale.float().clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
        rounded = (values / wide).round().clamp(-most, most)
        error = (rounded * wide - values).square().sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
        integers = torch.where(better.unsqueeze(-1), rounded, integers)
    return scales, integers.to(torch.int8)


def _packed(integers: Tensor) -> Tensor:
    """Two numbers from -8 to 7 in each byte, the first one in the lower half."""
    low, high = (integers[..., k::2] + 8 for k in (0, 1))
    return low.to(torch.uint8) | (high.to(torch.uint8) << 4)


def _unpacked(packed: Tensor) -> Tensor:
    """The numbers of ``_packed``."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(torch.int8) - 8
