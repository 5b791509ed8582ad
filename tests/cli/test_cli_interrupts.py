"""``structmat compress`` that is killed, interrupted or started twice: the result is that of one quiet run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from training import tiny

TESTS = Path(__file__).parents[1]

KILLS = 20


def environment() -> dict[str, str]:
    """Of a process that a test starts: one thread, and torchvision's operators declared."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS / "support"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command line without its output: a small Llama, calibrated and refined."""
    folder = tmp_path_factory.mktemp("interrupts")
    tiny.llama().save_pretrained(folder / "dense")
    tiny.tokenizer().save_pretrained(folder / "dense")
    (folder / "texts.txt").write_text("<|endoftext|>".join(tiny.sentences(16)), encoding="utf-8")
    return [
        "compress", str(folder / "dense"), "--calibrate", str(folder / "texts.txt"), "--blocks", "2", "--keep", "0.6",
        "--rule", ".*attn.*=low_rank", "--batch-size", "4", "--refine", "--refine-steps", "20",
    ]  # fmt: skip


def model_files(folder: Path) -> dict[str, bytes]:
    """Every file but the record, which says how long it took."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != "structmat.json"}


def start(words: list[str], out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "structmat.cli", *words, "-o", str(out)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(what: Path, process: subprocess.Popen[str], pattern: str) -> None:
    """Until files of this pattern are in the folder."""
    deadline = time.monotonic() + 120
    while not list(what.glob(pattern)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Forks:
    """Runs of the program without its start."""

    def __init__(self, log: Path) -> None:
        self.log = log.open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "support" / "forking.py")],
            env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
        )  # fmt: skip
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        assert answer, Path(self.log.name).read_text()[-3000:]
        return answer

    def run(self, words: list[str], out: Path, delay: float | None = None) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"words": [*words, "-o", str(out)], "delay": delay}) + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def close(self) -> None:
        self.process.communicate()
        self.log.close()


@pytest.fixture
def forks(tmp_path: Path) -> Iterator[Forks]:
    runs = Forks(tmp_path / "log")
    yield runs
    runs.close()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_runs_that_are_killed_end_like_a_quiet_one(words: list[str], forks: Forks, tmp_path: Path) -> None:
    began = time.monotonic()
    assert forks.run(words, tmp_path / "quiet") == 0, (tmp_path / "log").read_text()[-3000:]
    duration = time.monotonic() - began
    expected = model_files(tmp_path / "quiet")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(expected)
    chance = random.Random(0)
    kills = finished = 0
    while kills < KILLS or finished == 0:
        out = tmp_path / f"killed-{finished}"
        status = forks.run(words, out, chance.uniform(0, duration) if kills < KILLS else None)
        if status == -signal.SIGKILL:
            kills += 1
            continue
        assert status == 0, (tmp_path / "log").read_text()[-3000:]
        assert model_files(out) == expected
        assert not out.with_name(f"{out.name}.partial").exists()
        finished += 1
    assert forks.run(words, tmp_path / f"killed-{finished}") == 0
    assert model_files(tmp_path / f"killed-{finished}") == expected


@pytest.mark.slow
def test_an_interrupt_and_a_second_process(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = start(words, out)
    wait_for(tmp_path, first, "out.partial/fits/*.safetensors")
    first.send_signal(signal.SIGSTOP)  # so that it cannot end before the second one has looked
    second = start(words, out)
    told = second.communicate(timeout=120)
    assert second.returncode == 1
    assert told[1].splitlines()[-1] == (
        f"structmat: expected to be alone at {str(out)!r}, but another process is writing it; wait for it to end"
    )
    assert (tmp_path / "out.partial" / "options.json").exists()
    first.send_signal(signal.SIGINT)  # which waits for it to go on
    first.send_signal(signal.SIGCONT)
    told = first.communicate(timeout=120)
    assert first.returncode == 130
    assert "Traceback" not in told[1]
    assert told[1].splitlines()[-2:] == [
        f"{out}.partial keeps what is done; run the same command again to go on",
        "structmat: interrupted",
    ]
    assert not out.exists()

    third = start(words, out)
    time.sleep(random.Random(1).uniform(0, 2))
    third.send_signal(signal.SIGTERM)
    third.communicate(timeout=120)
    assert not out.exists()

    last = start(words, out)
    told = last.communicate(timeout=120)
    assert last.returncode == 0, told[1]
    assert f"going on with the interrupted run in {out}.partial" in told[1]
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    record: dict[str, Any] = json.loads((out / "structmat.json").read_text())
    assert record["command"] == "compress"
    assert len(record["layers"]) == 14
