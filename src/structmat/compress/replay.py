"""What parts of a block return once their layers are fitted: computed once, and given back in later calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from structmat.network.calls import HOST, device_of

REPLAYED_BYTES = 4 * 2**30
"""The most memory in bytes for what parts return; beyond it, they are computed again."""

CONSTANT = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))
"""What a part may be given beside tensors and containers: what it cannot change."""


class Replay:
    """What complete parts of a block return, batch by batch.

    A block is called once for each layer that is fitted, each time on the same states. Whatever comes before that layer
    is fitted already, so that most of each call would repeat the one before. A part is a module below the block whose
    planned layers are all fitted; the largest ones that are called are replayed. A part is computed each time if a call
    of the block calls it more than once, or if it draws random numbers, changes what it is given, or takes or returns
    something other than tensors and constants.

    Args:
        planned: The names of the planned layers within the block, those by which else they are known included.

    Attributes:
        keeping: Whether what parts return is kept, for calls to come.
        disabled: Whether everything is computed, since a replay was not what a call returned.
        nbytes: The memory of what is kept, in bytes.
    """

    def __init__(self, planned: Sequence[str] = ()) -> None:
        self.keeping = bool(planned)
        self.disabled = False
        self.nbytes = 0
        self._planned, self._left = tuple(planned), set(planned)
        self._returned: dict[str, dict[int, Any]] = {}
        self._never: set[str] = set()
        self._running = False

    def complete(self, names: Sequence[str]) -> None:
        """Note that layers have their fits, which do not change any more."""
        self._left -= set(names)

    def clear(self) -> None:
        """Forget what parts returned, since fits have changed."""
        self._returned, self.nbytes = {}, 0

    def disable(self) -> None:
        """Compute everything from now on."""
        self.clear()
        self.keeping, self.disabled = False, True

    def knows(self, i: int) -> bool:
        """Whether something is replayed for batch ``i``."""
        return any(i in returned for returned in self._returned.values())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Compute everything, and keep nothing, while the context is entered."""
        returned, keeping = self._returned, self.keeping
        try:
            self._returned, self.keeping = {}, False
            yield
        finally:
            self._returned, self.keeping = returned, keeping

    @contextmanager
    def of(self, block: nn.Module, i: int) -> Iterator[None]:
        """Replay what is known, and keep what is new, while the block is called on batch ``i``.

        Args:
            block: The working copy of the block.
            i: The batch's number.
        """
        parts = self._parts(block)
        own = {name: part.__dict__.get("forward") for name, part in parts.items()}
        called: set[str] = set()
        try:
            for name, part in parts.items():
                part.forward = self._instead(name, part, part.forward, i, called)
            yield
        finally:
            for name, part in parts.items():
                part.__dict__.pop("forward", None)
                if own[name] is not None:
                    part.__dict__["forward"] = own[name]

    def _parts(self, block: nn.Module) -> dict[str, nn.Module]:
        """The modules whose planned layers are all fitted, by name."""
        if not (self.keeping or self._returned) or len(self._left) == len(self._planned):
            return {}
        found: dict[str, nn.Module] = {}
        for name, part in block.named_modules():
            inside = [one for one in self._planned if one == name or one.startswith(f"{name}.")]
            complete = name and inside and not self._left.intersection(inside)
            if complete and name not in self._never and not isinstance(part, torch.jit.ScriptModule):
                found[name] = part
        return found

    def _instead(
        self, name: str, part: nn.Module, forward: Callable[..., Any], i: int, called: set[str]
    ) -> Callable[..., Any]:
        """Make the function that is called in place of a part's own."""

        def replayed(*args: Any, **kwargs: Any) -> Any:
            if name in called:
                self._forget(name)
                return forward(*args, **kwargs)
            called.add(name)
            known = self._returned.get(name, {})
            if i in known:
                return _copied(known[i], device_of(part, HOST))
            if self._running or not self.keeping:  # within a larger part that is being kept, or for the last time
                return forward(*args, **kwargs)
            return self._kept(name, i, forward, args, kwargs)

        return replayed

    def _kept(
        self, name: str, i: int, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a part, and keep what it returns where that is all that it does."""
        before = _facts((args, kwargs))
        self._running = True
        try:
            returned = forward(*args, **kwargs)
        finally:
            self._running = False
        if before is None or before != _facts((args, kwargs)) or not _is_plain(returned):
            self._forget(name)
            return returned
        size = sum(tensor.nbytes for tensor in _tensors(returned))
        if self.nbytes + size <= REPLAYED_BYTES:
            for other in [other for other in self._returned if other.startswith(f"{name}.")]:
                self._drop(other, i)
            self._returned.setdefault(name, {})[i] = _copied(returned, HOST)
            self.nbytes += size
        return returned

    def _forget(self, name: str) -> None:
        """Compute a part each time from now on."""
        self._never.add(name)
        for i in list(self._returned.get(name, {})):
            self._drop(name, i)

    def _drop(self, name: str, i: int) -> None:
        """Let go of what a part returned for a batch."""
        self.nbytes -= sum(tensor.nbytes for tensor in _tensors(self._returned[name].pop(i, None)))


def _facts(value: Any) -> list[Any] | None:
    """What a call could change: the random numbers, and all in a value; None where that cannot be told."""
    facts: list[Any] = [torch.get_rng_state().numpy().tobytes()]
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, Tensor):
            if one.is_inference():
                return None
            facts.append((id(one), one._version))
            if one.is_cuda:
                facts.append(torch.cuda.get_rng_state(one.device).numpy().tobytes())
        elif type(one) in (tuple, list):
            facts.append(len(one))
            left += one
        elif type(one) is dict:
            facts.append(tuple(one))
            left += one.values()
        elif isinstance(one, CONSTANT):
            facts.append(one)
        else:
            return None
    return facts


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor or nothing, or a tuple, list or plain dictionary of such values."""
    if type(value) in (tuple, list):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return value is None or type(value) is Tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a plain value."""
    if isinstance(value, Tensor):
        yield value
    elif value is not None:
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _copied(value: Any, device: torch.device) -> Any:
    """A copy of a plain value on a device, since what follows may change it in place."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {key: _copied(one, device) for key, one in value.items()}
    return None if value is None else type(value)(_copied(one, device) for one in value)
