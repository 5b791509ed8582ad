"""The linear layer whose weight is a structured matrix."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat.formats import Format
from structmat.nn.weight import ReadOnlyWeight

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def bucket(tokens: int) -> int:
    """The least power of two that is not below the number of tokens."""
    return 1 << max(tokens - 1, 0).bit_length()


class StructuredModule(nn.Module):
    """A module that holds the factors of one structured matrix, under their own names, and a bias.

    Args:
        format: The structured matrix.
        bias: Whether there is a bias.
        factors: The factors, copied into new parameters; None for a random init.
        generator: Source of randomness for the init, on the CPU.
        device: Of the parameters.
        dtype: Of the parameters, but for factors whose format fixes their dtype.

    Attributes:
        format: The structured matrix' shape and hyperparameters.
        bias: ``(M,)`` or None.
        algorithms: How to multiply, by number of tokens (``bucket``); what is missing is chosen for each product.
            ``optimize_`` sets it.
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
        self.format = format
        self.algorithms: dict[int, str] = {}
        dtype = dtype or torch.get_default_dtype()
        if factors is None:
            factors = format.init(generator=generator, dtype=dtype, device=device)
        else:
            format.check_factors(factors)
        self._factor_names = tuple(format.factor_specs())
        for name, spec in format.factor_specs().items():
            tensor = (
                factors[name].detach().to(device, spec.dtype or dtype, copy=True, memory_format=torch.contiguous_format)
            )
            if spec.trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        if bias:
            value = torch.empty(format.M, device=device, dtype=dtype)
            if not value.is_meta:
                bound = 1 / math.sqrt(format.N)
                value.copy_((torch.rand(format.M, generator=generator, device="cpu") * 2 - 1) * bound)
            self.bias = nn.Parameter(value)
        else:
            self.register_parameter("bias", None)

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by name."""
        return {name: getattr(self, name) for name in self._factor_names}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StructuredModule:
        """Move or cast as ``nn.Module`` does, but keep the dtype of factors whose format fixes it."""
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
        new.format, new._factor_names, new.algorithms = format, tuple(format.factor_specs()), {}
        for name, spec in format.factor_specs().items():
            tensor = factors[name].detach()
            if spec.trainable:
                new.register_parameter(name, nn.Parameter(tensor, requires_grad=learns))
            else:
                new.register_buffer(name, tensor)
        new.register_parameter("bias", self.bias)
        return new

    def to_dense(self) -> Tensor:
        """The dense weight ``(M, N)``, differentiable in the factors."""
        return self.format.to_dense(self.factors)

    @property
    def weight(self) -> Tensor:
        """The weight of the dense layer, in its layout, to read alone: writing to it is an error."""
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

    def _product(self, x: Tensor) -> Tensor:
        algorithm = ""
        if self.algorithms and not torch.compiler.is_exporting():  # an exported graph has one way for all lengths
            tokens = x.numel() // self.format.N
            algorithm = next((name for most, name in self.algorithms.items() if most // 2 < tokens <= most), "")
        y = self.format.matmul(x, self.factors, algorithm)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class StructuredLinear(StructuredModule):
    """``y = x W^T + b`` with a structured ``W``: the drop-in for ``nn.Linear``.

    Args and attributes are those of ``StructuredModule``.

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
        if x.shape[-1] != self.format.N:
            raise ValueError(f"expected an input with {self.format.N} features, got shape {tuple(x.shape)}")
        return self._product(x)

    def extra_repr(self) -> str:
        """The format and whether there is a bias."""
        return f"{self.format}, bias={self.bias is not None}"


class StructuredConv2d(StructuredModule):
    """A two-dimensional convolution whose weight, unfolded to ``(out, in * kh * kw)``, is structured.

    Args:
        format: ``M`` output channels, ``N = in_channels * kh * kw``.
        kernel_size: ``(kh, kw)``; here and below one number stands for both axes.
        stride: Along both axes.
        padding: Rows and columns added on both sides, or ``"same"`` or ``"valid"``, as in ``nn.Conv2d``.
        dilation: Along both axes.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        bias: As in ``StructuredModule``.
        factors: As in ``StructuredModule``.
        generator: As in ``StructuredModule``.
        device: As in ``StructuredModule``.
        dtype: As in ``StructuredModule``.

    Raises:
        ValueError: If ``N`` is not a multiple of ``kh * kw``, the padding or its mode is unknown, or ``"same"`` meets a
            stride.
    """

    def __init__(
        self,
        format: Format,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: PaddingMode = "zeros",
        bias: bool = True,
        *,
        factors: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(format, bias, factors=factors, generator=generator, device=device, dtype=dtype)
        kernel_size, stride, dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        if format.N % math.prod(kernel_size):
            raise ValueError(
                f"expected N to be a multiple of the kernel's {math.prod(kernel_size)} positions, got {format.N}"
            )
        _checks.one_of(padding_mode, get_args(PaddingMode), "padding_mode")
        if isinstance(padding, str):
            _checks.one_of(padding, ("same", "valid"), "padding")
            if padding == "same" and stride != (1, 1):
                raise ValueError(f"expected stride (1, 1) with padding='same', got {stride}; give it in numbers")
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.dilation = dilation
        self.padding_mode: PaddingMode = padding_mode

    @property
    def in_channels(self) -> int:
        """``N / (kh kw)``."""
        return self.format.N // math.prod(self.kernel_size)

    @property
    def out_channels(self) -> int:
        """``M``."""
        return self.format.M

    def dense_layer(self) -> nn.Conv2d:
        """The dense convolution that this one stands in for, on the meta device."""
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            padding_mode=self.padding_mode,
            device="meta",
        )

    def in_dense_layout(self, matrix: Tensor) -> Tensor:
        """The matrix as ``(out, in, kh, kw)``."""
        return matrix.view(self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: ``(in, height, width)`` or ``(batch, in, height, width)``.

        Returns:
            ``(..., out, new height, new width)``.

        Raises:
            ValueError: If the input has other dimensions or another number of channels.
        """
        if x.ndim not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"expected an input (batch, {self.in_channels}, height, width) or without the batch, "
                f"got shape {tuple(x.shape)}"
            )
        images = x if x.ndim == 4 else x[None]
        vectors, size = unfolded(self, images)
        y = self._product(vectors).mT.unflatten(-1, size)
        return y if x.ndim == 4 else y[0]

    def extra_repr(self) -> str:
        """The format and the convolution's geometry."""
        return (
            f"{self.format}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}, "
            f"dilation={self.dilation}, padding_mode={self.padding_mode!r}, bias={self.bias is not None}"
        )


def unfolded(layer: StructuredConv2d | nn.Conv2d, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """What the matrix of a convolution multiplies, and the height and width of its output.

    Args:
        layer: The convolution, structured or dense with one group.
        images: ``(batch, in, height, width)``.

    Returns:
        Vectors ``(batch, L, N)``, one for each of the ``L`` output positions, and the output's size.
    """
    kernel_size, stride, dilation = _pair(layer.kernel_size), _pair(layer.stride), _pair(layer.dilation)
    margins = _margins(layer)
    if any(margins):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        images = nn.functional.pad(images, margins, mode=mode)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True)]
    height, width = (
        (size - span) // step + 1 for size, span, step in zip(images.shape[-2:], spans, stride, strict=True)
    )
    if kernel_size == (1, 1):
        columns = images[..., :: stride[0], :: stride[1]].flatten(2)
    else:
        columns = nn.functional.unfold(images, kernel_size, dilation, 0, stride)  # (B, N, L)
    return columns.mT, (height, width)


def _margins(layer: StructuredConv2d | nn.Conv2d) -> tuple[int, int, int, int]:
    """Columns and rows that the padding adds at ``(left, right, top, bottom)``."""
    if isinstance(layer.padding, str):
        sizes = zip(_pair(layer.dilation), _pair(layer.kernel_size), strict=True)
        totals = [d * (k - 1) if layer.padding == "same" else 0 for d, k in sizes]
        (top, left), (bottom, right) = [t // 2 for t in totals], [t - t // 2 for t in totals]
        return left, right, top, bottom
    rows, columns = _pair(layer.padding)
    return columns, columns, rows, rows


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """One number for both axes, or one for each."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
