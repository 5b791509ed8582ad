"""What a network is as a function of tensors alone: its inputs and outputs by name, and which of their axes vary."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from structmat.network.adapters import ADAPTERS

Axes = Mapping[str, Mapping[int, str]]
"""The names of the axes that may have any length, by their positions, by the name of the input."""

BATCH, SEQUENCE = "batch", "sequence"


@dataclass(frozen=True)
class Signature:
    """A network as a function that takes tensors one after the other and returns a tuple of tensors.

    Attributes:
        module: The function.
        inputs: The names of the inputs in their order.
        outputs: The names of the outputs in their order.
        axes: The axes that may have any length; axes of one name have one length. A name such as ``"past + sequence"``
            stands for a sum.
        draw: Makes random inputs, given the length of each axis by name and a source of randomness.
        sizes: The lengths of the axes in the example from which a graph is recorded; none of them is 0 or 1.
        smallest: The smallest length of axes that may be shorter than 1, by name.
        limits: The largest length of each axis, by name; empty where there are none.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: Axes
    draw: Callable[[Mapping[str, int], torch.Generator], tuple[Tensor, ...]]
    sizes: Mapping[str, int]
    smallest: Mapping[str, int]
    limits: Mapping[str, int] = field(default_factory=dict)

    def resized(self, sizes: Mapping[str, int]) -> Signature:
        """The signature with an example of other sizes; sums follow from their terms."""
        return replace(self, sizes=with_sums(self.sizes, sizes))

    def limited(self, limits: Mapping[str, int]) -> Signature:
        """The signature with a largest length for each axis; sums follow from their terms."""
        return replace(self, limits=with_sums(self.sizes, limits))


def with_sums(names: Iterable[str], lengths: Mapping[str, int]) -> dict[str, int]:
    """The lengths of axes by name, where a name such as ``"past + sequence"`` stands for the sum of others."""
    return {name: sum(lengths[term.strip()] for term in name.split("+")) for name in names}


def signature_of(model: nn.Module, inputs: Any = None, axes: Axes | None = None) -> Signature:
    """Find the signature of a network.

    Args:
        model: The network.
        inputs: A batch: a tensor, a tuple of arguments, or a mapping of keyword arguments, all of them tensors. None
            for networks whose framework knows their inputs.
        axes: The axes that may have any length; None for the first axis of every input, and the second of those that
            are sequences: whole numbers, or floating-point numbers of three dimensions.

    Returns:
        The signature.

    Raises:
        ValueError: If there are no inputs and no framework knows the network, or axes are given without inputs.
    """
    if inputs is not None:
        return _of_batch(model, inputs, axes)
    if axes is not None:
        raise ValueError("expected inputs to which the axes belong, got axes alone; pass inputs=batch too")
    for adapter in ADAPTERS.values():
        found = adapter.signature(model)
        if found is not None:
            return found
    raise ValueError(
        f"expected inputs=batch for a {type(model).__name__}, whose inputs no framework tells, got none; pass a tensor "
        "or a tuple or mapping of tensors"
    )


class Flat(nn.Module):
    """A network that takes its tensors one after the other, and returns those of its output in a tuple.

    Args:
        model: The network.
        keywords: The names under which the network takes the tensors; None for their places.
    """

    def __init__(self, model: nn.Module, keywords: tuple[str, ...] | None) -> None:
        super().__init__()
        self.model, self.keywords = model, keywords

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the network."""
        if self.keywords is None:
            output = self.model(*tensors)
        else:
            output = self.model(**dict(zip(self.keywords, tensors, strict=True)))
        return tuple(named_tensors(output).values())


def named_tensors(output: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors in what a network returns, by name: the keys of mappings and the places in tuples, joined by dots."""
    if isinstance(output, Tensor):
        return {name or "output": output}
    if isinstance(output, Mapping):
        parts = dict(output)
    elif isinstance(output, (tuple, list)):
        parts = dict(enumerate(output))
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, value in parts.items():
        first = key if isinstance(key, str) else f"output.{key}"
        found |= named_tensors(value, f"{name}.{key}" if name else first)
    return found


def _of_batch(model: nn.Module, inputs: Any, axes: Axes | None) -> Signature:
    """The signature of a network that takes such a batch."""
    tensors, keywords = _tensors_of_batch(model, inputs)
    axes = {name: _usual_axes(tensor) for name, tensor in tensors.items()} if axes is None else axes
    _check_axes(tensors, axes)
    lengths = {name: max(2, size) for name, size in _lengths(tensors, axes).items()}
    module = Flat(model, keywords)
    with torch.no_grad():
        outputs = tuple(named_tensors(model(**tensors) if keywords else model(*tensors.values())))
    if not outputs:
        raise ValueError(f"expected a network that returns tensors, got a {type(model).__name__} that returns none")

    def draw(sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(_resampled(tensor, axes.get(name, {}), sizes, generator) for name, tensor in tensors.items())

    return Signature(module, tuple(tensors), outputs, axes, draw, lengths, {})


def _tensors_of_batch(model: nn.Module, inputs: Any) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """The tensors of a batch by name, and their keywords where it is a mapping."""
    if isinstance(inputs, Mapping):
        tensors, keywords = dict(inputs), tuple(inputs)
    else:
        values = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
        names = [name for name in inspect.signature(model.forward).parameters if name not in ("args", "kwargs")]
        names += [f"input.{k}" for k in range(len(names), len(values))]
        tensors, keywords = dict(zip(names, values, strict=False)), None
    wrong = [name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]
    if wrong or not tensors:
        got = f"a {type(tensors[wrong[0]]).__name__} for {wrong[0]!r}" if wrong else "none"
        raise TypeError(f"expected inputs that are tensors, got {got}; leave out arguments that are no tensors")
    return tensors, keywords


def _usual_axes(tensor: Tensor) -> dict[int, str]:
    """The axes that usually vary."""
    floating = tensor.is_floating_point()
    is_sequence = tensor.ndim == 3 if floating else tensor.ndim >= 2
    return {0: BATCH, 1: SEQUENCE} if is_sequence else {0: BATCH} if tensor.ndim else {}


def _check_axes(tensors: Mapping[str, Tensor], axes: Axes) -> None:
    for name, named in axes.items():
        if name not in tensors:
            raise ValueError(f"expected axes of the inputs {', '.join(tensors)}, got some of {name!r}")
        wrong = [axis for axis in named if not 0 <= axis < tensors[name].ndim]
        if wrong:
            raise ValueError(f"expected axes from 0 to {tensors[name].ndim - 1} of {name!r}, got {wrong[0]}")


def _lengths(tensors: Mapping[str, Tensor], axes: Axes) -> dict[str, int]:
    """The length of each axis by its name; axes of one name that have several are refused."""
    lengths: dict[str, int] = {}
    for name, named in axes.items():
        for axis, own in named.items():
            size = tensors[name].shape[axis]
            if lengths.setdefault(own, size) != size:
                raise ValueError(
                    f"expected axes named {own!r} of one length, got {lengths[own]} and {size} in {name!r}; give them "
                    "other names with axes"
                )
    return lengths


def _resampled(
    tensor: Tensor, named: Mapping[int, str], sizes: Mapping[str, int], generator: torch.Generator
) -> Tensor:
    """A tensor of other lengths, put together from slices of this one at random."""
    for axis, name in named.items():
        index = torch.randint(tensor.shape[axis], (sizes[name],), generator=generator)
        tensor = tensor.index_select(axis, index.to(tensor.device))
    spread = tensor.float().std() if tensor.is_floating_point() and tensor.numel() > 1 else torch.zeros(())
    if spread.isfinite() and spread > 0:  # masks may hold infinities
        tensor = tensor + torch.randn(tensor.shape, generator=generator).to(tensor) * spread.to(tensor)
    return tensor.contiguous()
