"""Commands that several processes run together, under ``torchrun`` or ``srun``."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from structmat._ranks import Ranks, together
from structmat.cli import show

STOPPED = (
    "another process has ended, and so this run ends; run the same command again, with any number of processes: it "
    "resumes from what is kept"
)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Work with the other processes of the launch, of which the first one talks, while the context is entered.

    Yields:
        The processes; this one alone where no launcher started it.
    """
    with together() as ranks, warnings.catch_warnings():
        if not ranks.leads:
            warnings.simplefilter("ignore")
        elif ranks.size > 1:
            _tell_of_the_end()
        yield ranks


def _tell_of_the_end() -> None:
    """Say why this process ends where the launcher stops it, as it does once another one has ended."""
    if not hasattr(signal, "sigwait"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the main thread may be busy for long

    def wait() -> None:
        signal.sigwait({signal.SIGTERM})
        show.error(STOPPED)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
