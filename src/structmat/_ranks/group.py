"""The processes of a run: who does what, and how a result of one process becomes that of all."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from structmat._ranks.exchange import broadcast

SHARES = 64
"""The number of shares of the data, and the largest number of processes that data can be shared among."""

PATIENCE = timedelta(hours=24)
"""How long a process waits for another one that works; one that has ended is noticed at once."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: The number of this process.
        size: The number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and talks to the user."""
        return self.rank == 0

    def owner(self, number: int) -> int:
        """The process that works on a batch.

        Args:
            number: The batch's number.

        Returns:
            The number of the process.
        """
        return share_of(number) * self.size // SHARES

    def mine(self, count: int) -> list[int]:
        """The numbers of those of a number of batches that this process works on, in the order of their shares."""
        own = (number for number in range(count) if self.owner(number) == self.rank)
        return sorted(own, key=lambda number: (share_of(number), number))

    def only(self, values: Sequence[T]) -> list[T | None]:
        """The values of the batches that this process works on; None for the others."""
        return [value if self.owner(i) == self.rank else None for i, value in enumerate(values)]

    def of(self, owner: int, compute: Callable[[], T]) -> T:
        """What one process computes, for all of them.

        Args:
            owner: The number of the process that computes.
            compute: The function that it calls.

        Returns:
            What the function returned there.

        Raises:
            AbandonedError: If the function raised an error in another process.
        """
        if self.size == 1:
            return compute()
        outcome = broadcast(_outcome(compute) if owner == self.rank else None, owner)
        if isinstance(outcome, _Failure):
            if owner == self.rank and outcome.error is not None:
                raise outcome.error
            raise AbandonedError(f"process {owner} has ended with an error, which it tells")
        return outcome

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, in the order of their numbers."""
        return [self.of(owner, lambda: value) for owner in range(self.size)]

    def any(self, flag: bool) -> bool:
        """Whether a flag is set in any process."""
        return any(self.gathered(flag))

    def merged(self, values: Mapping[int, T]) -> dict[int, T]:
        """What all processes know of batches, by the batch's number, in order."""
        found = {number: value for one in self.gathered(dict(values)) for number, value in one.items()}
        return dict(sorted(found.items()))

    def dealt(self, costs: Sequence[float], compute: Callable[[int], T]) -> Iterator[T]:
        """Hand work out by cost: the most expensive first, to the process with the least so far.

        Args:
            costs: What each piece of work costs.
            compute: A function of the number of a piece of work, which its process calls.

        Yields:
            What it returned, in the order of the numbers.
        """
        owners = deal(costs, self.size)
        mine = [k for k, owner in enumerate(owners) if owner == self.rank and self.size > 1]
        own = {k: _outcome(functools.partial(compute, k)) for k in mine}
        for k, owner in enumerate(owners):
            yield self.of(owner, functools.partial(_opened, own, k) if k in own else functools.partial(compute, k))


class AbandonedError(ConnectionError):
    """Tells that another process has ended with an error, which it tells itself."""


@dataclass
class _Failure:
    """What stands for the result of a computation that raised an error, which stays in its process."""

    error: Exception | None = None

    def __reduce__(self) -> Any:
        return _Failure, ()


def _outcome(compute: Callable[[], Any]) -> Any:
    """What a function returns, or the error that it raises."""
    try:
        return compute()
    except Exception as error:
        return _Failure(error)


def _opened(outcomes: dict[int, Any], k: int) -> Any:
    """The result of a piece of work; its error is raised."""
    outcome = outcomes.pop(k)
    if isinstance(outcome, _Failure) and outcome.error is not None:
        raise outcome.error
    return outcome


def deal(costs: Sequence[float], size: int) -> list[int]:
    """Who gets which piece of work.

    Args:
        costs: What each piece costs.
        size: The number of processes.

    Returns:
        The number of the process of each piece.
    """
    loads, owners = [0.0] * size, [0] * len(costs)
    for k in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        owners[k] = min(range(size), key=lambda rank: (loads[rank], rank))
        loads[owners[k]] += costs[k]
    return owners


def share_of(number: int) -> int:
    """The share of a batch: neighbours are far apart, so that each process has some of any few that are in a row."""
    digits = SHARES.bit_length() - 1
    return int(f"{number % SHARES:0{digits}b}"[::-1], 2)


@dataclass(frozen=True)
class Launch:
    """What a launcher says of this process.

    Attributes:
        rank: The number of this process.
        size: The number of processes.
        local: The number of this process on its machine.
    """

    rank: int
    size: int
    local: int


def launched(environment: Mapping[str, str] | None = None) -> Launch | None:
    """What ``torchrun`` or ``srun`` says of this process.

    Args:
        environment: The variables; None for those of the process.

    Returns:
        The launch; None where neither started the process.

    Raises:
        ValueError: If ``srun`` started several processes that cannot find each other, or there are too many.
    """
    given = os.environ if environment is None else environment
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        if all(name in given for name in names):
            launch = Launch(*(int(given[name]) for name in names))
            if launch.size > SHARES:
                raise ValueError(
                    f"expected at most {SHARES} processes, among which the data is shared, got {launch.size}"
                )
            if launch.size > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= set(given):
                raise ValueError(
                    "expected MASTER_ADDR and MASTER_PORT, by which the processes find each other; set them to the "
                    "name of the first machine and to a free port before srun, or start with torchrun"
                )
            return launch
    return None


_joined = Ranks()


def current() -> Ranks:
    """The processes that work together now; this process alone, outside of ``together``."""
    return _joined


@contextmanager
def together() -> Iterator[Ranks]:
    """Work with the other processes that ``torchrun`` or ``srun`` started, while the context is entered.

    Yields:
        The processes; this one alone where no launcher started it.

    Raises:
        ValueError: If there are fewer GPUs than processes on a machine.
    """
    global _joined
    launch = launched()
    if launch is None or launch.size == 1:
        yield Ranks()
        return
    own = not dist.is_initialized()
    if own:
        _connect(launch)
    _joined = Ranks(launch.rank, launch.size)
    try:
        yield _joined
        if own:
            dist.destroy_process_group()
    finally:
        _joined = Ranks()


def _connect(launch: Launch) -> None:
    """Join the group of processes, each with its own GPU where there are any."""
    backend = "gloo"
    if torch.cuda.is_available():
        if launch.local >= torch.cuda.device_count():
            raise ValueError(
                f"expected a GPU for each process, got {torch.cuda.device_count()} for process {launch.local} of this "
                "machine; start fewer, or hide the GPUs with CUDA_VISIBLE_DEVICES= to compute on CPUs"
            )
        torch.cuda.set_device(launch.local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, rank=launch.rank, world_size=launch.size, timeout=PATIENCE)
