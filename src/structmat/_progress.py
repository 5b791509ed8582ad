"""Progress bars: drawn in a terminal or a notebook, and plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm as drawn
from tqdm.std import tqdm

from structmat._ranks import current

INTERVAL = 10.0
"""The number of seconds that pass, at least, between two lines of a bar where there is no terminal."""

Seen = Callable[[str, float], None]
"""What is told the title of a bar and the share of its work that is done."""

_seen: ContextVar[Seen | None] = ContextVar("_seen", default=None)


@contextmanager
def watched(seen: Seen) -> Iterator[None]:
    """Tell a function how far every bar is that is made and shown while the context is entered.

    Args:
        seen: The function.

    Yields:
        Nothing.
    """
    token = _seen.set(seen)
    try:
        yield
    finally:
        _seen.reset(token)


class _Lines(tqdm):
    """A progress bar for logs: a line of plain text every ten seconds, and one at the end."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._said, self._last, self._closing = time.monotonic(), "", False
        super().__init__(*args, **{**options, "mininterval": INTERVAL})

    def __str__(self) -> str:
        facts = self.format_dict
        done, total, elapsed, name = facts["n"], facts["total"], facts["elapsed"], facts["prefix"]
        percent = int(100 * done / total + 1e-6) if total else 100  # rounded down: 100 at the end alone
        parts = [f"{done} done" if total is None else f"{percent}%"]
        if total and facts["bar_format"] is None:  # a format of its own says that the numbers mean nothing to a reader
            parts[0] += f" ({done} of {total})"
        parts.append(f"{self.format_interval(elapsed)} so far")
        begun = facts["initial"]
        if total and begun < done < total:
            parts.append(f"about {self.format_interval(elapsed / (done - begun) * (total - done))} to go")
        if facts["postfix"]:
            parts.append(facts["postfix"])
        return f"{name.removesuffix(': ')}: {', '.join(parts)}" if name else ", ".join(parts)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Print the line, if the last one is old enough."""
        now = time.monotonic()
        line = str(self) if msg is None else msg
        if line != self._last and (self._closing or now - self._said >= INTERVAL):
            self._said, self._last = now, line
            self.fp.write(f"{line}\n")
            self.fp.flush()

    def clear(self, *_: Any, **__: Any) -> None:
        """Leave everything: lines stay."""

    def close(self) -> None:
        """Print the last state, unless the bar was to vanish."""
        if self.disable:
            return
        if self.leave:
            self._closing = True
            self.display()
        self.disable = True
        self._decr_instances(self)  # pyright: ignore[reportAttributeAccessIssue]


def progress_bar(*, show: bool = True, **options: Any) -> Any:
    """Make a progress bar.

    Args:
        show: Whether to show it at all; of processes that work together, the first one shows it.
        **options: The arguments of ``tqdm``, such as ``total`` and ``desc``.

    Returns:
        A ``tqdm``. It is drawn where there is a terminal or a notebook; elsewhere it prints a plain line when ten
        seconds have passed since its last one, and one when it ends.
    """
    lines = not sys.stderr.isatty() and drawn.__module__ != "tqdm.notebook"
    show = show and current().leads
    bar = (_Lines if lines else drawn)(disable=not show, **options)
    seen, update = _seen.get(), bar.update
    if seen is not None and show and bar.total:

        def told(done: float = 1) -> bool | None:
            drew = update(done)
            seen(bar.desc.removesuffix(": "), bar.n / bar.total)
            return drew

        bar.update = told  # pyright: ignore[reportAttributeAccessIssue]
    return bar
