"""Runs ``structmat`` in forks of one process that has imported everything, so that starting takes no time.

Each line of standard input is a JSON object: the ``words`` of the command line, and the ``delay`` in seconds after
which it is killed, or null. The answer is a line with the exit status, negative for a signal.
"""

import json
import os
import signal
import sys
import time

import structmat.cli.app
import structmat.cli.compress  # noqa: F401
from structmat.integrations.transformers import quantizer  # noqa: F401

from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401  # isort: skip


def run(words: list[str], delay: float | None) -> int:
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.dup2(2, 1)
        os._exit(structmat.cli.main(words))
    while True:
        finished, status = os.waitpid(pid, 0 if delay is None else os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        if delay is not None and time.monotonic() - started > delay:
            os.kill(pid, signal.SIGKILL)
            delay = None
        time.sleep(0.001)


print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    print(run(asked["words"], asked["delay"]), flush=True)
