"""``structmat compress`` and ``structmat retrain`` under signals: the result is that of an undisturbed run.

The environment variable STRUCTMAT_SIGNALS says how many signals are sent over all modes; 200 is the long mode. A signal
comes after a random time, before a random change of a file, or before one of the last changes, among which are the
writing of the model and the moves of folders.
"""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from processes import Ended, Forks, start
from training import tiny

pytest.importorskip("datasets")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]

SIGNALS = int(os.environ.get("STRUCTMAT_SIGNALS", "12"))

FRESH = max(3, SIGNALS // 20)
"""The number of signals to fresh processes, beside those to forks."""

CALIBRATE = ("--calibrate", "{texts}", "--batch-size", "4", "--rule", ".*(attn|attention).*=low_rank")
REFINE = ("--refine", "--refine-steps", "10")
USUAL = ("--keep", "0.6", "--blocks", "2")
TRAIN = ("--data", "{texts}", "--eval", "{texts}[-4:]", "--steps", "10", "--save-steps", "3", "--batch-size", "4")
LEARN = ("structure_target=0.4", "structure_shrinkage=0.1", "logging_steps=2")


@dataclass(frozen=True)
class Mode:
    """One way to run a command.

    Attributes:
        words: The command line without the output.
        previous: The command line of what is at the place of the output before; empty for nothing.
    """

    words: tuple[str, ...]
    previous: tuple[str, ...] = ()


def compress(model: str, *words: str) -> tuple[str, ...]:
    return ("compress", model, *USUAL, *words)


def retrain(model: str, *words: str) -> tuple[str, ...]:
    return ("retrain", model, *TRAIN, "--device", "cpu", "--set", "disable_tqdm=true", *words)


MODES = {
    "weights": Mode(compress("{llama}")),
    "calibrated": Mode(compress("{llama}", *CALIBRATE)),
    "refined": Mode(compress("{llama}", *CALIBRATE, *REFINE)),
    "streamed": Mode(compress("{llama}", "--stream")),
    "streamed-refined": Mode(compress("{llama}", "--stream", *CALIBRATE, *REFINE)),
    "overwriting": Mode(compress("{llama}", "--overwrite"), compress("{llama}", "--format", "low_rank")),
    "overwriting-streamed": Mode(compress("{llama}", "--overwrite", "--stream"), compress("{llama}")),
    "hardened": Mode(compress("{llama}", "--format", "gaudi_gblr")),
    "bert": Mode(compress("{bert}", *CALIBRATE)),
    "vit": Mode(compress("{vit}")),
    "retrained": Mode(retrain("{small}", "--schedule", "constant", "--eval", "{texts}[-8:]")),
    "distilled-overwriting": Mode(
        retrain("{small}", "--teacher", "{llama}", "--overwrite"), retrain("{small}", "--steps", "1")
    ),
    "learned": Mode(retrain("{learning}", *(word for one in LEARN for word in ("--set", one)))),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders of the models by name, and the file of the texts."""
    folder = tmp_path_factory.mktemp("sources")
    networks = {
        "llama": tiny.llama(),
        "bert": tiny.bert(),
        "vit": tiny.vit(),
        "small": tiny.structured(tiny.llama()),
        "learning": tiny.learning_llama(),
    }
    for name, network in networks.items():
        network.save_pretrained(folder / name)
        if name != "vit":
            tiny.tokenizer().save_pretrained(folder / name)
    (folder / "texts.txt").write_text("<|endoftext|>".join(tiny.sentences(24)), encoding="utf-8")
    return {"texts": str(folder / "texts.txt"), **{name: str(folder / name) for name in networks}}


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    runs = Forks(tmp_path_factory.mktemp("forks"))
    yield runs
    runs.close()


def content(folder: Path) -> dict[str, Any]:
    """What every file holds; JSON files that tell of times hold them no more."""
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: timeless(path) if path.name in TIMED else path.read_bytes() for name, path in files.items()}


TIMED = {"structmat.json", "trainer_state.json", "all_results.json"}
"""The files that tell how long something took, and so are not the same after two runs."""

TIMES = {
    "seconds",
    *(f"{kind}_{rate}" for kind in ("train", "eval") for rate in ("runtime", "samples_per_second", "steps_per_second")),
}


def timeless(path: Path) -> Any:
    """The data of a JSON file without the times."""

    def strip(data: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in data.items() if name not in TIMES}

    return json.loads(path.read_bytes(), object_hook=strip)


@dataclass
class Runs:
    """The runs of one mode.

    Attributes:
        forks: Where they run.
        words: The command line.
        out: The output, in a folder in which there is nothing else.
        previous: A folder with what is there before; None for nothing.
        figures: How many signals of each kind were sent, and what became of them.
    """

    forks: Forks
    words: list[str]
    out: Path
    previous: Path | None
    expected: dict[str, Any] = field(default_factory=dict)
    figures: Counter[str] = field(default_factory=Counter)

    @property
    def partial(self) -> Path:
        return self.out.with_name(f"{self.out.name}.partial")

    def begin(self) -> None:
        """Put the previous output at the place."""
        shutil.rmtree(self.out, ignore_errors=True)
        if self.previous is not None:
            shutil.copytree(self.previous, self.out)

    def run(self, **when: Any) -> Ended:
        """Run until a signal, or to the end where there is none or it comes too late."""
        ended = self.forks.run(self.words, **when)
        self.figures["resumed"] += "going on with the interrupted run" in ended.told
        return ended

    def undisturbed(self) -> Ended:
        """Run to the end."""
        self.begin()
        ended = self.run()
        assert ended.status == 0, ended.told
        self.expected = content(self.out)
        self.check_finished(ended)
        return ended

    def stopped(self, when: dict[str, Any]) -> Ended:
        """Run until a signal, or to the end if that comes first; check what is there then."""
        name, had = when["signal"], self.partial.exists()
        ended = self.run(**when)
        if ended.status == 0:
            self.check_finished(ended)
            self.begin()
        else:
            assert ended.sent, ended.told
            self.check_status(ended, name, had)
            self.check_outputs()
        self.figures[name] += ended.sent
        self.figures["finished all the same"] += ended.sent and ended.status == 0
        return ended

    def check_finished(self, ended: Ended) -> None:
        """Nothing but the output is there, and it is that of an undisturbed run."""
        assert ended.status == 0, ended.told
        assert [path.name for path in self.out.parent.iterdir()] == [self.out.name]
        assert_same(content(self.out), self.expected)

    def check_status(self, ended: Ended, name: str, had: bool) -> None:
        """The status tells of the signal; after an interrupt a line says how to go on where there is what to keep."""
        if name != "SIGINT":
            assert ended.status == -signal.Signals[name], ended.told
            return
        if ended.status == -signal.SIGINT:  # before the command began or when it had ended
            assert ", in main" not in ended.told
            self.figures["outside of the command"] += 1
            return
        assert ended.status == 130, ended.told
        assert "Traceback" not in ended.told
        assert ended.told.splitlines()[-1] == "structmat: interrupted"
        begun = "going on with the interrupted run" in ended.told or not had
        kept = any(path.is_file() for path in self.partial.glob("*/**/*"))
        if begun and kept and self.done() != self.expected:
            assert f"{self.partial} keeps what is done; run the same command again to go on" in ended.told
            self.figures["told how to go on"] += 1

    def done(self) -> dict[str, Any]:
        return content(self.out) if self.out.exists() else {}

    def check_outputs(self) -> None:
        """What was there before is there until the new output is complete."""
        before = {} if self.previous is None else content(self.previous)
        found = self.done()
        if found in (before, self.expected):
            self.figures["complete already"] += found == self.expected
            return
        assert not found
        new = self.partial / ("run" if self.words[0] == "retrain" else "model")
        old = content(self.partial / "old")
        assert_same(old, self.expected if old == self.expected else before)  # which an earlier run may have replaced
        assert_same(content(new), self.expected)
        self.figures["between two moves"] += 1


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two folders hold the same; what differs is named."""
    assert sorted(found) == sorted(expected)
    different = [name for name, value in expected.items() if found[name] != value]
    assert not different, {name: (found[name], expected[name]) for name in different if name.endswith("json")}


def moments(chance: random.Random, quiet: Ended) -> Iterator[dict[str, Any]]:
    """Signals, and when they are to be sent, without end: every signal in each of the three ways, in random order."""
    while True:
        deck = [(name, way) for name in ("SIGKILL", "SIGINT", "SIGTERM") for way in range(3)]
        for name, way in chance.sample(deck, len(deck)):
            if way == 0:
                yield {"signal": name, "delay": chance.uniform(0, quiet.seconds)}
            else:
                first = 1 if way == 1 else max(1, quiet.events - 40)
                yield {"signal": name, "event": chance.randint(first, quiet.events)}


@pytest.mark.parametrize("mode", MODES)
def test_signals_at_random_moments(mode: str, sources: dict[str, str], forks: Forks, tmp_path: Path) -> None:
    wanted = len(range(list(MODES).index(mode), max(SIGNALS, len(MODES)), len(MODES)))
    before = {name: content(Path(path)) for name, path in sources.items() if name != "texts"}
    out = tmp_path / "work" / "out"
    out.parent.mkdir()
    previous = None
    if MODES[mode].previous:
        previous = tmp_path / "previous"
        words = [word.format(**sources) for word in MODES[mode].previous]
        assert forks.run([*words, "-o", str(previous)]).status == 0, forks.log.read_text()
    runs = Runs(forks, [*(word.format(**sources) for word in MODES[mode].words), "-o", str(out)], out, previous)
    quiet = runs.undisturbed()
    runs.begin()
    sent = 0
    for when in moments(random.Random(mode), quiet):
        sent += runs.stopped(when).sent
        if sent == wanted:
            break
    runs.check_finished(runs.run())
    assert sent == wanted
    assert before == {name: content(Path(path)) for name, path in sources.items() if name != "texts"}
    print(f"{mode}: {quiet.seconds:.2f} s, {quiet.events} changes of files; {dict(runs.figures)}")


def test_fresh_processes(sources: dict[str, str], forks: Forks, tmp_path: Path) -> None:
    out = tmp_path / "work" / "out"
    out.parent.mkdir()
    words = [word.format(**sources) for word in MODES["refined"].words]
    runs = Runs(forks, [*words, "-o", str(out)], out, None)
    runs.undisturbed()
    runs.begin()
    durations = [fresh(runs), fresh(runs)]
    chance = random.Random("fresh")
    for k in range(FRESH):
        name, had = ("SIGINT", "SIGTERM", "SIGKILL")[k % 3], runs.partial.exists()
        process = start(words, out)
        time.sleep(chance.uniform(0.3, min(durations)))
        process.send_signal(signal.Signals[name])
        told = process.communicate(timeout=300)[1]
        if process.returncode == 0:
            runs.check_finished(Ended(0, True, 0, 0.0, told))
        else:
            runs.check_status(Ended(process.returncode, True, 0, 0.0, told), name, had)
            runs.check_outputs()
        runs.figures[name] += 1
        runs.figures["resumed"] += "going on with the interrupted run" in told
        if out.exists():
            runs.begin()
    runs.check_finished(runs.run())
    print(f"fresh: {min(durations):.2f} s; {dict(runs.figures)}")


def fresh(runs: Runs) -> float:
    """Run a fresh process to its end, and tell how long it took."""
    began = time.monotonic()
    process = start(runs.words[:-2], runs.out)
    told = process.communicate(timeout=300)[1]
    duration = time.monotonic() - began
    runs.check_finished(Ended(process.returncode, False, 0, duration, told))
    runs.begin()
    return duration
