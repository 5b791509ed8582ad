"""The way of a learned structure through the command line: compress, retrain, harden."""

import json
from pathlib import Path

import pytest
import torch

from structmat import GaudiGblr, Gblr, load_pretrained, plan_of
from structmat.cli import main
from training import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama under ``dense``, and texts."""
    path = tmp_path_factory.mktemp("structure")
    tiny.llama().save_pretrained(path / "dense")
    tiny.tokenizer().save_pretrained(path / "dense")
    (path / "texts.txt").write_text("<|endoftext|>".join(tiny.sentences(24)), encoding="utf-8")
    return path


def compress(folder: Path, out: Path, *words: str) -> int:
    return main(["compress", str(folder / "dense"), "-o", str(out), "--format", "gaudi-gblr", *words])


@pytest.mark.parametrize("method", ["default", "published"])
def test_compress_hardens(folder: Path, tmp_path: Path, method: str) -> None:
    assert compress(folder, tmp_path / "out", "--keep", "0.6", "--method", method) == 0
    model = load_pretrained(tmp_path / "out")
    formats = plan_of(model)
    assert {type(format) for format in formats.values()} == {Gblr}
    total = sum(format.M * format.N for format in formats.values())
    assert 0.3 * total < sum(format.num_parameters() for format in formats.values()) <= 0.6 * total
    record = json.loads((tmp_path / "out/structmat.json").read_text())
    assert 0 < record["error"] < 0.7


def test_the_whole_way(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = str(folder / "texts.txt")
    assert compress(folder, tmp_path / "learning", "--keep", "0.8", "--calibrate", texts, "--learn") == 0
    learning = load_pretrained(tmp_path / "learning")
    assert {type(format) for format in plan_of(learning).values()} == {GaudiGblr}
    words = ["retrain", str(tmp_path / "learning"), "-o", str(tmp_path / "learned"), "--data", texts, "--steps", "4"]
    words += ["--set", "structure_target=0.4", "structure_learning_rate=0.01", "structure_shrinkage=0.5"]
    assert main([*words, "--device", "cpu"]) == 0
    assert main(["harden", str(tmp_path / "learned"), "-o", str(tmp_path / "small")]) == 0
    assert "14 layers hardened, the matrices changed by" in capsys.readouterr().err
    learned, small = load_pretrained(tmp_path / "learned"), load_pretrained(tmp_path / "small")
    ids = torch.tensor(tiny.rows(1))
    torch.testing.assert_close(small(ids).logits, learned(ids).logits, rtol=1e-3, atol=1e-4)
    formats = plan_of(small)
    dense = sum(format.M * format.N for format in formats.values())
    assert sum(format.num_parameters() for format in formats.values()) <= 0.4 * dense
    record = json.loads((tmp_path / "small/structmat.json").read_text())
    assert set(record["layers"]) == set(formats)
    assert max(record["layers"].values()) < 1e-4


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compress(folder, tmp_path / "a", "--stream") == 1
    assert "expected no gaudi_gblr with --stream" in capsys.readouterr().err
    assert main(["compress", str(folder / "dense"), "-o", str(tmp_path / "a"), "--blocks", "2", "--learn"]) == 1
    assert "expected a layer of format gaudi_gblr with --learn, got none" in capsys.readouterr().err
    assert main(["harden", str(folder / "dense"), "-o", str(tmp_path / "a")]) == 1
    assert "expected a network with GaudiGblr layers, got none" in capsys.readouterr().err
    assert main(["compress", str(folder / "dense"), "-o", str(tmp_path / "a"), "--format", "gblr"]) == 1
    assert "gaudi_gblr" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
