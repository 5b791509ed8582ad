"""The blocks of a network: a list of modules through which hidden states pass one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from structmat.network.calls import HOST, call, device_of, moved, widened
from structmat.network.capture import Stop, hooked, stopping
from structmat.network.surgery import put_module

LEAST_SHARE = 0.8
"""A list is the network's chain of blocks only if at least this share of the planned layers lies in it."""


@dataclass(frozen=True)
class Extras:
    """What a block is called with beside the hidden state.

    Attributes:
        args: The positional arguments after the hidden state.
        kwargs: The keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def call(self, block: nn.Module, state: Tensor) -> Any:
        """Call the block on a copy of a hidden state, since some blocks add to it; the rest becomes as wide as that.

        Args:
            block: The block, dense or compressed.
            state: The hidden state; it moves to the device of the block, and so do the extras.

        Returns:
            What the block returns.
        """
        device = device_of(block, state.device)
        args, kwargs = widened((self.args, dict(self.kwargs)), state.dtype)
        return block(state.to(device, copy=True), *moved(args, device), **moved(kwargs, device))


class _Pass(nn.Module):
    """Stands in for a block: notes how it is called, and hands the hidden state on (or another, for the last one)."""

    def __init__(self, block: nn.Module, returns_tuple: bool, notes: _Notes, last: bool) -> None:
        super().__init__()
        self.__dict__["standing_for"] = block  # not a submodule
        self.returns_tuple, self.notes, self.last = returns_tuple, notes, last

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["standing_for"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Pass:
        return _Pass(self.__dict__["standing_for"], self.returns_tuple, self.notes, self.last)

    def forward(self, state: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.notes.entered is None:
            self.notes.entered = state
        self.notes.extras.append(Extras(args, kwargs))
        if self.last and self.notes.stop:
            raise Stop
        if self.last and self.notes.deliver is not None:
            state = self.notes.deliver
        return (state,) if self.returns_tuple else state


@dataclass
class _Notes:
    """What the stand-ins of all blocks share."""

    stop: bool
    entered: Tensor | None = None
    extras: list[Extras] = field(default_factory=list)
    deliver: Tensor | None = None


@dataclass(frozen=True)
class Chain:
    """The blocks of a network.

    Attributes:
        names: The names of the blocks, in order.
        returns_tuple: Whether a block returns a tuple that begins with the hidden state, or the hidden state itself.
        before: The planned layers that are called before the first block.
    """

    names: tuple[str, ...]
    returns_tuple: bool
    before: tuple[str, ...]

    def outside(self, planned: Sequence[str]) -> tuple[list[str], list[str]]:
        """Sort the planned layers outside the blocks.

        Args:
            planned: The names of the planned layers.

        Returns:
            The names of those that are called before the first block, and of those called after the last.
        """
        outside = [name for name in planned if not any(name.startswith(f"{block}.") for block in self.names)]
        return [n for n in outside if n in self.before], [n for n in outside if n not in self.before]

    def enter(self, model: nn.Module, batches: Sequence[Any]) -> tuple[list[Tensor], list[list[Extras]]]:
        """Call the network up to its blocks.

        Args:
            model: The network.
            batches: The inputs of one call each.

        Returns:
            The hidden state that the first block reads, for each batch, and what each block is called with beside it,
            for each block and batch.
        """
        hidden: list[Tensor] = []
        extras: list[list[Extras]] = [[] for _ in self.names]
        for batch in batches:
            notes = _Notes(stop=True)
            with self._standing_in(model, notes), stopping():
                call(model, moved(batch, device_of(model)))
            if notes.entered is not None:
                hidden.append(moved(notes.entered, HOST))
            seen: dict[int, Any] = {}  # what all blocks are called with is held once
            for one, new in zip(extras, notes.extras, strict=True):
                one.append(Extras(moved(new.args, HOST, seen), moved(new.kwargs, HOST, seen)))
        return hidden, extras

    @contextmanager
    def _standing_in(self, model: nn.Module, notes: _Notes) -> Iterator[None]:
        blocks = {name: model.get_submodule(name) for name in self.names}
        try:
            for name, block in blocks.items():
                put_module(model, name, _Pass(block, self.returns_tuple, notes, name == self.names[-1]))
            yield
        finally:
            for name, block in blocks.items():
                put_module(model, name, block)


class Relay:
    """The network without its blocks: what comes after them is called on hidden states that are at hand.

    Args:
        model: The network.
        chain: The blocks of the network.
        batches: The inputs of one call each.
        deliver: Whether the last block hands on the given state; otherwise what the first one got.
    """

    def __init__(self, model: nn.Module, chain: Chain, batches: Sequence[Any], deliver: bool = True) -> None:
        self._model, self._chain, self._batches, self._deliver = model, chain, batches, deliver
        self._notes = _Notes(stop=False)

    @contextmanager
    def hung(self) -> Iterator[None]:
        """While it is entered, stand-ins are in the blocks' places."""
        with self._chain._standing_in(self._model, self._notes):
            yield

    def call(self, model: nn.Module, state: Any, i: int) -> Any:
        """Call the network, or a copy made while the stand-ins hang, on batch ``i``."""
        device = device_of(model)
        self._notes.deliver = state.to(device, copy=True) if self._deliver else None
        self._notes.extras = []
        return call(model, moved(self._batches[i], device))


def find_chain(model: nn.Module, planned: Mapping[str, Sequence[str]], batch: Any) -> Chain | None:
    """Find the list of blocks through which the hidden states pass, by calling the network once.

    A list of modules is the chain if most planned layers lie in it, its modules are called once each and in order, each
    on the tensor that the one before returned, and nothing else that they are called with comes out of a block.

    Args:
        model: The network.
        planned: Every name of each planned layer, by its first name.
        batch: The inputs of the call.

    Returns:
        The chain, or None if the network has none.
    """
    candidates = [
        (name, [f"{name}.{child}" if name else child for child, _ in module.named_children()])
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
    ]
    candidates = [(name, blocks) for name, blocks in candidates if len(blocks) > 1 and _holds(blocks, planned)]
    if not candidates:
        return None
    blocks = max((blocks for _, blocks in candidates), key=len)
    if len({id(model.get_submodule(name)) for name in blocks}) < len(blocks):
        return None
    calls, before = _observe(model, blocks, [name for name in planned if not _inside(name, blocks)], batch)
    if [name for name, *_ in calls] != blocks or not all(_is_state(args) for _, args, _, _ in calls):
        return None
    made: set[int] = set()  # by the blocks so far
    for k, (_, args, kwargs, output) in enumerate(calls):
        if k and args[0] is not _state_in(calls[k - 1][3]):
            return None
        if any(id(tensor) in made for tensor in _tensors((args[1:], kwargs))):
            return None
        made |= {id(tensor) for tensor in _tensors(output)}
    if any(_state_in(output) is None for *_, output in calls):
        return None
    return Chain(tuple(blocks), isinstance(calls[0][3], tuple), tuple(before))


def _holds(blocks: Sequence[str], planned: Mapping[str, Sequence[str]]) -> bool:
    """Whether enough of the planned layers lie in these blocks, each of those in one alone, and none is one itself."""
    homes = {name: {_inside(user, blocks) for user in users} for name, users in planned.items()}
    inside = [name for name, blocks_of in homes.items() if blocks_of != {None}]
    bare = any(user in blocks for users in planned.values() for user in users)
    return not bare and len(inside) >= LEAST_SHARE * len(planned) and all(len(homes[name]) == 1 for name in inside)


def _inside(name: str, blocks: Sequence[str]) -> str | None:
    return next((block for block in blocks if name.startswith(f"{block}.")), None)


def _observe(
    model: nn.Module, blocks: Sequence[str], outside: Sequence[str], batch: Any
) -> tuple[list[tuple[str, tuple[Any, ...], dict[str, Any], Any]], list[str]]:
    """Find how each block is called and what it returns, in order, and which other layers are called before them."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
    started: list[str] = []
    before: list[str] = []

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((name, args, kwargs, output))

    def early(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not started:
            before.append(name)

    parts = {name: model.get_submodule(name) for name in (*blocks, *outside)}
    with (
        hooked({name: parts[name] for name in blocks}, before=lambda name, *_: started.append(name), after=note),
        hooked({name: parts[name] for name in outside}, before=early),
    ):
        call(model, batch)
    return calls, before


def _is_state(args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], Tensor)


def _state_in(output: Any) -> Tensor | None:
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
