"""The blocks of a network: a list of modules through which hidden states pass one after the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from structmat.network.calls import HOST, call, device_of, fresh, moved, same_draws, widened
from structmat.network.capture import Stop, hooked, stopping
from structmat.network.splitting import put_module

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
        args, kwargs = fresh((moved(args, device), moved(kwargs, device)), block)
        return block(state.to(device, copy=True), *args, **kwargs)


class _Pass(nn.Module):
    """Stands in for a block: notes how it is called, and hands the hidden state on (or another, for the last one)."""

    def __init__(self, block: nn.Module, length: int | None, notes: _Notes, last: bool) -> None:
        super().__init__()
        self.__dict__["standing_for"] = block  # not a submodule
        self.length, self.notes, self.last = length, notes, last

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["standing_for"], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Pass:
        return _Pass(self.__dict__["standing_for"], self.length, self.notes, self.last)

    def forward(self, state: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        if self.notes.entered is None:
            self.notes.entered = state
        self.notes.extras.append(Extras(args, kwargs))
        if self.notes.stop == "first" or (self.last and self.notes.stop == "last"):
            raise Stop
        if self.last and self.notes.deliver is not None:
            state = self.notes.deliver
        return state if self.length is None else (state, *[None] * (self.length - 1))


@dataclass
class _Notes:
    """What the stand-ins of all blocks share."""

    stop: str  # the block that ends the call: "first", "last", or "" for none
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
        lengths: The length of the tuple that each block returns, by name; those that return none are missing.
    """

    names: tuple[str, ...]
    returns_tuple: bool
    before: tuple[str, ...]
    lengths: Mapping[str, int] = field(default_factory=dict, compare=False)

    def outside(self, planned: Sequence[str]) -> tuple[list[str], list[str]]:
        """Sort the planned layers outside the blocks.

        Args:
            planned: The names of the planned layers.

        Returns:
            The names of those that are called before the first block, and of those called after the last.
        """
        outside = [name for name in planned if not any(name.startswith(f"{block}.") for block in self.names)]
        return [n for n in outside if n in self.before], [n for n in outside if n not in self.before]

    def enter(
        self, model: nn.Module, batches: Sequence[Any], numbers: Iterable[int] | None = None
    ) -> tuple[list[Any], list[dict[int, Extras]]]:
        """Call the network up to its blocks.

        Args:
            model: The network.
            batches: The inputs of one call each.
            numbers: The numbers of the batches that are wanted; None for all.

        Returns:
            The hidden state that the first block reads, for each batch, or None for one that is not wanted; and what
            each block is called with beside it, for each block, by the batch's number.
        """
        hidden: list[Any] = [None] * len(batches)
        extras: list[dict[int, Extras]] = [{} for _ in self.names]
        device = device_of(model)
        for i in range(len(batches)) if numbers is None else numbers:
            notes = _Notes(stop="last")
            with self._standing_in(model, notes), stopping(), same_draws(i, device):
                call(model, moved(batches[i], device))
            hidden[i] = moved(notes.entered, HOST)
            seen: dict[int, Any] = {}  # what all blocks are called with is held once
            for one, new in zip(extras, notes.extras, strict=True):
                one[i] = Extras(moved(new.args, HOST, seen), moved(new.kwargs, HOST, seen))
        return hidden, extras

    def _length(self, name: str) -> int | None:
        """The length of the tuple that a block returns, or None."""
        return self.lengths.get(name, 1) if self.returns_tuple else None

    @contextmanager
    def _standing_in(self, model: nn.Module, notes: _Notes) -> Iterator[None]:
        blocks = {name: model.get_submodule(name) for name in self.names}
        try:
            for name, block in blocks.items():
                put_module(model, name, _Pass(block, self._length(name), notes, name == self.names[-1]))
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
        deliver: Whether the last block hands on the given state; otherwise the first block ends the call.
    """

    def __init__(self, model: nn.Module, chain: Chain, batches: Sequence[Any], deliver: bool = True) -> None:
        self._model, self._chain, self._batches, self._deliver = model, chain, batches, deliver
        self._notes = _Notes(stop="" if deliver else "first")

    @contextmanager
    def hung(self) -> Iterator[None]:
        """While it is entered, stand-ins are in the blocks' places."""
        with self._chain._standing_in(self._model, self._notes):
            yield

    def call(self, model: nn.Module, state: Any, i: int) -> Any:
        """Call the network, or a copy made while the stand-ins hang, on batch ``i``.

        Args:
            model: The network or the copy.
            state: The hidden state that the last block hands on.
            i: The batch's number.

        Returns:
            What the network returns; None where the first block ended the call.
        """
        device = device_of(model)
        self._notes.deliver = state.to(device, copy=True) if self._deliver else None
        self._notes.extras = []
        with stopping():
            return call(model, moved(self._batches[i], device))


def find_chain(model: nn.Module, planned: Mapping[str, Sequence[str]], batch: Any) -> Chain | None:
    """Find the list of blocks through which the hidden states pass, by calling the network.

    A list of modules is the chain if most planned layers lie in it, its modules are called once each and in order, each
    on the tensor that the one before returned, and nothing else that they are called with comes out of a block. The
    blocks are then called one by one: a chain whose states are not those of the network, to the last bit, is none, and
    a warning says so. The same holds where something outside a block calls a planned layer that lies in it.

    Args:
        model: The network, in evaluation mode.
        planned: Every name of each planned layer, by its first name.
        batch: The inputs of the call.

    Returns:
        The chain, or None if the network has none.
    """
    blocks = list_of_blocks(model, planned)
    if not blocks:
        return None
    seen = _observe(model, blocks, planned, batch)
    if not _passes_on(seen.calls, blocks):
        return None
    lengths = {name: len(output) for name, _, _, output in seen.calls if isinstance(output, tuple)}
    chain = Chain(tuple(blocks), bool(lengths), tuple(dict.fromkeys(seen.before)), lengths)
    difference = f"{seen.strays[0]!r} is called from outside too" if seen.strays else None
    difference = difference or _difference(chain, model, batch, seen)
    if difference is not None:
        warnings.warn(
            f"the blocks {blocks[0]!r} to {blocks[-1]!r} cannot be called one by one ({difference}); the whole network "
            "is compressed as one block, in a copy of all of it",
            stacklevel=2,
        )
        return None
    return chain


def list_of_blocks(model: nn.Module, planned: Mapping[str, Sequence[str]]) -> list[str]:
    """Find the longest list of modules, each of them there once, that holds most of the planned layers.

    Args:
        model: The network, which is not called.
        planned: Every name of each planned layer, by its first name.

    Returns:
        The names of the modules, in order; none if there is no such list.
    """
    candidates = [
        [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
    ]
    blocks = max((one for one in candidates if len(one) > 1 and _holds(one, planned)), key=len, default=[])
    return blocks if len({id(model.get_submodule(name)) for name in blocks}) == len(blocks) else []


@dataclass
class _Seen:
    """What was seen in a call of the network: calls of the blocks, their states, and what layers outside them read.

    The strays are layers in blocks that were called while their block was not.
    """

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    read: dict[str, list[Tensor]] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)


def _passes_on(calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]], blocks: Sequence[str]) -> bool:
    """Whether each block is called once, in order, on what the one before returned and on nothing else of a block."""
    if [name for name, *_ in calls] != list(blocks) or not all(_is_state(args) for _, args, _, _ in calls):
        return False
    outputs = [_state_in(output) for *_, output in calls]
    if any(output is None for output in outputs) or len({isinstance(output, tuple) for *_, output in calls}) > 1:
        return False
    made: set[int] = set()  # by the blocks so far
    for k, (_, args, kwargs, output) in enumerate(calls):
        if k and args[0] is not outputs[k - 1]:
            return False
        if any(id(tensor) in made for tensor in _tensors((args[1:], kwargs))):
            return False
        made |= {id(tensor) for tensor in _tensors(output)}
    return True


def _difference(chain: Chain, model: nn.Module, batch: Any, seen: _Seen) -> str | None:
    """Call the blocks one by one, and tell what is not as it was in the network; None if everything is."""
    try:
        hidden, extras = chain.enter(model, [batch])
        state = hidden[0]
        for name, extra, expected in zip(chain.names, extras, seen.states, strict=True):
            block = model.get_submodule(name)
            with same_draws(0, device_of(block)):
                found = _state_in(extra[0].call(block, state))
            if found is None or not _identical(found, expected):
                return f"{name!r} then returns something else"
            state = found.to(HOST)
        relay = Relay(model, chain, [batch])
        read: dict[str, list[Tensor]] = {}
        parts = {name: model.get_submodule(name) for name in seen.read if name not in chain.before}
        with relay.hung(), hooked(parts, before=_reader(read)), same_draws(0, device_of(model)):
            relay.call(model, state, 0)
    except Exception as error:  # of the network's own code, which may not bear to be called in parts
        return f"that raises {type(error).__name__}: {' '.join(str(error).split())}"
    same = all(
        len(read.get(name, [])) == len(seen.read[name])
        and all(_identical(a, b) for a, b in zip(read[name], seen.read[name], strict=True))
        for name in parts
    )
    return None if same else "layers after the blocks then read something else"


def _identical(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are the same to the last bit, NaN included."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool(((first == second) | ((first != first) & (second != second))).all())


def _reader(read: dict[str, list[Tensor]]) -> Callable[[str, nn.Module, tuple[Any, ...]], None]:
    """Make a function that keeps copies of what layers read."""

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        read.setdefault(name, []).append(args[0].clone())

    return note


def _holds(blocks: Sequence[str], planned: Mapping[str, Sequence[str]]) -> bool:
    """Whether enough of the planned layers lie in these blocks, each of those in one alone, and none is one itself."""
    homes = {name: {_inside(user, blocks) for user in users} for name, users in planned.items()}
    inside = [name for name, blocks_of in homes.items() if blocks_of != {None}]
    bare = any(user in blocks for users in planned.values() for user in users)
    return not bare and len(inside) >= LEAST_SHARE * len(planned) and all(len(homes[name]) == 1 for name in inside)


def _inside(name: str, blocks: Sequence[str]) -> str | None:
    return next((block for block in blocks if name.startswith(f"{block}.")), None)


def _observe(model: nn.Module, blocks: Sequence[str], planned: Mapping[str, Sequence[str]], batch: Any) -> _Seen:
    """Call the network, and note how each block is called and what it returns, and what the other layers read."""
    seen, started, running = _Seen(), list[str](), set[str]()
    keep = _reader(seen.read)
    homes = {user: home for users in planned.values() for user in users if (home := _inside(user, blocks))}

    def enter(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        started.append(name)
        running.add(name)

    def leave(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        running.discard(name)
        seen.calls.append((name, args, kwargs, output))
        state = _state_in(output)
        seen.states += [] if state is None else [state.clone()]

    def inside(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.strays += [] if homes[name] in running else [name]

    def outside(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        keep(name, module, args)
        if not started:
            seen.before.append(name)

    def parts(names: Iterable[str]) -> dict[str, nn.Module]:
        return {name: model.get_submodule(name) for name in names}

    with (
        hooked(parts(blocks), before=enter, after=leave),
        hooked(parts(homes), before=inside),
        hooked(parts(name for name in planned if not _inside(name, blocks)), before=outside),
        same_draws(0, device_of(model)),
    ):
        call(model, batch)
    return seen


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
