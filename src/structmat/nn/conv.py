"""Convolutions whose weights are structured matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from structmat import _checks
from structmat.formats import Format
from structmat.nn.linear import StructuredModule
from structmat.ops.common import traced

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

AXES = {1: ("length",), 2: ("height", "width")}
"""The names of the axes that a kernel moves along, by their number."""


class StructuredConv(StructuredModule):
    """A convolution whose weight, unfolded to ``(out, in * kernel positions)``, is structured.

    Args:
        format: The structured matrix, with ``M`` output channels and ``N = in_channels * kernel positions``.
        kernel_size: The size of the kernel along each axis; here and below one number stands for all axes.
        stride: The stride along each axis.
        padding: How many positions are added on both sides, or ``"same"`` or ``"valid"``, as in PyTorch's layer.
        dilation: The dilation along each axis.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        bias: Whether there is a bias.
        factors: The factors, copied into new parameters; None for a random init.
        generator: The source of randomness for the init, on the CPU.
        device: The device of the parameters.
        dtype: The dtype of the parameters, except for factors whose format fixes their dtype.

    Raises:
        ValueError: If ``N`` is not a multiple of the kernel's positions, the padding or its mode is unknown, or
            ``"same"`` meets a stride.
    """

    axes: ClassVar[int]
    """The number of axes that the kernel moves along."""

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
        self.kernel_size, self.stride = each(kernel_size, self.axes), each(stride, self.axes)
        self.dilation = each(dilation, self.axes)
        self.padding = padding if isinstance(padding, str) else each(padding, self.axes)
        self.padding_mode: PaddingMode = padding_mode
        self._check_geometry()

    def _check_geometry(self) -> None:
        positions = math.prod(self.kernel_size)
        if self.format.N % positions:
            raise ValueError(f"expected N to be a multiple of the kernel's {positions} positions, got {self.format.N}")
        _checks.one_of(self.padding_mode, get_args(PaddingMode), "padding_mode")
        if isinstance(self.padding, str):
            _checks.one_of(self.padding, ("same", "valid"), "padding")
            one = each(1, self.axes)
            if self.padding == "same" and self.stride != one:
                raise ValueError(f"expected stride {one} with padding='same', got {self.stride}; give it in numbers")

    @property
    def in_channels(self) -> int:
        """``N`` over the number of the kernel's positions."""
        return self.format.N // math.prod(self.kernel_size)

    @property
    def out_channels(self) -> int:
        """``M``."""
        return self.format.M

    def dense_layer(self) -> nn.Module:
        """The dense convolution that this one stands in for, on the meta device."""
        kind = nn.Conv1d if self.axes == 1 else nn.Conv2d
        return kind(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # pyright: ignore[reportArgumentType]
            self.stride,  # pyright: ignore[reportArgumentType]
            self.padding,  # pyright: ignore[reportArgumentType]
            self.dilation,  # pyright: ignore[reportArgumentType]
            padding_mode=self.padding_mode,
            device="meta",
        )

    def in_dense_layout(self, matrix: Tensor) -> Tensor:
        """The matrix as ``(out, in, *kernel_size)``."""
        return matrix.view(self.out_channels, self.in_channels, *self.kernel_size)

    def out_of_dense_layout(self, weight: Tensor) -> Tensor:
        """What has the layout ``(out, in, *kernel_size)`` as a matrix ``(M, N)``."""
        return weight.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: ``(in, *sizes)`` or ``(batch, in, *sizes)``.

        Returns:
            ``(..., out, *new sizes)``.

        Raises:
            ValueError: If the input has other dimensions or another number of channels.
        """
        if isinstance(x, Proxy):
            return self._recorded(x)
        check_channels(x, self.in_channels, self.axes)
        return self.through(x, self._product)

    def through(self, x: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply the layer with a given way to multiply by its matrix."""
        vectors, sizes = unfolded(self, x if x.ndim == self.axes + 2 else x[None])
        y = self._biased(multiply(vectors)).mT.unflatten(-1, sizes)
        return y if x.ndim == self.axes + 2 else y[0]

    def extra_repr(self) -> str:
        """The format and the convolution's geometry."""
        return (
            f"{self.format}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding!r}, "
            f"dilation={self.dilation}, padding_mode={self.padding_mode!r}, bias={self.bias is not None}"
        )


class StructuredConv1d(StructuredConv):
    """A ``StructuredConv`` along one axis: the drop-in for ``nn.Conv1d``."""

    axes = 1


class StructuredConv2d(StructuredConv):
    """A ``StructuredConv`` along two axes: the drop-in for ``nn.Conv2d``."""

    axes = 2


def unfolded(layer: StructuredConv | nn.Conv1d | nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The vectors that the matrix of a convolution multiplies, and the size of its output.

    Args:
        layer: The convolution, structured or dense with one group.
        x: ``(batch, in, length)`` or ``(batch, in, height, width)``.

    Returns:
        The vectors ``(batch, L, N)``, one for each of the ``L`` output positions, and the output's size.
    """
    axes = x.ndim - 2
    kernel_size, stride, dilation = (each(one, axes) for one in (layer.kernel_size, layer.stride, layer.dilation))
    margins = _margins(layer, axes)
    if any(margins):
        x = nn.functional.pad(x, margins, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True)]
    sizes = tuple((size - span) // step + 1 for size, span, step in zip(x.shape[2:], spans, stride, strict=True))
    return columns_of(x, kernel_size, stride, dilation).mT, sizes


def columns_of(x: Tensor, kernel_size: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """What a kernel sees at each of its places in ``(batch, in, *sizes)``, as ``(batch, N, L)``."""
    if all(k == 1 for k in kernel_size):
        return x[(..., *(slice(None, None, step) for step in stride))].flatten(2)
    if len(kernel_size) == 1:  # PyTorch unfolds planes alone
        x, kernel_size, stride, dilation = x[:, :, None], (1, *kernel_size), (1, *stride), (1, *dilation)
    return nn.functional.unfold(x, kernel_size, dilation, 0, stride)


def _margins(layer: StructuredConv | nn.Conv1d | nn.Conv2d, axes: int) -> list[int]:
    """How many positions the padding adds, before and after, the last axis first."""
    if isinstance(layer.padding, str):
        sizes = zip(each(layer.dilation, axes), each(layer.kernel_size, axes), strict=True)
        totals = [d * (k - 1) if layer.padding == "same" else 0 for d, k in sizes]
        return [margin for total in reversed(totals) for margin in (total // 2, total - total // 2)]
    return [margin for one in reversed(each(layer.padding, axes)) for margin in (one, one)]


def check_channels(x: Tensor, channels: int, axes: int) -> None:
    """Refuse an input that no convolution with this many input channels can take."""
    if x.ndim not in (axes + 1, axes + 2) or (not traced() and x.shape[-axes - 1] != channels):
        raise ValueError(
            f"expected an input (batch, {channels}, {', '.join(AXES[axes])}) or without the batch, "
            f"got shape {tuple(x.shape)}"
        )


def each(value: int | tuple[int, ...], axes: int) -> tuple[int, ...]:
    """One number for all axes, or one for each."""
    return (value,) * axes if isinstance(value, int) else tuple(value)
