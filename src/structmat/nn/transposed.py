"""Transposed convolutions whose weights are structured matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from structmat.formats import Format
from structmat.nn.conv import check_channels, columns_of, each
from structmat.nn.linear import StructuredModule

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d
"""The dense layers."""


class StructuredConvTranspose(StructuredModule):
    """A transposed convolution whose weight, as ``(out * kernel positions, in)``, is structured.

    Each input position is multiplied by the matrix, and what it gives is added up where the kernel lies.

    Args:
        format: The structured matrix, with ``M = out_channels * kernel positions`` and ``N`` input channels.
        kernel_size: The size of the kernel along each axis; here and below one number stands for all axes.
        stride: The stride along each axis.
        padding: How many positions are cut off on both sides.
        output_padding: How many positions the output is longer at its end.
        dilation: The dilation along each axis.
        bias: Whether there is a bias, one number for each output channel.
        factors: The factors, copied into new parameters; None for a random init.
        generator: The source of randomness for the init, on the CPU.
        device: The device of the parameters.
        dtype: The dtype of the parameters, except for factors whose format fixes their dtype.

    Raises:
        ValueError: If ``M`` is not a multiple of the kernel's positions.
    """

    axes: ClassVar[int]
    """The number of axes that the kernel moves along."""

    def __init__(
        self,
        format: Format,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        bias: bool = True,
        *,
        factors: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        positions = math.prod(each(kernel_size, self.axes))
        if isinstance(format, Format) and format.M % positions:
            raise ValueError(f"expected M to be a multiple of the kernel's {positions} positions, got {format.M}")
        self._positions = positions
        super().__init__(format, bias, factors=factors, generator=generator, device=device, dtype=dtype)
        self.kernel_size, self.stride = each(kernel_size, self.axes), each(stride, self.axes)
        self.padding, self.output_padding = each(padding, self.axes), each(output_padding, self.axes)
        self.dilation = each(dilation, self.axes)

    def _bias_size(self, format: Format) -> int:
        return format.M // self._positions

    @property
    def in_channels(self) -> int:
        """``N``."""
        return self.format.N

    @property
    def out_channels(self) -> int:
        """``M`` over the number of the kernel's positions."""
        return self.format.M // self._positions

    def dense_layer(self) -> nn.Module:
        """The dense layer that this one stands in for, on the meta device."""
        kind = nn.ConvTranspose1d if self.axes == 1 else nn.ConvTranspose2d
        return kind(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # pyright: ignore[reportArgumentType]
            self.stride,  # pyright: ignore[reportArgumentType]
            self.padding,  # pyright: ignore[reportArgumentType]
            self.output_padding,  # pyright: ignore[reportArgumentType]
            dilation=self.dilation,  # pyright: ignore[reportArgumentType]
            device="meta",
        )

    def in_dense_layout(self, matrix: Tensor) -> Tensor:
        """The matrix as ``(in, out, *kernel_size)``."""
        return matrix.mT.unflatten(1, (self.out_channels, *self.kernel_size))

    def out_of_dense_layout(self, weight: Tensor) -> Tensor:
        """What has the layout ``(in, out, *kernel_size)`` as a matrix ``(M, N)``."""
        return weight.flatten(1).mT

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: ``(in, *sizes)`` or ``(batch, in, *sizes)``.
            output_size: The size of the output, which then takes the place of the output padding.

        Returns:
            ``(..., out, *new sizes)``.

        Raises:
            ValueError: If the input has other dimensions or another number of channels, or no output has the size.
        """
        if isinstance(x, Proxy):
            return self._recorded(x)
        check_channels(x, self.in_channels, self.axes)
        return self._laid(x, self._product, output_size)

    def through(self, x: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply the layer with a given way to multiply by its matrix."""
        return self._laid(x, multiply, None)

    def _laid(self, x: Tensor, multiply: Callable[[Tensor], Tensor], output_size: Sequence[int] | None) -> Tensor:
        batch = x if x.ndim == self.axes + 2 else x[None]
        columns = multiply(batch.flatten(2).mT).mT  # (B, M, L)
        y = _folded(self, columns, tuple(batch.shape[2:]), output_size)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype).view(-1, *[1] * self.axes)
        return y if x.ndim == self.axes + 2 else y[0]

    def extra_repr(self) -> str:
        """The format and the geometry."""
        return (
            f"{self.format}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"output_padding={self.output_padding}, dilation={self.dilation}, bias={self.bias is not None}"
        )


class StructuredConvTranspose1d(StructuredConvTranspose):
    """A ``StructuredConvTranspose`` along one axis: the drop-in for ``nn.ConvTranspose1d``."""

    axes = 1


class StructuredConvTranspose2d(StructuredConvTranspose):
    """A ``StructuredConvTranspose`` along two axes: the drop-in for ``nn.ConvTranspose2d``."""

    axes = 2


def _folded(
    layer: StructuredConvTranspose, columns: Tensor, sizes: tuple[int, ...], output_size: Sequence[int] | None
) -> Tensor:
    """Add up columns ``(B, M, L)`` where the kernel lies, and cut the padding off."""
    geometry = list(zip(sizes, layer.kernel_size, layer.stride, layer.dilation, strict=True))
    whole = [(size - 1) * s + d * (k - 1) + 1 for size, k, s, d in geometry]
    least = [one - 2 * p for one, p in zip(whole, layer.padding, strict=True)]
    more = list(layer.output_padding)
    if output_size is not None:
        more = [wanted - one for wanted, one in zip(list(output_size)[-layer.axes :], least, strict=True)]
        if any(not 0 <= one < s for one, s in zip(more, layer.stride, strict=True)):
            most = [one + s - 1 for one, s in zip(least, layer.stride, strict=True)]
            raise ValueError(f"expected an output size from {least} to {most}, got {list(output_size)}")
    plane = (1,) * (2 - layer.axes)  # PyTorch folds planes alone
    kernel_size, stride, dilation = ((*plane, *one) for one in (layer.kernel_size, layer.stride, layer.dilation))
    y = nn.functional.fold(columns, (*plane, *whole), kernel_size, dilation, 0, stride)
    y = y[:, :, 0] if plane else y
    margins = [one for p, m in reversed(list(zip(layer.padding, more, strict=True))) for one in (-p, m - p)]
    return nn.functional.pad(y, margins) if any(margins) else y


def unfolded_results(layer: Transposed, y: Tensor) -> Tensor:
    """What adds up to the output of a transposed convolution takes of a gradient at it.

    Args:
        layer: The dense layer, with one group.
        y: ``(batch, out, *sizes)``, the gradient.

    Returns:
        ``(batch, L, M)``, the gradient at the products with the matrix, one for each input position.
    """
    axes = y.ndim - 2
    padding, more = each(layer.padding, axes), each(layer.output_padding, axes)  # pyright: ignore[reportArgumentType]
    margins = [one for p, m in reversed(list(zip(padding, more, strict=True))) for one in (p, p - m)]
    whole = nn.functional.pad(y, margins) if any(margins) else y
    geometry = (each(one, axes) for one in (layer.kernel_size, layer.stride, layer.dilation))
    return columns_of(whole, *geometry).mT
