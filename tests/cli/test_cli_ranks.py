"""``structmat compress`` in several processes: the bytes are those of one, whatever becomes of the others.

The environment variable STRUCTMAT_KILLS says how many processes are killed in the long test; without it, the tests that
take minutes each are skipped.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from processes import TESTS
from test_ranks import TORCHRUN, free_port
from training import tiny

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")]

KILLS = int(os.environ.get("STRUCTMAT_KILLS", "2"))

LONG = pytest.mark.skipif("STRUCTMAT_KILLS" not in os.environ, reason="takes minutes: set STRUCTMAT_KILLS=20")

PATIENCE = 30.0
"""The most seconds for which a process may be left once another one was killed."""

USUAL = ("--blocks", "2", "--keep", "0.7", "--length", "12", "--samples", "32", "--refine", "--refine-steps", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three blocks with its tokenizer under ``dense``, and texts."""
    path = tmp_path_factory.mktemp("ranks")
    tiny.llama(layers=3).save_pretrained(path / "dense")
    tiny.tokenizer().save_pretrained(path / "dense")
    (path / "texts.txt").write_text("<|endoftext|>".join(tiny.sentences(64)), encoding="utf-8")
    return path


def launch(folder: Path, out: Path, size: int, *words: str, more: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start ``structmat compress`` in processes of this number."""
    started = [*TORCHRUN, f"--nproc-per-node={size}", *(more or (f"--master-port={free_port()}",))]
    command = ["compress", str(folder / "dense"), "-o", str(out), *USUAL, "--calibrate", str(folder / "texts.txt")]
    return subprocess.Popen(
        [*started, "-m", "structmat.cli", *command, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def weights(out: Path) -> dict[str, bytes]:
    """The files of the weights in a finished folder."""
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.safetensors"))}


def finished(process: subprocess.Popen[str], out: Path) -> dict[str, bytes]:
    """The weights that a run writes, which is to end well."""
    told, _ = process.communicate(timeout=600)
    assert process.returncode == 0, told[-6000:]
    assert told.count(f"wrote {out}\n") == 1
    assert told.count("calibrating on") == 1  # one process talks
    return weights(out)


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, bytes]:
    return finished(launch(folder, folder / "one", 1), folder / "one")


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=LONG)])
def test_in_memory(folder: Path, reference: dict[str, bytes], size: int, tmp_path: Path) -> None:
    assert finished(launch(folder, tmp_path / "out", size), tmp_path / "out") == reference
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@LONG
def test_streamed(folder: Path, tmp_path: Path) -> None:
    found = [finished(launch(folder, tmp_path / str(n), n, "--stream"), tmp_path / str(n)) for n in (1, 2, 4)]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 4


@LONG
def test_two_machines(folder: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    """Two agents that meet on the loopback address, as they would from two machines."""
    port, out = free_port(), tmp_path / "out"
    more = ("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=ranks")
    first, second = (launch(folder, out, 1, more=more) for _ in range(2))
    told = [process.communicate(timeout=600)[0] for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], told
    assert sum(text.count(f"wrote {out}\n") for text in told) == 1
    assert weights(out) == reference


@LONG
def test_an_error_is_told_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    process = launch(folder, tmp_path / "out", 2)
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert told.count("expected a new folder for --out") == 1
    assert 'Traceback (most recent call last):\n  File "<frozen runpy>' in told  # of torchrun alone
    assert "structmat/cli" not in told


@LONG
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("folders", "expected all processes to see 'out.partial', but processes [1] do not; choose an --out"),
        ("options", "expected the same model, data, options and versions in all processes, but process 1 differs "
         "(refine_steps: 8, now 9); let all machines see the same"),
    ],
)  # fmt: skip
def test_processes_that_differ(folder: Path, tmp_path: Path, how: str, message: str) -> None:
    words = ["compress", str(folder / "dense"), "-o", "out", *USUAL, "--calibrate", str(folder / "texts.txt")]
    finished = subprocess.run(
        [*TORCHRUN, "--nproc-per-node=2", f"--master-port={free_port()}", str(TESTS / "apart.py"), how, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert finished.returncode == 1
    assert finished.stderr.count(message) == 1


def children(process: subprocess.Popen[str]) -> list[int]:
    """The processes that an agent has started."""
    return [int(one) for one in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kept(out: Path) -> set[str]:
    """The finished fits that a run has left."""
    return {path.name for path in out.with_name(f"{out.name}.partial").glob("fits/*.safetensors")}


@LONG
def test_killed_processes(folder: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    """Runs of which a process is killed, each resumed by another number of processes."""
    draws, out, killed, before = random.Random(KILLS), tmp_path / "out", 0, set[str]()
    started = time.monotonic()
    finished(launch(folder, tmp_path / "undisturbed", 2), tmp_path / "undisturbed")
    longest = time.monotonic() - started
    while killed < KILLS:
        process = launch(folder, out, draws.choice((2, 3, 4)))
        time.sleep(draws.uniform(0.2, 1.0) * longest)
        pids = children(process) if process.poll() is None else []
        if not pids:
            assert finished(process, out) == reference
            out, before = tmp_path / f"out{killed}", set()
            continue
        os.kill(draws.choice(pids), signal.SIGKILL)
        told, _ = process.communicate(timeout=PATIENCE)
        assert not any(map(alive, pids))
        if process.returncode:  # else all was done
            killed += 1
            assert "run the same command again, with any number of processes" in told or "SIGKILL" in told
            assert before <= kept(out)
            before = kept(out)
        else:
            assert weights(out) == reference
            out, before = tmp_path / f"out{killed}", set()
    assert finished(launch(folder, out, 1), out) == reference
