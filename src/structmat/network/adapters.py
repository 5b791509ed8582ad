"""What the core asks of frameworks whose models it works on: integrations register an adapter, and the core calls it.

The core itself knows no framework. A network that is made of plain modules needs no adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn


def _leave(model: nn.Module) -> None:
    """Do nothing."""


def _as_it_is(model: nn.Module) -> AbstractContextManager[object]:
    """Enter and leave without a change."""
    return nullcontext()


def _unknown(model: nn.Module) -> Any:
    """Know nothing of the network."""


@dataclass(frozen=True)
class Adapter:
    """What one framework adds to the core.

    Attributes:
        record: Writes into the configurations of the framework's models in a network which of their layers are
            structured, so that the framework's own way of saving works; called after every surgery.
        stateless: A context in which the framework's models in a network keep no state from one call to the next, such
            as a cache of past tokens.
        outputs: The names under which the framework's models return the tensor that matters, the best one first.
        signature: Finds the ``Signature`` of one of the framework's models, for exporters; None for other networks, and
            for models whose inputs the framework does not tell.
    """

    record: Callable[[nn.Module], None] = _leave
    stateless: Callable[[nn.Module], AbstractContextManager[object]] = _as_it_is
    outputs: tuple[str, ...] = ()
    signature: Callable[[nn.Module], Any] = _unknown


ADAPTERS: dict[str, Adapter] = {"torch": Adapter(outputs=("logits",))}
"""The adapter of every framework that is in use, by the framework's name."""


def register_adapter(name: str, adapter: Adapter) -> None:
    """Let the core work on the models of a framework.

    Args:
        name: The framework's name; a second registration replaces the first.
        adapter: What the framework adds.
    """
    ADAPTERS[name] = adapter


def record(model: nn.Module) -> None:
    """Let every framework write down what the network is now made of."""
    for adapter in ADAPTERS.values():
        adapter.record(model)


@contextmanager
def stateless(model: nn.Module) -> Iterator[None]:
    """Keep the network from carrying state over from one call to the next, while the context is entered."""
    with ExitStack() as stack:
        for adapter in ADAPTERS.values():
            stack.enter_context(adapter.stateless(model))
        yield


def output_names() -> tuple[str, ...]:
    """The names under which a network may return the tensor that matters, the best one first."""
    return tuple(dict.fromkeys(name for adapter in ADAPTERS.values() for name in adapter.outputs))
