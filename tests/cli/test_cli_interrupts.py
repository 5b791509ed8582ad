"""``structmat compress`` that is interrupted and started twice: the result is that of one quiet run."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from processes import start
from training import tiny


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


def wait_for(what: Path, process: subprocess.Popen[str], pattern: str) -> None:
    """Until files of this pattern are in the folder."""
    deadline = time.monotonic() + 120
    while not list(what.glob(pattern)):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
