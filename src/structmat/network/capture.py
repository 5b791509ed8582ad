"""What flows through the layers of a network while it is called: the one owner of hooks, and of ending a call early."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from structmat import _ranks
from structmat.network.calls import call, evaluating
from structmat.network.sites import DENSE_KINDS, Site
from structmat.nn import StructuredConv, StructuredConvTranspose

Before = Callable[[str, nn.Module, tuple[Any, ...]], object]
"""A function that is called before a module runs, with the module's name, the module, and its positional arguments."""

After = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""A function that is called after a module ran: name, module, positional and keyword arguments, and the output.

What it returns takes the output's place, unless it is None.
"""


Counted = Callable[[str, Tensor], Tensor | None]
"""A function of a layer's name and input ``(..., N)`` that says which of its vectors count; None for all of them."""


class Stop(BaseException):
    """Ends a call of the network once everything that was wanted is there."""


@contextmanager
def stopping() -> Iterator[None]:
    """Let a ``Stop`` that is raised inside end what is inside, and nothing more."""
    try:
        yield
    except Stop:
        return


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], *, before: Before | None = None, after: After | None = None
) -> Iterator[None]:
    """Call functions before and after modules run, while the context is entered.

    Args:
        modules: The modules by the name under which the functions are told of them.
        before: The function that is called before a module runs; None for none.
        after: The function that is called after a module ran; None for none.
    """

    def before_hook(name: str, told: Before) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            told(name, module, args)

        return hook

    def after_hook(name: str, told: After) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            return told(name, module, args, kwargs, output)

        return hook

    with ExitStack() as stack:
        for name, module in modules.items():
            if before is not None:
                stack.callback(module.register_forward_pre_hook(before_hook(name, before)).remove)
            if after is not None:
                stack.callback(module.register_forward_hook(after_hook(name, after), with_kwargs=True).remove)
        yield


def count_vectors(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Any
) -> dict[str, Counter[tuple[int, torch.dtype]]]:
    """Count how often each layer multiplies how many vectors, and in which dtype, in one call of the network.

    Args:
        model: The network, which is called in evaluation mode.
        layers: The linear layers and convolutions to watch, dense or structured, by name.
        batch: The inputs of the call.

    Returns:
        The number of calls by vectors and dtype, for each layer; calls on no vector are left out.
    """
    counts: dict[str, Counter[tuple[int, torch.dtype]]] = {name: Counter() for name in layers}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        vectors = vectors_in(module, args, output)
        if vectors:
            counts[name].update([(vectors, output.dtype)])

    with evaluating(model), hooked(layers, after=note):
        call(model, batch)
    return counts


def vectors_in(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> int:
    """The number of vectors that a layer multiplied.

    Args:
        layer: The layer, dense or structured.
        inputs: The positional arguments of the call.
        output: What the layer returned.

    Returns:
        The tokens of a linear layer, the output positions of a convolution, the input positions of a transposed one.
    """
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, StructuredConvTranspose)):
        return inputs[0].numel() // layer.in_channels
    channels = layer.out_channels if isinstance(layer, (nn.Conv1d, nn.Conv2d, StructuredConv)) else output.shape[-1]
    return output.numel() // channels if channels else 0


def shared_inputs(sites: Mapping[str, Site], runs: Iterable[Callable[[], object]]) -> tuple[dict[str, str], set[str]]:
    """Find for each site, in the order in which they are called, the first one that reads the same input.

    Args:
        sites: The sites by name.
        runs: Calls of the network, one for each batch; as many are made as are needed to reach every site, each by the
            process that works on the batch.

    Returns:
        The leader's name by name, and the names of the sites that are called once.

    Raises:
        ValueError: If a site is not called in any run.
    """
    calls: dict[str, list[_Read]] = {}
    many: set[str] = set()
    for number, run in enumerate(runs):
        ranks = _ranks.current()
        seen = ranks.of(ranks.owner(number), functools.partial(_reads, sites, run, number))
        many |= {name for name, reads in seen.items() if len(reads) > 1}
        for name, reads in seen.items():
            calls.setdefault(name, []).extend(reads)
        if len(calls) == len(sites):
            break
    missing = [site.name for name, site in sites.items() if name not in calls]
    if missing:
        raise ValueError(
            f"the calibration data never reaches {missing}; give data that does, or exclude these layers from the plan"
        )
    leaders: dict[str, str] = {}
    for name, reads in calls.items():
        same = (
            other
            for other in leaders.values()
            if calls[other] == reads
            and type(sites[other].module) is type(sites[name].module)
            and DENSE_KINDS[type(sites[name].module)].reads_all
        )
        leaders[name] = next(same, name)
    return leaders, set(calls) - many


_Read = tuple[int, int, int]
"""What a layer reads in a call: the run's number, the input's ``id``, and how often it had been changed in place."""


def _reads(sites: Mapping[str, Site], run: Callable[[], object], number: int) -> dict[str, list[_Read]]:
    """What each site reads in one run, in the order in which they are called."""
    seen: dict[str, list[_Read]] = {}
    alive: list[Tensor] = []  # so that no two inputs have one ``id``

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        version = 0 if inputs[0].is_inference() else inputs[0]._version
        alive.append(inputs[0])
        seen.setdefault(name, []).append((number, id(inputs[0]), version))

    with _watched(sites, note):
        run()
    return seen


@contextmanager
def capturing(
    sites: Mapping[str, Site], counted: Counted | None = None, *, stop: bool = False
) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the inputs of sites as vectors ``(T, N)``, while the context is entered.

    Args:
        sites: The sites by name.
        counted: Which vectors count, by the site's own name; None for all.
        stop: Whether the first input ends what is inside.

    Yields:
        The vectors of each call by the sites' names; those of sites that were not called are missing.
    """
    captured: dict[str, list[Tensor]] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        captured.setdefault(name, []).append(_vectors(sites[name].name, module, inputs[0], counted))
        if stop:
            raise Stop

    with stopping(), _watched(sites, note):
        yield captured


@contextmanager
def capturing_gradients(sites: Mapping[str, Site], counted: Counted | None = None) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the gradients at the outputs of sites as vectors ``(T, M)``, while the context is entered.

    The network is called inside, and its loss backpropagated; no parameter needs a gradient for that.

    Args:
        sites: The sites by name.
        counted: Which vectors count, by the site's own name; None for all.

    Yields:
        The vectors of each call, the last call first, by the sites' names; those that no gradient reached are missing.
    """
    captured: dict[str, list[Tensor]] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        def keep(gradient: Tensor) -> None:
            rows = DENSE_KINDS[type(module)].gradients(module, gradient)
            mask = None if counted is None else counted(sites[name].name, rows)
            vectors = rows.reshape(-1, rows.shape[-1]) if mask is None else rows[mask]
            captured.setdefault(name, []).append(vectors.detach())

        kept = output if output.requires_grad else output.detach().requires_grad_()
        kept.register_hook(keep)
        return kept if output.requires_grad else kept * 1  # what follows may change it in place

    with ExitStack() as stack:
        for name, site in sites.items():
            for module in site.modules:
                stack.enter_context(hooked({name: module}, after=note))
        yield captured


@contextmanager
def _watched(sites: Mapping[str, Site], note: Before) -> Iterator[None]:
    """Tell of every call of every module of the sites."""
    with ExitStack() as stack:
        for name, site in sites.items():
            for module in site.modules:
                stack.enter_context(hooked({name: module}, before=note))
        yield


def _vectors(name: str, module: nn.Module, x: Tensor, counted: Counted | None) -> Tensor:
    """A copy of what the layer's matrix multiplies, ``(T, N)``, without the vectors that do not count."""
    x = DENSE_KINDS[type(module)].vectors(module, x)
    mask = None if counted is None else counted(name, x)
    vectors = x.reshape(-1, x.shape[-1]).clone() if mask is None else x[mask]
    if not torch.isfinite(vectors).all():
        raise FloatingPointError(f"the input of layer {name!r} is not finite; check the calibration data and the dtype")
    return vectors
