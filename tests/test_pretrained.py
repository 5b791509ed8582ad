"""The function does what the command does."""

import json
from pathlib import Path

import pytest
import torch

import structmat as sm
from structmat.cli import main
from training import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with its tokenizer under ``dense``, and texts."""
    path = tmp_path_factory.mktemp("pretrained")
    tiny.llama().save_pretrained(path / "dense")
    tiny.tokenizer().save_pretrained(path / "dense")
    (path / "texts").mkdir()
    for k, text in enumerate(tiny.sentences(24)):
        (path / "texts" / f"{k:02}.txt").write_text(text, encoding="utf-8")
    return path


def test_the_function_and_the_command_give_the_same(folder: Path, tmp_path: Path) -> None:
    source = f"{folder}/texts/*.txt"
    record = sm.compress_pretrained(
        folder / "dense",
        tmp_path / "one",
        keep=0.6,
        blocks=2,
        format="low_rank",
        layers=[".*q_proj", ".*up_proj"],
        exclude=r".*layers\.0.*",
        calibrate=source,
        samples=12,
        length=10,
    )
    words = [
        "--format",
        "low_rank",
        "--keep",
        "0.6",
        "--blocks",
        "2",
        "--layers",
        ".*q_proj",
        "--layers",
        ".*up_proj",
        "--samples",
        "12",
    ]
    words += ["--exclude", r".*layers\.0.*", "--calibrate", source, "--length", "10"]
    assert main(["compress", str(folder / "dense"), "-o", str(tmp_path / "two"), *words]) == 0
    other = json.loads((tmp_path / "two" / "structmat.json").read_text())
    assert record["options"] == other["options"]
    assert record["measured_after"] == other["measured_after"] > 1
    one, two = (sm.load_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())
    assert len(sm.plan_of(sm.load_pretrained(tmp_path / "one"))) == 2
    again = sm.compress_pretrained(
        str(folder / "dense"),
        str(tmp_path / "one"),
        keep=0.6,
        blocks="2",
        format="low_rank",
        layers=(".*q_proj", ".*up_proj"),
        exclude=[r".*layers\.0.*"],
        calibrate=source,
        samples=12,
        length=10,
    )
    assert again == record  # it is finished, and left alone


def test_a_plan_in_a_file(folder: Path, tmp_path: Path) -> None:
    sm.make_plan(tiny.llama(), {".*up_proj": "low_rank"}, keep=0.5).save(tmp_path / "plan.json")
    record = sm.compress_pretrained(folder / "dense", tmp_path / "out", plan=str(tmp_path / "plan.json"))
    assert set(record["layers"]) == {f"model.layers.{k}.mlp.up_proj" for k in range(2)}


def test_what_is_no_option(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"expected options among batch_size, .*, got kep, colour"):
        sm.compress_pretrained(folder / "dense", tmp_path / "out", kep=0.5, colour="red")
    with pytest.raises(FileNotFoundError, match="there is no such file or folder here"):
        sm.compress_pretrained(folder / "dense", tmp_path / "out", calibrate="nothing.txt")
    assert not list(tmp_path.iterdir())
