"""Convolutions with groups as one convolution for each group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from structmat.nn.split import SplitModule, as_parameter, joined_parameter, with_parameters

Convolution = nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d
"""The layers whose groups have a matrix each."""


class SplitGroups(SplitModule):
    """A convolution with groups whose groups are the layers ``group_0``, ``group_1``, …, one after the other.

    Args:
        layer: The convolution that this one stands in for; parts of its parameters become those of the groups.
    """

    def __init__(self, layer: Convolution) -> None:
        super().__init__()
        self.groups, self.axes, self.transposed = layer.groups, len(layer.kernel_size), layer.transposed
        self.in_channels, self.out_channels = layer.in_channels, layer.out_channels
        biases = (None,) * self.groups if layer.bias is None else layer.bias.chunk(self.groups)
        for k, (weight, bias) in enumerate(zip(layer.weight.chunk(self.groups), biases, strict=True)):
            group = _like(layer, layer.in_channels // self.groups, layer.out_channels // self.groups, 1)
            group.weight = as_parameter(weight)
            group.register_parameter("bias", None if bias is None else as_parameter(bias))
            self.add_module(f"group_{k}", group)
        self.train(layer.training)

    def joined(self) -> nn.Module:
        """PyTorch's own convolution with the same weights; every group must be dense."""
        groups = list(self.children())
        layer = _like(groups[0], self.in_channels, self.out_channels, self.groups)
        biases: list[Tensor] = [group.get_parameter("bias") for group in groups if group.bias is not None]
        weight = joined_parameter([group.get_parameter("weight") for group in groups])
        bias = joined_parameter(biases) if biases else None
        return with_parameters(layer, {"weight": weight, "bias": bias}, self.training)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Apply the layer.

        Args:
            x: ``(in, *sizes)`` or ``(batch, in, *sizes)``.
            output_size: The size of the output, for a transposed convolution.

        Returns:
            ``(..., out, *new sizes)``.

        Raises:
            ValueError: If the input has other dimensions or another number of channels.
        """
        if x.ndim not in (self.axes + 1, self.axes + 2) or x.shape[-self.axes - 1] != self.in_channels:
            raise ValueError(
                f"expected an input with {self.in_channels} channels before {self.axes} axes, got shape "
                f"{tuple(x.shape)}"
            )
        parts = zip(self.children(), x.chunk(self.groups, -self.axes - 1), strict=True)
        sized = {} if output_size is None else {"output_size": output_size}
        return torch.cat([group(part, **sized) for group, part in parts], -self.axes - 1)

    def extra_repr(self) -> str:
        """The number of groups."""
        return f"groups={self.groups}"


def _like(layer: nn.Module, inputs: int, outputs: int, groups: int) -> Convolution:
    """A convolution like another one with other channels, on the meta device."""
    if not isinstance(layer, Convolution):
        raise TypeError(f"expected a convolution, got {type(layer).__name__}")
    options = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
    if layer.transposed:
        options["output_padding"] = layer.output_padding
    bias = layer.bias is not None
    kind = type(layer)
    return kind(inputs, outputs, groups=groups, bias=bias, padding_mode=layer.padding_mode, device="meta", **options)
