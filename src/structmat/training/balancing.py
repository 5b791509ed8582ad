"""Give every component of a structured matrix one size in all of its factors; the matrix stays."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from structmat.formats import Format
from structmat.nn import StructuredModule


@torch.no_grad()
def balance_(model: nn.Module) -> list[str]:
    """Balance the layers of a network that are a sum of components, before it is trained, in place.

    A matrix that is a product does not say how large each of its factors is, but training does depend on it: the factor
    beside a large one gets large gradients. Here each component (column ``r`` of ``left`` with what multiplies it) gets
    the same root mean square in the three factors of a BLAST layer and the same norm in the two of a low-rank layer,
    which is what the fits of this library give already. A format says so by ``component_axes`` and ``component_size``;
    layers of other formats do not change, and neither does a component that is 0 in one factor.

    Args:
        model: The network; its parameters may be sharded ``DTensor``.

    Returns:
        The names of the layers that were balanced.
    """
    seen: set[int] = set()
    names: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, StructuredModule) or not module.format.component_axes:
            continue
        names.append(name)
        factors = module.factors
        first = id(next(iter(factors.values())))
        if first not in seen:  # layers may share their factors
            seen.add(first)
            balance_factors_(module.format, factors)
    return names


def balance_factors_(format: Format, factors: dict[str, Tensor]) -> None:
    """Balance the factors of one matrix, in place; those of formats that are no sum of components stay.

    Args:
        format: The structured matrix.
        factors: Its factors.
    """
    if not format.component_axes:
        return
    axes = format.component_axes
    count = min(factors[name].shape[axis] for name, axis in axes.items())  # R
    means = format.component_size == "root mean square"
    squares: list[Tensor] = []
    for name, axis in axes.items():
        sums = _sums(factors[name], 1 - axis).view(-1, count).sum(0)
        squares.append((sums / (factors[name].numel() // count) if means else sums).double())
    sizes = torch.stack(squares).sqrt()  # (factors, R)
    target = sizes.log().mean(0).exp()  # the geometric mean; 0 for a dead component
    alive = target > 0
    for (name, axis), size in zip(axes.items(), sizes, strict=True):
        factor = factors[name]
        scale = torch.where(alive, target / size, 1.0).to(factor.dtype).repeat(factor.shape[axis] // count)
        _scale_(factor, scale.unsqueeze(1 - axis))


def _sums(factor: Tensor, dimension: int) -> Tensor:
    """The squares summed over a dimension, whole on every process."""
    sums = factor.float().square().sum(dimension)
    return sums.full_tensor() if isinstance(sums, DTensor) else sums


def _scale_(factor: Tensor, scale: Tensor) -> None:
    if isinstance(factor, DTensor):
        scale = DTensor.from_local(scale, factor.device_mesh, [Replicate()] * factor.device_mesh.ndim, run_check=False)
    factor.mul_(scale)
