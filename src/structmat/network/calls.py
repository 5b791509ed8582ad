"""How the library calls a network on a batch: a tensor, a tuple of arguments, or a mapping of keyword arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from structmat.network.adapters import output_names, stateless


def call(model: nn.Module, batch: Any) -> Any:
    """What the network makes of one batch."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def moved(value: Any, device: torch.device) -> Any:
    """The tensors of a batch on this device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(one, device) for key, one in value.items()}
    return tuple(moved(one, device) for one in value) if isinstance(value, (tuple, list)) else value


def widened(value: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors of a batch in this dtype, where theirs is narrower; anything else as it is."""
    if isinstance(value, Tensor):
        narrow = value.is_floating_point() and torch.promote_types(value.dtype, dtype) == dtype
        return value.to(dtype) if narrow else value
    if isinstance(value, Mapping):
        new = {key: widened(one, dtype) for key, one in value.items()}
        return new if any(new[key] is not one for key, one in value.items()) else value
    if isinstance(value, (tuple, list)):
        new = tuple(widened(one, dtype) for one in value)
        return new if any(a is not b for a, b in zip(new, value, strict=True)) else value
    return value


def device_of(model: nn.Module) -> torch.device:
    """Where the network's first parameter is."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, without gradients and without state between calls; then all as before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with stateless(model), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def tensor_of(output: Any) -> Tensor:
    """The tensor that matters in what a block or a network returns.

    Args:
        output: A tensor, a tuple that begins with one, or a mapping or object that holds one under one of ``output_names``.

    Returns:
        The tensor.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    for name in output_names():
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    raise TypeError(
        f"expected a tensor, or a tuple or object that holds one, from a block, got {type(output).__name__}"
    )
