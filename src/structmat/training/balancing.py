"""Give every component of a structured matrix one size in all of its factors; the matrix stays."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from structmat.formats import Blast, LowRank
from structmat.nn import StructuredModule


@torch.no_grad()
def balance_(model: nn.Module) -> list[str]:
    """Balance the BLAST and low-rank layers of a network before it is trained, in place.

    A matrix that is a product does not say how large each of its factors is, but training does depend on it: the factor
    beside a large one gets large gradients. Here each component (column ``r`` of ``left`` with what multiplies it) gets
    the same root mean square in the three factors of a BLAST layer and the same norm in the two of a low-rank layer,
    which is what the fits of this library give already. Layers of other formats stay as they are, and so does a
    component that is 0 in one factor.

    Args:
        model: The network; its parameters may be sharded ``DTensor``.

    Returns:
        The names of the layers that were balanced.
    """
    seen: set[int] = set()
    names: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, StructuredModule) or not isinstance(module.format, (Blast, LowRank)):
            continue
        names.append(name)
        factors = module.factors
        if id(factors["left"]) not in seen:  # layers may share their factors
            seen.add(id(factors["left"]))
            _balance_layer(module.format, factors)
    return names


def _balance_layer(format: Blast | LowRank, factors: dict[str, Tensor]) -> None:
    """Scale the factors of one layer; the sizes are ``(R,)``."""
    if isinstance(format, LowRank):
        sizes = {"left": _sums(factors["left"], 0), "right": _sums(factors["right"], 1)}
        repeats = 1
    else:
        (I, J), (P, Q), R = format.blocks, format.block_shape, format.rank
        sizes = {
            "left": _sums(factors["left"], 0) / (I * P),
            "diag": _sums(factors["diag"], 0) / (I * J),
            "right": _sums(factors["right"], 1).view(J, R).sum(0) / (J * Q),
        }
        repeats = J
    stacked = torch.stack([size.double() for size in sizes.values()]).sqrt()
    target = stacked.log().mean(0).exp()  # the geometric mean; 0 for a dead component
    alive = target > 0
    for (name, factor), size in zip(((n, factors[n]) for n in sizes), stacked, strict=True):
        scale = torch.where(alive, target / size, 1.0).to(factor.dtype)  # (R,)
        _scale_(factor, scale.repeat(repeats)[:, None] if name == "right" else scale[None, :])


def _sums(factor: Tensor, dimension: int) -> Tensor:
    """The squares summed over a dimension, whole on every process."""
    sums = factor.float().square().sum(dimension)
    return sums.full_tensor() if isinstance(sums, DTensor) else sums


def _scale_(factor: Tensor, scale: Tensor) -> None:
    if isinstance(factor, DTensor):
        scale = DTensor.from_local(scale, factor.device_mesh, [Replicate()] * factor.device_mesh.ndim, run_check=False)
    factor.mul_(scale)
