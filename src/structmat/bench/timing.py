"""Timing callables in turn, so that a drift of the machine's speed affects all of them equally."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from structmat import _checks

MODES = ("eager", "graphs", "compile")
"""The modes in which a benchmark runs: plain calls, one CUDA graph, or through ``torch.compile``."""

BUSY_BYTES = 2**28
"""The bytes that a GPU fills before it is timed: its caches are cold then, and it waits for no launch."""


@dataclass(frozen=True)
class Timing:
    """How long something takes.

    Attributes:
        median: The median in seconds.
        low: The first quartile in seconds.
        high: The third quartile in seconds.
        rounds: How often it was timed.
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Median and quartiles of single times."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(median, low, high, len(seconds))

    def each(self, count: float) -> Timing:
        """The time of one of ``count`` equal parts."""
        return Timing(self.median / count, self.low / count, self.high / count, self.rounds)

    @property
    def spread(self) -> float:
        """The interquartile range relative to the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def time_side_by_side(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int = 20, settle: int = 0
) -> dict[str, float]:
    """Time callables in turn, so that a drift of the machine's speed affects all of them equally.

    Args:
        candidates: The callables by name; each is called twice to warm up.
        rounds: How often each is timed.
        settle: How often each is called, untimed, directly before each timed call.

    Returns:
        The median seconds of each.

    Raises:
        ValueError: If ``rounds`` is below 1.
    """
    found = time_in_turn(candidates, rounds=rounds, settle=settle, clock=synchronised)
    return {name: timing.median for name, timing in found.items()}


def time_in_turn(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 20,
    warmup: int = 2,
    settle: int = 0,
    clock: Callable[[Callable[[], object]], float] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time callables in turn, with their spread.

    Args:
        candidates: The callables by name.
        rounds: How often each is timed.
        warmup: How often each is called before the first round.
        settle: How often each is called, untimed, directly before each timed call, so that it finds the caches and the
            allocator in the state in which it left them itself, and not in that of another one.
        clock: A function that calls something and returns how many seconds it took; None for the one that suits the
            device.
        device: The device that does the work.

    Returns:
        The median and quartiles of each.

    Raises:
        ValueError: If ``rounds`` is below 1.
    """
    _checks.positive_int(rounds, "rounds")
    clock = clock or clock_of(torch.device(device))
    for run in candidates.values():
        for _ in range(warmup):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            for _ in range(settle):
                run()
            seconds[name].append(clock(run))
    return {name: Timing.of(values) for name, values in seconds.items()}


def synchronised(run: Callable[[], object]) -> float:
    """Seconds that a call takes until all of its work is done, by the processor's clock."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def clock_of(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """The clock that suits a device: events on a GPU that is kept busy until the work is launched.

    Args:
        device: A CPU or a CUDA device.

    Returns:
        A function that calls something and returns how many seconds its work took.
    """
    if device.type != "cuda":
        return synchronised
    ahead = torch.empty(BUSY_BYTES, dtype=torch.uint8, device=device)

    def clock(run: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        ahead.zero_()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3

    return clock


def captured(build: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """Turn work on a GPU into one CUDA graph.

    Args:
        build: A function that returns the work, a callable whose tensors keep their places. It is called on the stream
            of the capture, since the work's backward may need what it computes.

    Returns:
        A function that launches the graph.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run = build()
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        run()
    torch.cuda.synchronize()
    return functools.partial(_launch, graph, run)


def _launch(graph: torch.cuda.CUDAGraph, run: Callable[[], object]) -> None:
    """Launch a graph; ``run`` comes along because it holds the tensors that the graph works on."""
    graph.replay()
