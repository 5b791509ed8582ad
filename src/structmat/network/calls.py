"""How the library calls a network on a batch: a tensor, a tuple of arguments, or a mapping of keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from structmat.network.adapters import output_names, stateless


def call(model: nn.Module, batch: Any) -> Any:
    """Call the network on one batch, and return what it returns."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


HOST = torch.device("cpu")
"""The device on which hidden states and batches wait for their turn."""


def moved(value: Any, device: torch.device, seen: dict[int, Any] | None = None) -> Any:
    """Move the tensors of a batch to a device and leave everything else alone.

    Args:
        value: A tensor, a tuple, list or mapping of such values, or anything else.
        device: The device; tensors on the meta device stay there, since they have no values.
        seen: The tensors that were moved already, by the ``id`` of the original; it grows. None for no memory.

    Returns:
        The value with its tensors on the device.
    """
    if isinstance(value, Tensor):
        seen = {} if seen is None else seen
        return seen.setdefault(id(value), value if value.is_meta else value.to(device))
    return _mapped(value, lambda one: moved(one, device, seen))


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change every entry of a mapping, tuple or list; where no entry changes, the value itself is returned."""
    if isinstance(value, Mapping):
        new = {key: change(one) for key, one in value.items()}
        return new if any(new[key] is not one for key, one in value.items()) else value
    if isinstance(value, (tuple, list)):
        entries = tuple(change(one) for one in value)
        return entries if any(a is not b for a, b in zip(entries, value, strict=True)) else value
    return value


def widened(value: Any, dtype: torch.dtype) -> Any:
    """Cast the floating-point tensors of a batch to a dtype where theirs is narrower, and leave the rest alone."""
    if isinstance(value, Tensor):
        narrow = value.is_floating_point() and torch.promote_types(value.dtype, dtype) == dtype
        return value.to(dtype) if narrow else value
    return _mapped(value, lambda one: widened(one, dtype))


def device_of(model: nn.Module, without: torch.device = HOST) -> torch.device:
    """The device of the network's first parameter, or ``without`` if there is none."""
    return next((parameter.device for parameter in model.parameters()), without)


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


def tensor_of(output: Any, names: Iterable[str] | None = None) -> Tensor:
    """The tensor that matters in what a block or a network returns.

    Args:
        output: A tensor, a tuple that begins with one, or a mapping or object that holds one.
        names: The names under which a mapping or object may hold it; None for those that ``output_names`` gives.

    Returns:
        The tensor.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    for name in output_names() if names is None else names:
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    raise TypeError(
        f"expected a tensor, or a tuple or object that holds one, from a block, got {type(output).__name__}"
    )
