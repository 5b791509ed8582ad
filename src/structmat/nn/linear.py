"""The linear layer whose weight is a structured matrix."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from structmat.formats import Format
from structmat.nn.weight import ReadOnlyWeight
from structmat.ops.common import plain, traced


def bucket(tokens: int) -> int:
    """The least power of two that is not below the number of tokens."""
    return 1 << max(tokens - 1, 0).bit_length()


class StructuredModule(nn.Module):
    """A module that holds the factors of one structured matrix, under their own names, and a bias.

    Args:
        format: The structured matrix.
        bias: Whether there is a bias.
        factors: The factors, copied into new parameters; None for a random init.
        generator: The source of randomness for the init, on the CPU.
        device: The device of the parameters.
        dtype: The dtype of the parameters, except for factors whose format fixes their dtype.

    Attributes:
        format: The shape and hyperparameters of the structured matrix.
        bias: The bias ``(M,)``, or None.
        algorithms: The names of the ways to multiply, by number of tokens (``bucket``); for other numbers a way is
            chosen for each product. ``autotune_`` sets it.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        format: Format,
        bias: bool = True,
        *,
        factors: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(format, Format):
            raise TypeError(f"expected a structmat format, got {format!r}")
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        if factors is None:
            factors = format.init(generator=generator, dtype=dtype, device=device)
        else:
            format.check_factors(factors)
        options = {"copy": True, "memory_format": torch.contiguous_format}
        kinds = {name: spec.dtype or dtype for name, spec in format.factor_specs().items()}
        self._hold(format, {name: factors[name].detach().to(device, kinds[name], **options) for name in kinds})
        size = self._bias_size(format)
        self.register_parameter("bias", _fresh_bias(size, format.N, generator, device, dtype) if bias else None)

    def _bias_size(self, format: Format) -> int:
        return format.M

    def _hold(self, format: Format, factors: Mapping[str, Tensor], learns: bool = True) -> None:
        """Register the factors of a format: parameters and buffers under their own names."""
        self.format = format
        self.algorithms: dict[int, str] = {}
        self._factor_names = tuple(format.factor_specs())
        for name, spec in format.factor_specs().items():
            if spec.trainable:
                self.register_parameter(name, nn.Parameter(factors[name], requires_grad=learns))
            else:
                self.register_buffer(name, factors[name])

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by name."""
        return {name: getattr(self, name) for name in self._factor_names}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StructuredModule:
        """Move or cast like ``nn.Module``, but keep the dtype of factors whose format fixes it."""
        specs = self.format.factor_specs()
        fixed = {id(getattr(self, name)) for name, spec in specs.items() if spec.dtype is not None}

        def kept(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return tensor.to(new.device) if id(tensor) in fixed and new.dtype != tensor.dtype else new

        return super()._apply(kept, recurse)

    def with_factors(self, format: Format, factors: Mapping[str, Tensor]) -> StructuredModule:
        """A layer like this one with another format of the same shape, and the same bias.

        Args:
            format: The structured matrix.
            factors: Its factors, which become the layer's own.

        Returns:
            The layer.

        Raises:
            ValueError: If the shape is another, or the factors do not fit the format.
        """
        if format.shape != self.format.shape:
            raise ValueError(f"expected a format of shape {self.format.shape}, got {format}")
        format.check_factors(factors)
        learns = any(factor.requires_grad for factor in self.factors.values())
        new = copy.copy(self)
        new._parameters, new._buffers = {}, {}
        new._hold(format, {name: factor.detach() for name, factor in factors.items()}, learns)
        new.register_parameter("bias", self.bias)
        return new

    def to_dense(self) -> Tensor:
        """The dense weight ``(M, N)``, differentiable in the factors."""
        return self.format.to_dense(self.factors)

    @property
    def weight(self) -> Tensor:
        """The weight of the dense layer, in its layout; it can only be read, and writing to it is an error."""
        if "weight" in self._factor_names:
            return cast("Tensor", self.__getattr__("weight"))
        factor = next(iter(self.factors.values()))
        shape = self.in_dense_layout(torch.empty(self.format.shape, device="meta")).shape
        return ReadOnlyWeight.of(
            lambda: self.in_dense_layout(self.to_dense()), tuple(shape), factor.dtype, factor.device
        )

    def dense_layer(self) -> nn.Module:
        """The dense layer that this one stands in for, on the meta device."""
        return nn.Linear(self.format.N, self.format.M, device="meta")

    def in_dense_layout(self, matrix: Tensor) -> Tensor:
        """The matrix ``(M, N)`` as a view in the layout of the dense layer's ``weight``."""
        return matrix

    def out_of_dense_layout(self, weight: Tensor) -> Tensor:
        """What has the layout of the dense layer's ``weight`` as a matrix ``(M, N)``."""
        return weight

    def _recorded(self, x: Proxy) -> Any:
        """What stands for the output in a graph of ``torch.fx``: a call of the layer, as for PyTorch's own layers."""
        name = x.tracer.path_of_module(self)  # pyright: ignore[reportAttributeAccessIssue]
        if not name:
            raise TypeError(
                "expected a network that holds structured layers, to record it with torch.fx, got one itself"
            )
        return x.tracer.create_proxy("call_module", name, (x,), {})

    def through(self, x: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply the layer with a given way to multiply by its matrix.

        Args:
            x: What ``forward`` takes.
            multiply: Makes ``(..., M)`` of vectors ``(..., N)``.

        Returns:
            What ``forward`` returns.
        """
        return self._biased(multiply(x))

    def _biased(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _product(self, x: Tensor) -> Tensor:
        algorithm = ""
        if self.algorithms and not plain():  # a graph for elsewhere has one way for all lengths
            tokens = x.numel() // self.format.N
            algorithm = next((name for most, name in self.algorithms.items() if most // 2 < tokens <= most), "")
        return self.format.matmul(x, self.factors, algorithm)


def _fresh_bias(
    size: int, inputs: int, generator: torch.Generator | None, device: torch.device | str | None, dtype: torch.dtype
) -> nn.Parameter:
    """A bias with the distribution of a fresh ``nn.Linear``; on the meta device nothing is drawn."""
    value = torch.empty(size, device=device, dtype=dtype)
    if not value.is_meta:
        bound = 1 / math.sqrt(inputs)
        value.copy_((torch.rand(size, generator=generator, device="cpu") * 2 - 1) * bound)
    return nn.Parameter(value)


class StructuredLinear(StructuredModule):
    """``y = x W^T + b`` with a structured ``W``: the drop-in for ``nn.Linear``.

    The arguments and attributes are those of ``StructuredModule``.

    Example:
        >>> from structmat import Blast
        >>> layer = StructuredLinear(Blast(64, 32, blocks=4, rank=8))
        >>> layer(torch.randn(2, 7, 32)).shape
        torch.Size([2, 7, 64])
    """

    @property
    def in_features(self) -> int:
        """``N``."""
        return self.format.N

    @property
    def out_features(self) -> int:
        """``M``."""
        return self.format.M

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: ``(..., N)``.

        Returns:
            ``(..., M)``.

        Raises:
            ValueError: If the last dimension is not ``N``.
        """
        if isinstance(x, Proxy):
            return self._recorded(x)
        if not traced() and x.shape[-1] != self.format.N:
            raise ValueError(f"expected an input with {self.format.N} features, got shape {tuple(x.shape)}")
        return self.through(x, self._product)

    def extra_repr(self) -> str:
        """The format and whether there is a bias."""
        return f"{self.format}, bias={self.bias is not None}"
