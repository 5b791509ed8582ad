"""``structmat verify``, and what counts as a change of a command's source."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from structmat import LowRank, apply_plan_, save_model
from structmat.cli import main
from structmat.cli.fingerprints import fingerprint
from training import tiny


def test_a_folder_and_a_file_are_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama()
    apply_plan_(
        model, {"model.layers.0.self_attn.o_proj": LowRank(*model.model.layers[0].self_attn.o_proj.weight.shape, 2)}
    )
    model.save_pretrained(tmp_path / "m")
    save_model(model, tmp_path / "file")
    for place in (tmp_path / "m", tmp_path / "file"):
        assert main(["verify", str(place)]) == 0
        assert f"tensors of {place} are as they were saved\n" in capsys.readouterr().out
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert main(["verify", str(tmp_path / "m")]) == 1
    said = capsys.readouterr().err
    assert said == f"structmat: expected '{tmp_path / 'm'}' as it was saved: 'model.norm.weight' has other values\n"
    assert main(["report", str(tmp_path / "m")]) == 0  # it reads no weights
    assert main(["densify", str(tmp_path / "m"), "-o", str(tmp_path / "dense")]) == 1
    assert "'model.norm.weight' has other values" in capsys.readouterr().err


def test_what_has_no_digests_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.llama().save_pretrained(tmp_path)
    assert main(["verify", str(tmp_path)]) == 0
    assert "are finite; no digests were saved with them, so no more is known" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["nothing", "empty", "foreign"])
def test_what_is_no_model_is_refused(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    elif what == "foreign":
        save_file({"a": torch.ones(1)}, path)
    assert main(["verify", str(path)]) == 1
    assert capsys.readouterr().err.startswith("structmat: expected ")


def test_a_source_changes_with_its_content_alone(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    file = tmp_path / "m" / "weights"
    file.write_bytes(bytes(10**6))
    before, facts = fingerprint(tmp_path / "m"), file.stat()
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))
    assert fingerprint(tmp_path / "m") == before
    file.write_bytes(bytes(10**6 - 1) + b"x")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert fingerprint(tmp_path / "m") != before
    assert fingerprint(file) != fingerprint(tmp_path / "m")
    assert fingerprint(tmp_path / "none") is None


def test_a_finished_result_of_another_content_is_stale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama()
    model.save_pretrained(tmp_path / "m")
    words = ["compress", str(tmp_path / "m"), "-o", str(tmp_path / "out"), "--format", "low_rank"]
    assert main(words) == 0
    file = tmp_path / "m" / "model.safetensors"
    facts, size = file.stat(), file.stat().st_size
    model.model.norm.weight.data += 1
    save_file(load_file(file) | {"model.norm.weight": model.model.norm.weight.data}, file, {"format": "pt"})
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert file.stat().st_size == size
    assert main(words) == 1
    assert "was made with other options (model files)" in capsys.readouterr().err


def test_a_damaged_record_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.llama().save_pretrained(tmp_path / "m")
    words = ["compress", str(tmp_path / "m"), "-o", str(tmp_path / "out"), "--format", "low_rank"]
    assert main(words) == 0
    record = tmp_path / "out" / "structmat.json"
    for text in ("{", "[" * 10**5, '{"command": 3}', '{"command": "compress", "options": []}'):
        record.write_text(text)
        capsys.readouterr()
        assert main(words) == 1
        said = capsys.readouterr().err
        assert str(record) in said
        assert said.count("\n") == 1
    record.write_text('{"command": "compress", "options": {}, "layers": {"a": {"error": "x"}}}')
    assert main(["report", str(tmp_path / "out")]) == 1
    assert f"{str(record)!r}: expected 'error' of the record of layer 'a' to be a number" in capsys.readouterr().err
