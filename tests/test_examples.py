"""The examples run from end to end, and show what they promise."""

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The variables that an example leaves."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return runpy.run_path(str(EXAMPLES / name))


@pytest.mark.slow
def test_a_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("STRUCTMAT_DATA", raising=False)
    found = run("compress_llm.py", tmp_path, monkeypatch)
    scores = {name: score.token for name, score in found["scores"].items()}
    assert scores["dense"] < 2
    assert scores["dense"] <= scores["compressed"] < 1.5 * scores["dense"]
    assert scores["retrained"] < 1.02 * scores["compressed"]
    assert found["report"].parameters < 0.6 * found["report"].dense_parameters
    assert capsys.readouterr().out.splitlines()[-1].startswith("Ada had a red kite. One day Ada met ")


@pytest.mark.slow
def test_a_language_model_that_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_folder: Path) -> None:
    scores = run("compress_llm.py", tmp_path, monkeypatch)["scores"]
    assert scores["dense"].token < 7
    assert scores["dense"].token < scores["retrained"].token < scores["compressed"].token


@pytest.mark.slow
def test_a_vision_transformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    found = run("compress_vit.py", tmp_path, monkeypatch)
    assert found["scores"]["dense"] > 0.88
    assert found["scores"]["compressed"] > 0.85
    assert found["scores"]["retrained"] > found["scores"]["dense"] - 0.03
    assert found["report"].parameters < 0.5 * found["report"].dense_parameters
