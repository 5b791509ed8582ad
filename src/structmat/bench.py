"""Timing: several callables side by side in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

from structmat import _checks


def time_side_by_side(candidates: Mapping[str, Callable[[], object]], *, rounds: int = 20) -> dict[str, float]:
    """Time callables in turn, so that a drift of the machine's speed meets all of them alike.

    Args:
        candidates: What to time, by name; each is called twice to warm up.
        rounds: How often each is timed.

    Returns:
        Median seconds of each.

    Raises:
        ValueError: If ``rounds`` is below 1.
    """
    _checks.positive_int(rounds, "rounds")
    for run in candidates.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            _wait()
            start = time.perf_counter()
            run()
            _wait()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
