"""Objects with tensors that go from process to process, as bytes that every backend of ``torch.distributed`` takes."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PIECE = 2**30
"""The most bytes that are sent at a time."""


class _Packer(pickle.Pickler):
    """Takes an object apart into bytes and tensors."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: dict[int, Tensor] = {}

    def persistent_id(self, obj: Any) -> Any:
        """Let a number stand for a tensor; a tensor that comes twice is sent once."""
        if not isinstance(obj, Tensor):
            return None
        self.tensors.setdefault(id(obj), obj.detach())
        return list(self.tensors).index(id(obj)), obj.dtype, tuple(obj.shape), obj.device.type


class _Unpacker(pickle.Unpickler):
    """Puts an object together again, with tensors that wait for their values."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: dict[int, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        """Make a tensor on this process' own device of the kind."""
        number, dtype, shape, device = pid
        return self.tensors.setdefault(number, torch.empty(shape, dtype=dtype, device=device))


def _packed(value: Any) -> tuple[bytes, list[Tensor]]:
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(value)
    return file.getvalue(), list(packer.tensors.values())


def _parts(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The bytes of tensors in pieces that every backend takes; those on the meta device have none."""
    for tensor in tensors:
        if tensor.numel() and not tensor.is_meta:
            yield from tensor.reshape(-1).view(torch.uint8).split(PIECE)


def _unpacked(take: Callable[[Tensor], object]) -> Any:
    """Put an object together from what a function writes into tensors, one after the other."""
    size = torch.zeros(1, dtype=torch.int64)
    take(size)
    content = torch.empty(int(size), dtype=torch.uint8)
    take(content)
    unpacker = _Unpacker(io.BytesIO(content.numpy().tobytes()))
    value = unpacker.load()
    for part in _parts(unpacker.tensors[k] for k in sorted(unpacker.tensors)):
        take(part)
    return value


def _hand_on(value: Any, give: Callable[[Tensor], object]) -> None:
    """Give an object away in tensors, one after the other."""
    content, tensors = _packed(value)
    give(torch.tensor([len(content)]))
    give(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    for part in _parts(tensors):
        give(part)


def broadcast(value: Any, owner: int) -> Any:
    """Send an object of one process to all others."""
    with _answered():
        if dist.get_rank() != owner:
            return _unpacked(lambda tensor: dist.broadcast(tensor, owner))
        _hand_on(value, lambda tensor: dist.broadcast(tensor, owner))
        return value


def send(value: Any, rank: int) -> None:
    """Send an object to one process."""
    with _answered():
        _hand_on(value, lambda tensor: dist.send(tensor, rank))


def receive(rank: int) -> Any:
    """Receive an object of one process."""
    with _answered():
        return _unpacked(lambda tensor: dist.recv(tensor, rank))


@contextmanager
def _answered() -> Iterator[None]:
    """Say what to do where another process does not answer."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            f"expected all {dist.get_world_size()} processes to work until the end, but one of them has ended; see "
            "what it said, and run the same command again, with any number of processes: it resumes from what is kept"
        ) from error
