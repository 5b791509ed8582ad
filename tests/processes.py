"""``structmat`` in processes of its own: fresh ones, and forks of one that has imported everything."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


def environment() -> dict[str, str]:
    """The environment of a process that a test starts: one thread, and torchvision's operators are declared."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS / "support"), "HF_HUB_OFFLINE": "1"}


def start(words: list[str], out: Path) -> subprocess.Popen[str]:
    """Start a fresh process, which heeds SIGINT whatever the process of the tests does."""
    return subprocess.Popen(
        [sys.executable, "-m", "structmat.cli", *words, "-o", str(out)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a run ended.

    Attributes:
        status: The exit status, negative for a signal.
        sent: Whether the signal was sent before it ended.
        events: The number of changes of files.
        seconds: How long it took.
        told: What it printed.
    """

    status: int
    sent: bool
    events: int
    seconds: float
    told: str


class Forks:
    """Runs of the program without its start.

    Args:
        folder: The folder for what they print.
    """

    def __init__(self, folder: Path) -> None:
        self.log, self.errors = folder / "told", (folder / "errors").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "support" / "forking.py")],
            env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip
        assert self._answer() == "ready\n"

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        assert answer, Path(self.errors.name).read_text()[-3000:]
        return answer

    def run(self, words: list[str], **stop: Any) -> Ended:
        """Run one command; ``signal`` with ``delay`` or ``event`` stop it."""
        assert self.process.stdin is not None
        self.log.unlink(missing_ok=True)
        self.process.stdin.write(json.dumps({"words": words, "log": str(self.log), **stop}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self._answer())
        return Ended(**answer, told=self.log.read_text(encoding="utf-8") if self.log.exists() else "")

    def close(self) -> None:
        """End the process from which the runs fork."""
        self.process.communicate()
        self.errors.close()
