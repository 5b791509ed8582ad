"""The convolution whose weight is a structured matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from structmat import _checks
from structmat.formats import Format
from structmat.nn.linear import StructuredModule
from structmat.ops.common import traced

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class StructuredConv2d(StructuredModule):
    """A two-dimensional convolution whose weight, unfolded to ``(out, in * kh * kw)``, is structured.

    Args:
        format: The structured matrix, with ``M`` output channels and ``N = in_channels * kh * kw``.
        kernel_size: The size of the kernel, ``(kh, kw)``; here and below one number stands for both axes.
        stride: The stride along both axes.
        padding: The rows and columns added on both sides, or ``"same"`` or ``"valid"``, as in ``nn.Conv2d``.
        dilation: The dilation along both axes.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        bias: Whether there is a bias.
        factors: The factors, copied into new parameters; None for a random init.
        generator: The source of randomness for the init, on the CPU.
        device: The device of the parameters.
        dtype: The dtype of the parameters, except for factors whose format fixes their dtype.

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
        self.kernel_size, self.stride, self.dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        self.padding = padding if isinstance(padding, str) else _pair(padding)
        self.padding_mode: PaddingMode = padding_mode
        self._check_geometry()

    def _check_geometry(self) -> None:
        positions = math.prod(self.kernel_size)
        if self.format.N % positions:
            raise ValueError(f"expected N to be a multiple of the kernel's {positions} positions, got {self.format.N}")
        _checks.one_of(self.padding_mode, get_args(PaddingMode), "padding_mode")
        if isinstance(self.padding, str):
            _checks.one_of(self.padding, ("same", "valid"), "padding")
            if self.padding == "same" and self.stride != (1, 1):
                raise ValueError(f"expected stride (1, 1) with padding='same', got {self.stride}; give it in numbers")

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
        if isinstance(x, Proxy):
            return self._recorded(x)
        if x.ndim not in (3, 4) or (not traced() and x.shape[-3] != self.in_channels):
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
    """The vectors that the matrix of a convolution multiplies, and the height and width of its output.

    Args:
        layer: The convolution, structured or dense with one group.
        images: ``(batch, in, height, width)``.

    Returns:
        The vectors ``(batch, L, N)``, one for each of the ``L`` output positions, and the output's size.
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
    """The columns and rows that the padding adds at ``(left, right, top, bottom)``."""
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
