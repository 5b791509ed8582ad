"""The command line, and the demo that it runs."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import structmat
import structmat.demo
from structmat import cli
from structmat.cli.app import COMMANDS, app
from structmat.demo import Settings, usual_structures
from structmat.formats import FORMATS

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of one quick demo and the content of its results."""
    out = tmp_path_factory.mktemp("demo") / "out"
    words = ["demo", "--quick", "--formats", "blast", "--formats", "low_rank", "--keep", "0.3", "--out", str(out)]
    threads = torch.get_num_threads()
    assert cli.main(words) == 0
    assert torch.get_num_threads() == threads
    return out, json.loads((out / "results.json").read_text(encoding="utf-8"))


def test_the_demo_writes_its_files(demo: tuple[Path, dict[str, Any]]) -> None:
    out, _ = demo
    assert sorted(path.name for path in out.iterdir()) == ["couplings.png", "results.json", "trade_off.png"]
    assert all((out / name).read_bytes().startswith(PNG) for name in ("couplings.png", "trade_off.png"))


def test_the_demo_says_what_it_did(demo: tuple[Path, dict[str, Any]]) -> None:
    content = demo[1]
    assert (content["structmat"], content["torch"]) == (structmat.__version__, torch.__version__)
    assert content["settings"] == {
        "keep": 0.3, "formats": ["blast", "low_rank"], "seeds": 1, "out": None, "quick": True
    }  # fmt: skip
    assert content["seconds"] > 0
    assert content["refused"] == []


def test_the_demos_counts(demo: tuple[Path, dict[str, Any]]) -> None:
    dense, *others = demo[1]["results"]
    assert [result["name"] for result in (dense, *others)] == ["dense", "blast", "low_rank"]
    body = 3 * (64 * 192 + 64 * 64 + 2 * 64 * 128)
    assert dense["multiplications"] == 16 * (4 * 64 + body) + 10 * 64
    norms, biases, embedding = 7 * 2 * 64, 3 * (192 + 64 + 128 + 64), 5 * 64 + 16 * 64
    assert dense["parameters"] == body + norms + biases + embedding + 10 * 65
    for result in others:
        assert 0.25 < result["real_keep"] <= 0.3
        assert result["parameters"] == dense["parameters"] - round(body * (1 - result["real_keep"]))
        assert result["relative_multiplications"] == result["multiplications"] / dense["multiplications"]


def test_the_demos_accuracies(demo: tuple[Path, dict[str, Any]]) -> None:
    dense, blast, low_rank = demo[1]["results"]
    (accuracy,) = dense["before"]
    assert accuracy > 0.93
    for result in (blast, low_rank):
        for name in ("before", "after", "scratch", "weight_error"):
            assert len(result[name]) == 1
            assert 0 < result[name][0] < 1
        assert result["after"][0] > max(0.85, result["before"][0])  # retraining pays
        assert result["scratch"][0] > 0.8
    assert blast["weight_error"][0] < low_rank["weight_error"][0]
    for value in (accuracy, *blast["after"], *low_rank["scratch"]):  # of 450 test images
        assert value * 450 == pytest.approx(round(value * 450), abs=1e-3)


def test_settings_of_a_full_run() -> None:
    assert (Settings().epochs, Settings(quick=True).epochs) == ((30, 10), (8, 2))
    assert Settings(keep=0.3).keeps == (0.15, 0.3, 0.6)
    assert Settings(keep=0.6).keeps == (0.3, 0.6, 0.9)
    assert Settings(keep=0.3, quick=True).keeps == (0.3,)
    names = {"low_rank", "block_diagonal", "monarch", "block_sparse", "blast", "gaudi_gblr"}
    assert set(Settings().formats) == names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--formats", "butterfly"], "expected --formats to be one of 'low_rank', .*, got 'butterfly'"),
        (["--formats", "blast", "--formats", "dense"], "expected --formats to be one of .*, got 'dense'"),
        (["--keep", "0"], r"expected --keep to be in \(0, 1\], got 0.0"),
        (["--keep", "1.5"], r"expected --keep to be in \(0, 1\], got 1.5"),
        (["--keep", "nan"], r"expected --keep to be in \(0, 1\], got nan"),
        (["--seeds", "0"], "expected --seeds to be an integer of at least 1, got 0"),
    ],
)
def test_wrong_words_are_explained(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", *words, "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(f"structmat: {message}\n", captured.err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Missing command; see structmat --help"),
        (["fly"], "No such command 'fly'; see structmat --help"),
        (["demo", "--keep", "much"], "Invalid value for '--keep': .*; see structmat demo --help"),
        (["demo", "--fast"], "No such option: --fast.*; see structmat demo --help"),
        (["plan"], "Missing argument 'MODEL'; see structmat plan --help"),
        (["plan", "--layers", "a"], "Missing argument 'MODEL'; see structmat plan --help"),
    ],
)
def test_words_that_do_not_parse_end_with_two(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(f"structmat: {message}\n", captured.err)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"structmat {structmat.__version__}\n"


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Usage: structmat {command}" in shown
    assert "Examples:" in shown
    assert f"$ structmat {command} " in shown


@pytest.mark.parametrize("words", [example for entry in COMMANDS.values() for example in entry.examples])
def test_the_examples_parse(words: str) -> None:
    commands: Any = typer.main.get_command(app)
    name, *rest = shlex.split(words)[1:]
    context = commands.imported(name).make_context(name, rest)
    assert context.params


def test_a_command_line_of_the_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["structmat", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("structmat.cli", run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("structmat ")


@pytest.mark.parametrize("name", ["typer", "rich"])
def test_without_typer_one_line_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == (
        "structmat: the command line needs typer and rich: pip install 'structmat[cli]'\n"
    )


def test_debug_shows_the_traceback() -> None:
    for words in (["demo", "--keep", "0", "--debug"], ["--debug", "demo", "--keep", "0"]):
        with pytest.raises(ValueError, match="expected --keep"):
            cli.main(words)


def test_a_fault_of_the_program_is_not_explained_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> None:
        raise AttributeError("a fault")

    monkeypatch.setattr(structmat.demo, "run_demo", broken)
    with pytest.raises(AttributeError, match="a fault"):
        cli.main(["demo"])


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("structmat.demo")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(structmat, "demo")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["demo", "--quick"]) == 1
    assert capsys.readouterr().err.startswith(
        "structmat: the demo needs scikit-learn and matplotlib: pip install 'structmat[demo]'"
    )


def test_every_structure_is_in_the_demo() -> None:
    assert set(usual_structures()) == set(FORMATS) - {
        "dense",
        "gblr",
        "tiled_gblr",
        "quantized",
        "merged",
    }  # made from others


def test_a_budget_that_nothing_fits_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "demo",
        "--formats",
        "monarch",
        "--formats",
        "block_sparse",
        "--keep",
        "0.01",
        "--quick",
        "--out",
        str(tmp_path / "out"),
    ]
    assert cli.main(words) == 1
    assert "no structure fits the budget: monarch: layer 'blocks.0.qkv' does not fit" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interrupt_while_the_program_is_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.importlib, "import_module", interrupted)
    assert cli.main(["--version"]) == 130
    assert capsys.readouterr().err == "structmat: interrupted\n"


def test_an_interrupt_is_no_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(structmat.demo, "run_demo", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "structmat: interrupted\n"
