"""How long data takes to flow through a network, measured on two of its blocks, whose weights may be missing."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from structmat.fit.moments import MomentSums
from structmat.formats import Format
from structmat.network.calls import HOST, call, copied, evaluating, moved, undisturbed
from structmat.network.capture import hooked
from structmat.network.chain import list_of_blocks
from structmat.network.splitting import put_module
from structmat.network.surgery import apply_plan_

SHOWN = 2
"""How many blocks of a network are called."""

LONG = 1.0
"""About how many seconds a call takes that is timed, where the batch has as many rows."""

VECTORS = 2048
"""The most vectors whose second moment is timed."""

MADE_UP = 0.01
"""The entries of weights that are missing."""

MOST_WEIGHTS = 2e9
"""The most entries of weights that are made up; where two blocks and what surrounds them have more, nothing is."""


@dataclass(frozen=True)
class Read:
    """An input that planned layers of a block share.

    Attributes:
        share: The share of the block's time that has passed when the first of them is called.
        vectors: The number of vectors that they read for each unit of data.
        seconds: The seconds in which one vector is added to a second moment, and to one of the compressed network.
        layers: The names of the layers within the block.
    """

    share: float
    vectors: float
    seconds: tuple[float, float]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Flow:
    """The seconds that a unit of data takes: a token with its padding, or an example of other data.

    Attributes:
        block: Through one block.
        rest: Through all that is outside the blocks.
        names: The names of all blocks; one that is empty where the network is no list of blocks.
        reads: What the planned layers of a block read, in the order of the calls.
        compressed: Through one compressed block; None for as long as through a dense one.
    """

    block: float
    rest: float
    names: tuple[str, ...]
    reads: tuple[Read, ...] = field(default=())
    compressed: float | None = None

    @property
    def forward(self) -> float:
        """Through the whole network."""
        return self.rest + self.block * len(self.names)

    def in_sequence(self, planned: Sequence[str], refined: float = 0.0) -> float:
        """What compression in sequence takes, beside the fits.

        Args:
            planned: The names of the layers that are fitted.
            refined: The number of passes of a refinement through each block, backward ones included.

        Returns:
            The seconds for each unit of data.
        """
        homes = [[name for name in planned if name.startswith(f"{block}.") or not block] for block in self.names]
        last = max((k for k, home in enumerate(homes) if home), default=-1)
        total, crossed = 0.0, False
        changed = self.block if self.compressed is None else self.compressed
        for home, block in zip(homes[: last + 1], self.names, strict=False):
            own = {name.removeprefix(f"{block}.") for name in home}
            total += self.block * (1 + crossed) if not home else self.block + refined * changed
            done: list[float] = []
            for read in (read for read in self.reads if own.intersection(read.layers)):
                total += changed * _repeated(done, read.share) * crossed + read.vectors * read.seconds[crossed]
                done.append(read.share)
                crossed = True
            total += changed * _repeated(done, 1.0) * bool(home)
        return total

    def moments(self, planned: Sequence[str]) -> float:
        """What adding up the second moments of all planned layers takes, for each unit of data, beside the calls."""
        return sum(
            read.vectors * read.seconds[0]
            for block in self.names
            for read in self.reads
            if any((f"{block}.{name}" if block else name) in planned for name in read.layers)
        )


def _repeated(done: Sequence[float], share: float) -> float:
    """How much of a block a call up to a share of it computes, where what lies before the last read is known.

    Args:
        done: The shares of the block that had passed at the reads before.
        share: The share up to which the block is called.

    Returns:
        The share that is computed: what lies between the reads, and again about half of a part that ends at the last
        one, since it is replayed as a whole only from then on.
    """
    return share - sum(done[-2:]) / 2


def unit_count(batch: Any) -> int:
    """The number of units of data in a batch: its tokens, padding included, or its examples.

    Args:
        batch: The inputs of one call.

    Returns:
        The number; 0 where there is no tensor.
    """
    first = _tensor_in(batch)
    return 0 if first is None else len(first) if first.is_floating_point() else first.numel()


def _tensor_in(batch: Any) -> Tensor | None:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return next((value for value in values if isinstance(value, Tensor)), None)


def measure_flow(
    model: nn.Module, planned: Mapping[str, Format], batch: Any, device: torch.device = HOST
) -> Flow | None:
    """Time calls of two blocks of a network, together with what is outside the blocks.

    Args:
        model: The network; where weights are on the meta device, others are made up for what is called.
        planned: The formats of the layers that are to be fitted, by name.
        batch: The inputs of one call, of which some rows are used.
        device: The device that computes, where the weights are made up.

    Returns:
        The seconds; None where that is too large, or the network cannot be called with two of its blocks.
    """
    names = list_of_blocks(model, {name: (name,) for name in planned})
    home = names[0].rpartition(".")[0] if names else ""
    first = next((k for k, block in enumerate(names) if any(one.startswith(f"{block}.") for one in planned)), 0)
    shown = names[max(0, min(first, len(names) - SHOWN)) :][:SHOWN] if home else names
    with undisturbed(), _shortened(model, home, shown):
        missing = sum(one.numel() for one in model.parameters() if one.is_meta)
        if missing > MOST_WEIGHTS:
            return None
        small = _with_weights(model, device) if missing else model
    own = [f"{home}.{k}" for k in range(len(shown))] if home else shown or [""]
    within = {_within(name, names): format for name, format in reversed(list(planned.items()))}  # the first one decides
    formats = {name: within[name] for name in reversed(within) if name and _part(small, own[0], name) is not None}
    with undisturbed(), _shortened(small, "" if missing else home, shown), evaluating(small):
        try:
            return _measured(small, own, tuple(names) or ("",), formats, batch)
        except Exception:  # whatever a network raises that never was to have two blocks; an estimate can do without
            return None


def _within(name: str, blocks: Sequence[str]) -> str | None:
    """The name of a layer within its block; None where it is outside the blocks."""
    home = next((block for block in blocks if name.startswith(f"{block}.")), None)
    return name if not blocks else None if home is None else name.removeprefix(f"{home}.")


def _part(model: nn.Module, block: str, name: str) -> nn.Module | None:
    """A layer of a block; None where that block has no such layer."""
    try:
        return model.get_submodule(f"{block}.{name}" if block else name)
    except AttributeError:
        return None


@contextmanager
def _shortened(model: nn.Module, home: str, shown: Sequence[str]) -> Iterator[None]:
    """Let the list of blocks hold these alone, while the context is entered; an empty name is no list."""
    if not home:
        yield
        return
    whole, blocks = model.get_submodule(home), [model.get_submodule(name) for name in shown]
    put_module(model, home, nn.Sequential(*blocks) if isinstance(whole, nn.Sequential) else nn.ModuleList(blocks))
    try:
        yield
    finally:
        put_module(model, home, whole)


def _with_weights(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a network in which weights on the meta device have values."""
    made: dict[int, nn.Parameter] = {}
    new = copy.deepcopy(model)
    for module in new.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                values = torch.full(parameter.shape, MADE_UP, dtype=parameter.dtype, device=device)
                module._parameters[name] = made.setdefault(id(parameter), nn.Parameter(values, requires_grad=False))
    return new.to(device)


@torch.no_grad()
def _measured(
    model: nn.Module, own: Sequence[str], names: tuple[str, ...], formats: Mapping[str, Format], batch: Any
) -> Flow:
    """Time calls of a network.

    Args:
        model: The network, with the blocks that are called.
        own: Their names in it.
        names: The names of all blocks of the whole network.
        formats: The formats of the planned layers of the first block, by the name within it.
        batch: The inputs of one call.

    Returns:
        The seconds.
    """
    device = next(model.parameters()).device
    layers = {name: model.get_submodule(f"{own[0]}.{name}" if own[0] else name) for name in formats}
    watch = _Watch(model, {f"block {name}": model.get_submodule(name) for name in own}, layers)
    one = moved(_rows(batch, 1), device)
    watch.run(one)  # the first call prepares libraries
    rows = max(1, int(LONG / max(watch.run(one), 1e-6)))
    given = moved(_rows(batch, rows), device)
    calls = [(watch.run(given), watch.spans, watch.seen) for _ in range(3)]
    seconds, spans, watch.seen = min(calls, key=lambda one: one[0])
    units = max(unit_count(given), 1)
    blocks = [spans[f"block {name}"] for name in own]
    inside = sum(end - start for start, end in blocks)
    start, end = blocks[0]
    reads = [
        Read(min(1.0, max(0.0, at - start) / max(end - start, 1e-9)), vectors / units, _moment_seconds(read), names_of)
        for at, vectors, read, names_of in watch.reads()
    ]
    each, outside = inside / len(own), max(0.0, seconds - inside)
    compressed = _compressed_seconds(model, own[0], formats, given)
    return Flow(each / units, outside / units, names, tuple(reads), compressed / units)


def _compressed_seconds(model: nn.Module, name: str, formats: Mapping[str, Format], batch: Any) -> float:
    """The seconds of a call of one block whose planned layers have their formats, with random factors."""
    block = model.get_submodule(name)
    structured = copied(block)
    apply_plan_(structured, formats)
    whole = model if name else structured
    if name:
        put_module(model, name, structured)
    try:
        watch, times = _Watch(whole, {"block": structured}, {}), []
        for _ in range(3):
            watch.run(batch)
            start, end = watch.spans["block"]
            times.append(end - start)
    finally:
        if name:
            put_module(model, name, block)
    return min(times)


def _rows(batch: Any, count: int) -> Any:
    """The first rows of a batch."""
    if isinstance(batch, Mapping):
        return {name: _rows(value, count) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_rows(value, count) for value in batch)
    return batch[:count] if isinstance(batch, Tensor) and batch.ndim else batch


class _Watch:
    """What happens when in a call of a network.

    Args:
        model: The network.
        blocks: The blocks by name.
        layers: The planned layers of the first block, by name.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]) -> None:
        self.model, self.blocks, self.layers = model, blocks, layers
        self.spans: dict[str, tuple[float, float]] = {}
        self.seen: dict[str, tuple[float, Tensor]] = {}

    def run(self, batch: Any) -> float:
        """Call the network, and return the seconds of the call."""
        self.spans, self.seen = {}, {}
        start = time.perf_counter()
        with hooked(self.blocks, before=self._before, after=self._after), hooked(self.layers, before=self._read):
            call(self.model, batch)
        _wait(batch)
        return time.perf_counter() - start

    def reads(self) -> Iterator[tuple[float, int, Tensor, tuple[str, ...]]]:
        """The inputs that layers share: when, how many vectors, the input, and the names of the layers."""
        shared: dict[int, list[str]] = {}
        for name, (_, read) in self.seen.items():
            shared.setdefault(id(read), []).append(name)
        for names in shared.values():
            at, read = self.seen[names[0]]
            yield at, read.numel() // read.shape[-1], read, tuple(names)

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        _wait(args)
        self.spans[name] = (time.perf_counter(), math.inf)

    def _after(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        _wait(output)
        self.spans[name] = (self.spans[name][0], time.perf_counter())

    def _read(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        _wait(args)
        self.seen.setdefault(name, (time.perf_counter(), args[0]))


def _wait(value: Any) -> None:
    """Wait for a GPU whose work a tensor is part of."""
    found = _tensor_in(value) if not isinstance(value, Tensor) else value
    if found is not None and found.is_cuda:
        torch.cuda.synchronize(found.device)


def _moment_seconds(read: Tensor) -> tuple[float, float]:
    """The seconds in which one vector like these is added to a second moment, and to one of a compressed network."""
    vectors = read.detach().reshape(-1, read.shape[-1])[:VECTORS]
    found: list[float] = []
    for target in (None, vectors + 1):
        times = []
        for _ in range(2):
            start = time.perf_counter()
            sums = MomentSums()
            sums.add(vectors, target)
            _wait(vectors)
            times.append(time.perf_counter() - start)
        found.append(min(times) / max(len(vectors), 1))
    return found[0], found[1]
