"""Runs ``structmat`` in forks of one process that has imported everything, so that starting takes no time.

Each line of standard input is a JSON object. Its ``words`` are those of the command line, and ``log`` is the file for
what the command prints. If there is a ``signal``, it is sent after ``delay`` seconds, or before the change of a file
with the number ``event``. The answer is a line with a JSON object: the exit ``status``, negative for a signal; whether
the signal was ``sent``; the number of ``events``, which are changes of files; and the ``seconds`` that it took.
"""

import json
import mmap
import os
import signal
import sys
import time
from typing import Any

import changes  # from this folder

import structmat.cli.app
import structmat.cli.compress  # noqa: F401
import structmat.cli.retrain  # noqa: F401
from structmat.integrations.transformers import quantizer, retraining, streaming  # noqa: F401

from transformers import (  # noqa: F401  # isort: skip
    AutoImageProcessor,
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaForCausalLM,
    ViTForImageClassification,
)


def count_changes(counter: mmap.mmap, stop: int | None, number: int) -> None:
    """Count the changes of files of this process, and send it a signal before one of them."""

    def act() -> None:
        seen = int.from_bytes(counter[:8], "little") + 1
        counter[:8] = seen.to_bytes(8, "little")
        if seen == stop:
            os.kill(os.getpid(), number)

    changes.watch(act)


def child(asked: dict[str, Any], counter: mmap.mmap) -> None:
    """Run one command in a fork, and end the process."""
    status = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        count_changes(counter, asked.get("event"), signal.Signals[asked.get("signal") or "SIGKILL"])
        status = structmat.cli.main(asked["words"])
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:  # before the command or after it, where a process ends by the signal itself
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        sys.stdout.flush()
        os._exit(status)


def run(asked: dict[str, Any]) -> dict[str, Any]:
    """Run one command, and answer."""
    counter, started, delay, sent = mmap.mmap(-1, 8), time.monotonic(), asked.get("delay"), False
    pid = os.fork()
    if pid == 0:
        child(asked, counter)
    while True:
        finished, status = os.waitpid(pid, 0 if delay is None or sent else os.WNOHANG)
        if finished:
            break
        if delay is not None and time.monotonic() - started > delay:
            os.kill(pid, signal.Signals[asked["signal"]])
            sent = True
        else:
            time.sleep(0.001)
    events = int.from_bytes(counter[:8], "little")
    sent = sent or 0 < (asked.get("event") or 0) <= events
    code = os.waitstatus_to_exitcode(status)
    return {"status": code, "sent": sent, "events": events, "seconds": time.monotonic() - started}


print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(run(json.loads(line))), flush=True)
