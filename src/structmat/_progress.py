"""Progress bars: drawn in a terminal or a notebook, and plain lines everywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm as drawn
from tqdm.std import tqdm

INTERVAL = 10.0
"""Without a terminal there is one line in so many seconds at most."""


class _Lines(tqdm):
    """A progress bar that prints whole lines, for logs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._said, self._closing = time.monotonic(), False
        super().__init__(*args, **{**options, "mininterval": INTERVAL, "ncols": 100, "dynamic_ncols": False})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print the bar as a line, if the last line is old enough."""
        now = time.monotonic()
        if self._closing or now - self._said >= INTERVAL:
            self._said = now
            self.fp.write(f"{str(self) if msg is None else msg}\n")
            self.fp.flush()
        return True

    def close(self) -> None:
        """Print the last state, unless the bar was to vanish."""
        if self.disable:
            return
        if self.leave:
            self._closing = True
            self.display()
        self.disable = True
        self._decr_instances(self)


def progress_bar(*, show: bool = True, **options: Any) -> Any:
    """Make a progress bar.

    Args:
        show: Whether to show it at all.
        **options: The arguments of ``tqdm``, such as ``total`` and ``desc``.

    Returns:
        A ``tqdm``: drawn where there is a terminal or a notebook, otherwise one that prints a line in ten seconds.
    """
    lines = not sys.stderr.isatty() and drawn.__module__ != "tqdm.notebook"
    return (_Lines if lines else drawn)(disable=not show, **options)
