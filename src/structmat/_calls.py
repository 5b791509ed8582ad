"""How the library calls a network on a batch: a tensor, a tuple of arguments, or a mapping of keyword arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


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
    """The network in evaluation mode, without gradients and without a cache of past tokens; then all as before."""
    modes = {module: module.training for module in model.modules()}
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    model.eval()
    try:
        if isinstance(cached, bool):
            config.use_cache = False  # pyright: ignore[reportOptionalMemberAccess]
        with torch.no_grad():
            yield
    finally:
        if isinstance(cached, bool):
            config.use_cache = cached  # pyright: ignore[reportOptionalMemberAccess]
        for module, mode in modes.items():
            module.training = mode
