"""The network that is exported: a copy in evaluation mode, in the forms that runtimes compute fast."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from structmat.network.sites import structured_layers
from structmat.network.surgery import harden_, tile_
from structmat.nn import StructuredModule

MOST_LAYERS = 8
"""The most linear layers that a structured matrix becomes for ONNX; one that needs more is a few batched products,
so that graphs stay small."""


def prepared(
    model: nn.Module, layers: int | None = MOST_LAYERS, sums: bool = True
) -> tuple[nn.Module, dict[str, float]]:
    """Copy a network for a runtime; the copy shares the tensors of the network, which does not change.

    Args:
        model: The network.
        layers: The most linear layers that a structured matrix becomes; None for any number.
        sums: Whether the runtime knows sums over an axis.

    Returns:
        The copy, whose learned structures are hardened, whose GBLR matrices are in tiles and whose other matrices are
        linear layers where that is faster; and how far each hardened matrix is from the one that learned, by name.

    Raises:
        ValueError: If the network has no values, or is on another device than the CPU.
    """
    devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
    if devices - {"cpu"}:
        raise ValueError(
            f"expected a model on the CPU to export, got one on {', '.join(sorted(devices))}; move it first"
        )
    if isinstance(model, StructuredModule):
        model = nn.Sequential(model)  # surgery works inside of a network
    new = sharing_copy(model).eval()
    gaps: dict[str, float] = {}
    if any(layer.format.learns for layer in structured_layers(new).values()):
        gaps = harden_(new)
    tiled = [
        name
        for name, layer in structured_layers(new).items()
        if layer.format.has_inference_layout and layer.format.for_inference(layer.factors) is not None
    ]
    if tiled:
        tile_(new, tiled)
    _unroll_(new, layers, sums)
    return new, gaps


def sharing_copy(model: nn.Module) -> Any:
    """Copy the modules of a network, but not their parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


class Unrolled(nn.Module):
    """A structured layer as ordinary linear layers; other attributes are those of the layer.

    Args:
        layer: The structured layer.
        product: What multiplies with its matrix.
    """

    def __init__(self, layer: StructuredModule, product: nn.Module) -> None:
        super().__init__()
        self.product, self.bias = product, layer.bias
        vars(self)["layer"] = layer  # no child, or its factors would be weights of the exported network too

    def __getattr__(self, name: str) -> Any:
        """Find what other modules ask of the layer, such as its number of features."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self).get("layer"), name)  # there is none while this is made

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        return vars(self)["layer"].through(x, self.product)


@torch.no_grad()
def _unroll_(model: nn.Module, most: int | None, sums: bool) -> None:
    """Put linear layers in the place of structured ones, in place, where they are not too many."""
    made: dict[int, nn.Module | None] = {}
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, StructuredModule):
                continue
            if id(layer) not in made:
                product = layer.format.unrolled(layer.factors, sums)
                count = 0 if product is None else sum(isinstance(part, nn.Linear) for part in product.modules())
                fits = product is not None and (most is None or count <= most)
                made[id(layer)] = Unrolled(layer, product).eval() if product is not None and fits else None
            new = made[id(layer)]
            if new is not None:
                setattr(parent, name, new)
