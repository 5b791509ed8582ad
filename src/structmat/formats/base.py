"""The format: shape and hyperparameters of one structured matrix, and pure functions over its factors."""

from __future__ import annotations

import abc
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from structmat import _checks

Factors = Mapping[str, Tensor]
"""The tensors of one structured matrix by name: what a layer registers and what a state dict holds."""


@dataclass(frozen=True)
class FactorSpec:
    """The shape and kind of one factor.

    Attributes:
        shape: The shape of the factor.
        trainable: Whether the factor is a parameter; otherwise it is a persistent buffer.
        dtype: The dtype of the factor; None for that of the layer.
    """

    shape: tuple[int, ...]
    trainable: bool = True
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Format(abc.ABC):
    """Shape and hyperparameters of one structured matrix ``W (M, N)``; holds no tensors.

    A new format needs a ``name``, ``factor_specs``, ``to_dense`` and ``scale_exponents``, and for budgets
    ``for_budget``; the dense matrix is the definition, and everything else has a default through it that a format
    overrides for speed. The class attributes are facts: the rest of the library acts on them and knows no format.

    Attributes:
        M: The number of out features.
        N: The number of in features.
        name: The format's name in JSON and on the command line.
        for_budget: The class method ``for_budget(M, N, *, keep, …)``: the largest member of the format with at most
            ``keep M N`` parameters. Its other arguments become options of the command line.
        scale_exponents: The shares of the factors in a change of scale: ``s W`` has the factors
            ``s ** exponent * factor``; factors that have no exponent do not take part.
        takes_blocks: Whether ``for_budget`` takes block counts; this follows from its arguments.
        algorithms: The names of the ways in which ``matmul`` can compute, beside the automatic one.
        must_save: Whether a plan refuses the format where it has as many parameters as the dense matrix or more.
        label: The name of the format in tables and pictures.
        replaces: Whether a plan replaces a layer of this format; false for the dense format alone.
        no_decay: The names of factors of two or more dimensions that weight decay leaves alone, since they hold
            coefficients rather than a basis.
        component_axes: The axis of each factor along which its components lie, by name, for formats that are a sum of
            components; ``training.balance_`` gives every component one size in all of these factors. A factor that
            holds several blocks has the components of each, one block after the other.
        component_size: The measure of that size, ``"norm"`` or ``"root mean square"``.
        made_from: The name of the format that a user chooses in place of this one, which is made from it; empty where
            this one can be chosen.
        learns: Whether training changes the structure, so that ``hardened`` gives another format in the end.
        counted_by: The names of the factors without which ``num_parameters`` is not known.
        drawn_by: The names of the factors that ``overlap`` and ``couplings`` need; empty where there is no picture.
        has_overlap: Whether the format has a picture of its segments; true where it overrides ``overlap``.
        has_couplings: Whether the format has a picture of its couplings; true where it overrides ``couplings``.
        has_inference_layout: Whether the format has a faster layout for inference; true where it overrides
            ``for_inference``.
    """

    M: int
    N: int

    name: ClassVar[str]
    for_budget: ClassVar[Callable[..., Format]]
    scale_exponents: ClassVar[dict[str, float]]
    takes_blocks: ClassVar[bool] = False
    algorithms: ClassVar[tuple[str, ...]] = ()
    must_save: ClassVar[bool] = True
    label: ClassVar[str] = ""
    replaces: ClassVar[bool] = True
    no_decay: ClassVar[tuple[str, ...]] = ()
    component_axes: ClassVar[dict[str, int]] = {}
    component_size: ClassVar[Literal["norm", "root mean square"]] = "norm"
    made_from: ClassVar[str] = ""
    learns: ClassVar[bool] = False
    counted_by: ClassVar[tuple[str, ...]] = ()
    drawn_by: ClassVar[tuple[str, ...]] = ()
    has_overlap: ClassVar[bool] = False
    has_couplings: ClassVar[bool] = False
    has_inference_layout: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "label" not in vars(cls):
            cls.label = getattr(cls, "name", cls.__name__)
        cls.takes_blocks = "blocks" in cls.budget_options()
        cls.has_overlap = cls.overlap is not Format.overlap
        cls.has_couplings = cls.couplings is not Format.couplings
        cls.has_inference_layout = cls.for_inference is not Format.for_inference

    def __post_init__(self) -> None:
        _checks.positive_int(self.M, "M (out features)")
        _checks.positive_int(self.N, "N (in features)")

    @abc.abstractmethod
    def factor_specs(self) -> dict[str, FactorSpec]:
        """Name, shape, kind and dtype of every factor."""

    @abc.abstractmethod
    def to_dense(self, factors: Factors) -> Tensor:
        """The matrix ``W (M, N)`` that the factors stand for: the definition of the format."""

    def matmul(self, x: Tensor, factors: Factors, algorithm: str = "") -> Tensor:
        """Compute ``x @ W.T``.

        Args:
            x: Input ``(..., N)``, any number of leading dimensions.
            factors: The factors.
            algorithm: One of ``algorithms``; empty for the one that suits the tokens, the dtype and the device.
                Formats with one way alone take no notice.

        Returns:
            Output ``(..., M)``.
        """
        return x @ self.to_dense(factors).mT

    def num_parameters(self, factors: Factors | None = None) -> int:
        """The number of entries of the trainable factors.

        Args:
            factors: The factors, which only formats whose size is learned need.

        Returns:
            The count.
        """
        return sum(math.prod(spec.shape) for spec in self.factor_specs().values() if spec.trainable)

    def multiplications(self, tokens: int = 1, factors: Factors | None = None) -> int:
        """The number of scalar multiplications of ``matmul``; a FLOP count is twice that.

        Args:
            tokens: The number of input vectors.
            factors: The factors, which only formats whose size is learned need.

        Returns:
            The count.
        """
        through_dense = type(self).matmul is Format.matmul
        return tokens * (self.M * self.N if through_dense else self.num_parameters(factors))

    @property
    def shape(self) -> tuple[int, int]:
        """``(M, N)``."""
        return self.M, self.N

    @property
    def keep(self) -> float:
        """The share of the dense matrix' parameters that this format has."""
        return self.num_parameters() / (self.M * self.N)

    def init(
        self,
        *,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Random factors whose matrix has the entry variance ``1 / (3 N)`` of a fresh ``nn.Linear``.

        Args:
            generator: The source of randomness, on the CPU; None for PyTorch's global one.
            dtype: The dtype of the factors; None for PyTorch's default.
            device: The device of the factors; on ``"meta"`` nothing is drawn.

        Returns:
            One tensor for every entry of ``factor_specs``.
        """
        dtype = dtype or torch.get_default_dtype()
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type == "meta":
            specs = self.factor_specs().items()
            return {name: torch.empty(spec.shape, dtype=spec.dtype or dtype, device=device) for name, spec in specs}
        with torch.device("cpu"):  # where the generator is
            factors = self._random_factors(generator)
        specs = self.factor_specs()
        return {name: factor.to(device, specs[name].dtype or dtype) for name, factor in factors.items()}

    def _random_factors(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        factors = {n: torch.randn(spec.shape, generator=generator) for n, spec in self.factor_specs().items()}
        variance = self.to_dense(factors).square().mean().item()
        return self.scaled(factors, 1 / math.sqrt(3 * self.N * variance))

    def scaled(self, factors: Factors, scale: float | Tensor) -> dict[str, Tensor]:
        """Factors of ``scale * W``.

        Args:
            factors: Factors of ``W``, possibly with leading batch dimensions.
            scale: A non-negative number, or one for each entry of the batch.

        Returns:
            New factors; ``factors`` itself is left alone.
        """
        exponents = self.scale_exponents
        if not isinstance(scale, Tensor):
            return {n: f * scale ** exponents[n] if n in exponents else f for n, f in factors.items()}
        specs = self.factor_specs()
        return {
            n: f * scale.pow(exponents[n]).reshape(*scale.shape, *[1] * len(specs[n].shape)) if n in exponents else f
            for n, f in factors.items()
        }

    def check_factors(self, factors: Factors) -> None:
        """Check that names and shapes are those of ``factor_specs``.

        Args:
            factors: The factors to check.

        Raises:
            ValueError: If a factor is missing, is extra, or has another shape.
        """
        got = {name: tuple(factor.shape) for name, factor in factors.items()}
        expected = {name: spec.shape for name, spec in self.factor_specs().items()}
        _checks.same_shapes(got, expected, f"the set of factors of {self}")

    def check_saves(self) -> None:
        """Check that the format has fewer parameters than the dense matrix.

        Raises:
            ValueError: If it does not, naming the break-even rank where the format has a rank.
        """
        if self.must_save and self.num_parameters() >= self.M * self.N:
            raise ValueError(
                f"expected fewer parameters than the dense {self.M} x {self.N} = {self.M * self.N}, "
                f"got {self.num_parameters()} from {self}; {self._how_to_save()}"
            )

    def _how_to_save(self) -> str:
        return "use a smaller member of the format, or leave this layer dense"

    @classmethod
    def budget_options(cls) -> dict[str, inspect.Parameter]:
        """The arguments of ``for_budget`` beside the shape and ``keep``, by name."""
        if not hasattr(cls, "for_budget"):
            return {}
        parameters = inspect.signature(cls.for_budget).parameters.items()
        fixed = ("M", "N", "keep")
        return {n: p for n, p in parameters if n not in fixed and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}

    def overlap(self, factors: Factors) -> Tensor:
        """Count the components over each entry, ``(M, N)`` in float32, for formats whose components have segments.

        Args:
            factors: The factors.

        Raises:
            TypeError: If the format has no segments.
        """
        raise TypeError(f"expected a format with segments, such as Gblr or GaudiGblr, got {self}")

    def couplings(self, factors: Factors) -> Tensor:
        """Measure how much each block uses each component, ``(I, J, R)``, for formats whose blocks share components.

        Args:
            factors: The factors.

        Raises:
            TypeError: If the format has no couplings.
        """
        raise TypeError(f"expected a format with couplings, such as Blast, got {self}")

    def hardened(self, factors: Factors) -> tuple[Format, dict[str, Tensor]]:
        """Make the learned structure final, for formats that learn theirs: the format that remains and its factors.

        Args:
            factors: The factors.

        Raises:
            TypeError: If the format does not learn its structure.
        """
        raise TypeError(f"expected a format that learns its structure, such as GaudiGblr, got {self}")

    def for_inference(self, factors: Factors) -> tuple[Format, dict[str, Tensor]] | None:
        """Lay the same matrix out in another format that multiplies faster.

        Args:
            factors: The factors.

        Returns:
            The other format and its factors; None where there is none.
        """
        return None

    def unrolled(self, factors: Factors, sums: bool = True) -> nn.Module | None:
        """The product as ordinary linear layers on slices of the input, for runtimes outside of PyTorch.

        Args:
            factors: The factors.
            sums: Whether the runtime knows sums over an axis.

        Returns:
            A module that maps ``(..., N)`` to ``(..., M)``; None where there is no such form.
        """
        return None

    def part(self, factors: Factors, axis: int, index: int, count: int) -> tuple[Format, dict[str, Tensor]]:
        """The format and the factors of one of several equal parts of the matrix, such as each of several devices has.

        Args:
            factors: The factors, which may be on the meta device.
            axis: 0 to cut the out features, 1 to cut the in features.
            index: The place of the part.
            count: The number of parts, which divides the number of features.

        Raises:
            ValueError: If matrices of this format cannot be cut so.
        """
        features = "in" if axis else "out"
        raise ValueError(f"expected a matrix that can be cut along its {features} features, got {self}")

    def settings(self) -> str:
        """The hyperparameters beside the shape, as short text for tables."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ", ".join(self._setting(n, v) for n, v in fields.items() if n not in ("M", "N") and v is not False)

    @property
    def kind(self) -> str:
        """What layers of different sizes and budgets have in common: the label, and what a user chooses beside keep."""
        chosen = {name: getattr(self, name) for name in self.budget_options() if hasattr(self, name)}
        settings = (self._setting(name, value) for name, value in chosen.items() if value not in (False, None))
        return ", ".join((self.label, *settings))

    def _setting(self, name: str, value: Any) -> str:
        """One hyperparameter as text."""
        if name == "blocks" and isinstance(value, tuple):
            return f"{value[0]} x {value[1]} blocks"
        return name if value is True else f"{name} {_lists(value)}"

    def to_json(self) -> dict[str, Any]:
        """The format as JSON-compatible data, with its name under ``"format"``."""
        fields = {field.name: _lists(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"format": self.name, **fields}


def _lists(value: Any) -> Any:
    """The value with every tuple as a list."""
    return [_lists(one) for one in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class RankedFormat(Format):
    """A format whose size grows by a fixed number of parameters with its field ``rank``."""

    @property
    @abc.abstractmethod
    def parameters_per_rank(self) -> int:
        """The number of parameters that one more unit of rank costs."""

    @property
    @abc.abstractmethod
    def max_rank(self) -> int:
        """The largest rank that still adds something."""

    def _how_to_save(self) -> str:
        rank: int = getattr(self, "rank")  # noqa: B009 - declared by the subclasses, whose field order it must not fix
        fixed = self.num_parameters() - rank * self.parameters_per_rank
        break_even = (self.M * self.N - 1 - fixed) // self.parameters_per_rank
        if break_even < (0 if fixed else 1):
            return "no rank saves anything at this shape; use fewer blocks, or leave this layer dense"
        return f"the largest rank that saves parameters here is {break_even}"

    @classmethod
    def _largest_rank(cls, smallest: RankedFormat, keep: float, least: int = 1) -> int:
        """The rank for a budget, a multiple of 8 if that costs < 2 %; ``smallest`` is the format at rank ``least``."""
        budget = _checks.budget(keep, smallest.M * smallest.N)
        fixed = smallest.num_parameters() - least * smallest.parameters_per_rank
        rank = min((budget - fixed) // smallest.parameters_per_rank, smallest.max_rank)
        if rank < least:
            needed = _checks.rounded_up(smallest.keep)
            raise ValueError(
                f"expected a keep of at least {needed} for a {smallest.M} x {smallest.N} {smallest.name} matrix "
                f"with these options, got {keep}; raise keep or take fewer blocks"
            )
        multiple = rank // 8 * 8
        return multiple if multiple > 0.98 * rank else rank
