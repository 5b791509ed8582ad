"""How the library calls a network on a batch: a tensor, a tuple of arguments, or a mapping of keyword arguments."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from structmat.network.adapters import output_names, stateless


def call(model: nn.Module, batch: Any) -> Any:
    """Call the network on one batch, and return what it returns; what the network writes into is a copy."""
    if isinstance(batch, Mapping):
        return model(**{name: fresh(value, model) for name, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        return model(*(fresh(value, model) for value in inputs_of(model, batch)))
    return model(fresh(batch, model))


def inputs_of(model: nn.Module, batch: Sequence[Any]) -> Sequence[Any]:
    """The arguments in a tuple or list: without the label in a pair ``(input, label)`` of a ``DataLoader``.

    Args:
        model: The network.
        batch: The tuple or list.

    Returns:
        The first of a pair where the network takes one argument by position, or is a model of transformers and the
        second is one class per example; otherwise everything.
    """
    if len(batch) != 2:
        return batch
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    several = any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters)
    lone = not several and sum(one.kind in kinds for one in parameters) == 1
    label = batch[1]
    classes = isinstance(label, Tensor) and label.ndim == 1 and not label.is_floating_point()
    return batch[:1] if lone or (classes and hasattr(model, "main_input_name")) else batch


def fresh(value: Any, model: nn.Module) -> Any:
    """Copy everything in a batch that a call may write into, such as a cache of past tokens.

    Args:
        value: A batch, or an argument of a block.
        model: The network; its modules and parameters are never copied.

    Returns:
        The value with copies of tensors and other objects; numbers, texts and parts of the network are the same.
    """
    if isinstance(value, Tensor):
        return value.clone()
    if value is None or isinstance(
        value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, nn.Module)
    ):
        return value
    if type(value) is dict:
        return {key: fresh(one, model) for key, one in value.items()}
    if type(value) in (tuple, list):
        return type(value)(fresh(one, model) for one in value)
    kept: dict[int, Any] = {id(part): part for part in (*model.modules(), *model.parameters(), *model.buffers())}
    return copy.deepcopy(value, {**_computed_in(value), **kept})


def _computed_in(value: Any) -> dict[int, Any]:
    """Copies of the tensors in an object that were computed from others, which ``deepcopy`` refuses, by ``id``."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, Tensor):
            if not one.is_leaf:
                found[id(one)] = one.detach().clone()
        elif id(one) not in seen and not isinstance(one, nn.Module):
            seen.add(id(one))
            parts = one.values() if isinstance(one, Mapping) else one if isinstance(one, (tuple, list)) else ()
            left += [*parts, *vars(one).values()] if hasattr(one, "__dict__") else parts
    return found


def copied(module: nn.Module) -> Any:
    """Copy a module with all that it holds; a tensor that was computed from parameters is copied by value."""
    computed: dict[int, Any] = {}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                computed[id(value)] = value.detach().clone()
    return copy.deepcopy(module, computed)


@contextmanager
def same_draws(seed: int, device: torch.device) -> Iterator[None]:
    """Let everything inside draw the same random numbers each time, and leave the generators outside alone.

    Args:
        seed: The seed; calls on one batch have one seed, dense or compressed.
        device: The device on which random numbers may be drawn, beside the CPU.
    """
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would queue a seed for each absent kind of device
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Compute as outside of any inference mode, autocast and changed default dtype, while the context is entered."""
    grad, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(grad))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


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


def eager(model: nn.Module) -> AbstractContextManager[object]:
    """A context in which compiled parts of the network run uncompiled, so that they see hooks."""
    compiled = any(
        getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, without gradients and without state between calls; then all as before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with stateless(model), eager(model), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def tensors_of(output: Any) -> list[Tensor]:
    """All floating-point tensors in what a network returns, but for single numbers such as a loss.

    Args:
        output: A tensor, or a tuple, list, mapping or object of tensors.

    Returns:
        The tensors in the order in which they stand, each once.
    """
    found: dict[int, Tensor] = {}

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.ndim:
                found.setdefault(id(value), value)
        elif isinstance(value, (tuple, list, Mapping)):
            for one in value.values() if isinstance(value, Mapping) else value:
                collect(one)
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module):
            for one in vars(value).values():
                collect(one)

    collect(output)
    return list(found.values())


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
