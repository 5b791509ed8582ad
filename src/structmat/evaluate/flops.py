"""Floating-point operations of a network and of its dense counterpart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from structmat.network.calls import call, evaluating
from structmat.network.capture import hooked, vectors_in
from structmat.network.sites import structured_layers


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one call, a multiplication and its addition being two.

    Attributes:
        compressed: The operations of the network with its structured layers.
        dense: The operations of the same network with every structured layer dense.
    """

    compressed: int
    dense: int

    @property
    def relative(self) -> float:
        """The operations of the network relative to those of the dense one."""
        return self.compressed / self.dense if self.dense else math.nan

    def __str__(self) -> str:
        return f"{self.compressed:,} FLOPs, {self.relative:.3f} of the dense {self.dense:,}"


def relative_flops(model: nn.Module, example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> Flops:
    """Count the floating-point operations of a call, and those of the same call with dense layers.

    The network runs once, under ``torch.utils.flop_counter``, which counts products of matrices, convolutions and
    attention, and not what goes entry by entry. No dense copy is made: a structured layer's own operations are taken
    off, and those of the dense product of the same inputs put in their place.

    Args:
        model: The network; it may live on the meta device, with inputs there.
        example_inputs: The input or inputs of the call, a mapping for keyword arguments.

    Returns:
        Both counts.

    Raises:
        ValueError: If the counter knows no formula for what a structured layer does.
    """
    counter = FlopCounterMode(display=False)
    starts: list[int] = []
    saved: list[int] = []

    def begin(name: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        starts.append(counter.get_total_flops())

    def end(name: str, layer: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        saved.append(_saved(layers[name], inputs, output, counter.get_total_flops() - starts.pop()))

    layers = structured_layers(model)
    with evaluating(model), hooked(layers, before=begin, after=end), counter:
        call(model, example_inputs)
    compressed = counter.get_total_flops()
    return Flops(compressed, compressed + sum(saved))


def _saved(layer: Any, inputs: tuple[Any, ...], output: Tensor, own: int) -> int:
    """The operations that a layer saves against the dense product, given its own."""
    vectors = vectors_in(layer, inputs, output)
    if own == 0 and layer.format.multiplications(vectors, layer.factors) > 0:
        raise ValueError(
            f"expected the counter to see the operations of {layer.format}, got none; give their operator "
            "a formula with torch.utils.flop_counter.register_flop_formula"
        )
    return 2 * vectors * layer.format.M * layer.format.N - own
