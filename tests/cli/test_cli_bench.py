"""``structmat bench``: what it times, what it writes, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from structmat import Blast
from structmat.bench.machine import Peak
from structmat.bench.models import SHAPES
from structmat.cli import main
from structmat.cli.timing import FormatsOptions, read_shape
from training import tiny


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two copies of a layer, and peaks that take no time."""
    monkeypatch.setattr("structmat.bench.layers.cold_bytes", lambda device: 1)
    monkeypatch.setattr("structmat.bench.layers.measure_peak", lambda dtype, device, large: Peak(1e9, 2e9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama under ``dense`` and compressed under ``small``."""
    path = tmp_path_factory.mktemp("bench")
    tiny.llama().save_pretrained(path / "dense")
    tiny.structured(tiny.llama()).save_pretrained(path / "small")
    return path


def shown(capsys: pytest.CaptureFixture[str]) -> tuple[list[list[str]], str]:
    """The words of each line of standard output, and standard error."""
    captured = capsys.readouterr()
    return [re.split(r" {2,}", line.strip()) for line in captured.out.splitlines()], captured.err


def test_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--formats", "blast", "--formats", "low_rank:keep=0.3", "--blocks", "2", "--blocks", "4x2"]
    words += ["--shapes", "16x32", "--shapes", "32x16"]
    words += [
        "--tokens",
        "1",
        "--tokens",
        "3",
        "--dtypes",
        "float32",
        "--dtypes",
        "bfloat16",
        "--backward",
        "--rounds",
        "1",
    ]
    assert main([*words, "--device", "cpu", "-o", str(tmp_path / "out")]) == 0
    lines, told = shown(capsys)
    assert lines[0][:9] == [
        "shape", "dtype", "step", "tokens", "format", "algorithm", "time", "spread", "speed-up"
    ]  # fmt: skip
    rows = lines[2:]
    assert len(rows) == 2 * 2 * 2 * 3 * 3  # dtypes, shapes, tokens, steps, formats
    assert rows[0][:6] == ["16 x 32", "float32", "forward", "1", "blast 2x2 keep 0.5", "automatic"]
    assert {row[4] for row in rows} == {"blast 2x2 keep 0.5", "blast 4x2 keep 0.5", "low_rank keep 0.3"}
    assert "measured peaks, bfloat16: 1 GFLOP/s, 2.0 GB/s" in told
    found = json.loads((tmp_path / "out/bench.json").read_text())
    assert len(found["layers"]) == len(rows)
    assert found["layers"][0]["copies"] == 2
    assert (tmp_path / "out/bench.png").read_bytes().startswith(b"\x89PNG")


def test_algorithms_are_chosen_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("structmat.cli.bench.autotune_", lambda model, **options: seen.append(options))
    words = ["bench", "--formats", "low_rank", "--shapes", "16x32", "--tokens", "2", "--rounds", "1", "--device", "cpu"]
    assert main([*words, "--autotune", "-o", str(tmp_path)]) == 0
    assert seen == [{"tokens": (2,), "allow_dense": False}] or seen == [{"tokens": [2], "allow_dense": False}]


def test_no_table_when_a_product_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Blast.matmul
    monkeypatch.setattr(Blast, "matmul", lambda self, x, *rest: original(self, x, *rest) * 1.1)
    words = ["bench", "--formats", "blast", "--blocks", "2", "--shapes", "16x32", "--device", "cpu"]
    assert main([*words, "-o", str(tmp_path / "out")]) == 1
    lines, told = shown(capsys)
    assert lines == []
    assert "structmat: no times are shown, since they would be those of a wrong result: the product of Blast(" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["structured", "dense", "both"])
def test_models(which: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, small = str(folder / "dense"), str(folder / "small")
    named = {"structured": [small], "dense": [dense], "both": [dense, small]}[which]
    expected = {"structured": ["dense", small], "dense": [dense, "blast 2x2 keep 0.5"], "both": [dense, small]}[which]
    words = [
        "bench",
        *named,
        "--formats",
        "blast",
        "--blocks",
        "2",
        "--prefill",
        "4",
        "--generate",
        "2",
        "--generate",
        "5",
    ]
    words += ["--most-tokens", "3", "--rounds", "1", "--device", "cpu", "--backward", "-o", str(tmp_path)]
    assert main(words) == 0
    lines, told = shown(capsys)
    steps = [("prefill", "4"), ("decode", "1"), ("generate", "2"), ("generate", "5"), ("training", "4")]
    assert [tuple(row[:3]) for row in lines[2:]] == [(name, *step) for step in steps for name in expected]
    assert [row[-1] == "extrapolated" for row in lines[2:]] == [row[1:3] == ["generate", "5"] for row in lines[2:]]
    assert "the peak memory is measured on a GPU alone" in told
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["sizes"][expected[1]]["parameters"] < found["sizes"][expected[0]]["parameters"]
    assert (tmp_path / "bench.png").is_file()


def test_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.llama().config
    facts = {name: getattr(config, name) for name in SHAPES["llama-tiny"]}
    monkeypatch.setitem(SHAPES, "llama-tiny", facts)
    words = ["bench", "--shape", "llama-tiny", "--formats", "low_rank", "--prefill", "4", "--generate", "2"]
    assert main([*words, "--rounds", "1", "--device", "cpu", "--autotune", "-o", str(tmp_path)]) == 0
    lines, _ = shown(capsys)
    assert [row[0] for row in lines[2:4]] == ["dense", "low_rank keep 0.5"]


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else found(name))
    words = ["bench", "--formats", "low_rank", "--shapes", "16x32", "--tokens", "2", "--rounds", "1", "--device", "cpu"]
    assert main([*words, "-o", str(tmp_path)]) == 0
    assert "no bench.png, which needs matplotlib: pip install 'structmat[plot]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "4096"], "expected --shapes such as 4096x11008, out features x in features, got '4096'"),
        (["--dtypes", "int8"], "expected --dtypes to be one of 'float32', 'bfloat16', 'float16', got 'int8'"),
        (["--rounds", "0"], "expected --rounds to be an integer of at least 1, got 0"),
        (["--keep", "2"], "expected --keep to be in (0, 1], got 2.0"),
        (
            ["--formats", "blast:size=2"],
            "expected the option of blast in --formats blast:size=2 to be one of 'keep', 'blocks'",
        ),
        (["--mode", "graphs"], "expected a CUDA device for the mode 'graphs', got the CPU; take 'eager' or 'compile'"),
        (["--shape", "llama-8b"], "expected --shape to be one of 'llama-7b', 'llama-tiny', got 'llama-8b'"),
        (
            ["--shape", "llama-7b", "--dtypes", "float32", "--dtypes", "float16"],
            "expected one of --dtypes for models, got 2",
        ),
    ],
)
def test_wrong_options(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words, "--device", "cpu", "-o", str(tmp_path / "out")]) == 1
    assert f"structmat: {message}" in capsys.readouterr().err


def test_models_that_do_not_go_together(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "-o", str(tmp_path / "out")]
    assert main(["bench", str(folder / "dense"), "--shape", "llama-tiny", *words]) == 1
    assert "expected models or --shape, got " in capsys.readouterr().err
    tiny.bert().save_pretrained(tmp_path / "bert")
    assert main(["bench", str(tmp_path / "bert"), *words]) == 1
    assert "expected a language model that generates, got a BertForSequenceClassification" in capsys.readouterr().err
    (tmp_path / "out").write_text("")
    assert main(["bench", *words]) == 1
    assert "expected --out to be a folder, but " in capsys.readouterr().err


def test_reading() -> None:
    assert read_shape(" 4096x11008 ") == (4096, 11008)
    with pytest.raises(ValueError, match="got '4096 x 11008'"):
        read_shape("4096 x 11008")
    rules = FormatsOptions(("blast", "monarch:blocks=8x4", "low_rank:keep=0.25"), 0.5, ("4", "16")).rules()
    assert list(rules) == [
        "blast 4x4 keep 0.5", "blast 16x16 keep 0.5", "monarch 8x4 keep 0.5", "low_rank keep 0.25",
    ]  # fmt: skip
    assert rules["monarch 8x4 keep 0.5"].blocks == (8, 4)
    assert rules["low_rank keep 0.25"].keep == 0.25
