"""The moments just before a process changes a file, at which a test may stop it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

CHANGES = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "tempfile.mkstemp"})
"""The audit events that come before a change of a file, beside an opening to write."""

WRITING = os.O_WRONLY | os.O_RDWR


def watch(act: Callable[[], None]) -> None:
    """Call a function before every change of a file, for as long as the process lives."""

    def hook(event: str, values: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(values[2], int) and values[2] & WRITING):
            act()

    sys.addaudithook(hook)


class Killed(BaseException):
    """Stands for the end of the process: from then on no file changes."""


@dataclass
class Stop:
    """When to stop, and how.

    Attributes:
        number: The number of the change before which to stop.
        error: What is raised there; ``Killed`` is raised at every later change too.
        seen: The number of changes so far.
    """

    number: int
    error: type[BaseException]
    seen: int = 0

    def __call__(self) -> None:
        self.seen += 1
        if self.seen == self.number or (self.seen > self.number and self.error is Killed):
            raise self.error


_stops: list[Stop] = []


def _act() -> None:
    for stop in _stops:
        stop()


@contextmanager
def stopped(number: int, error: type[BaseException]) -> Iterator[Stop]:
    """Stop what runs in the context before a change of a file, and go on after the context.

    Args:
        number: The number of the change, from 1.
        error: ``Killed`` or ``KeyboardInterrupt``.

    Yields:
        The stop, which knows how many changes there were.
    """
    if not _watching:
        watch(_act)
        _watching.append(True)
    stop = Stop(number, error)
    _stops.append(stop)
    try:
        yield stop
    except error:
        assert stop.seen >= number
    finally:
        _stops.remove(stop)


_watching: list[bool] = []
