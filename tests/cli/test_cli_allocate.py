"""``structmat allocate``: the plan that it writes, what it says, and what it refuses."""

from pathlib import Path

import pytest

from structmat import Plan, load_pretrained, plan_of
from structmat.cli import main
from training import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with its tokenizer under ``dense``, and texts."""
    path = tmp_path_factory.mktemp("allocate")
    tiny.llama().save_pretrained(path / "dense")
    tiny.tokenizer().save_pretrained(path / "dense")
    (path / "texts.txt").write_text("<|endoftext|>".join(tiny.sentences(24)), encoding="utf-8")
    return path


def allocate(folder: Path, out: Path, *words: str) -> int:
    data = ["--calibrate", str(folder / "texts.txt"), "--length", "10", "--batch-size", "4", "--effort", "quick"]
    return main(["allocate", str(folder / "dense"), "-o", str(out), "--blocks", "2", *data, *words])


def test_the_plan_holds_the_budget_and_goes_to_compress(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    assert allocate(folder, file, "--keep", "0.7", "--cache", str(tmp_path / "fits")) == 0
    said = capsys.readouterr()
    assert "predicted KL divergence" in said.out
    assert f"wrote {file}" in said.err
    plan = Plan.load(file)
    assert not any("lm_head" in name for name in plan)
    assert sum(f.num_parameters() for f in plan.values()) <= 0.7 * sum(f.M * f.N for f in plan.values())
    assert any((tmp_path / "fits").iterdir())
    texts = ["--calibrate", str(folder / "texts.txt"), "--length", "10"]
    assert main(["compress", str(folder / "dense"), "-o", str(tmp_path / "out"), "--plan", str(file), *texts]) == 0
    structured = {name: format for name, format in plan.items() if format.replaces}
    assert dict(plan_of(load_pretrained(tmp_path / "out"))) == structured


def test_formats_layers_and_the_unit_are_chosen(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    chosen = ["--format", "monarch", "--layers", ".*mlp.*", "--exclude", ".*down_proj", "--unit", "multiplications"]
    assert allocate(folder, file, "--keep", "0.6", *chosen) == 0
    plan = Plan.load(file)
    assert plan
    assert all("mlp" in name and "down_proj" not in name for name in plan)
    assert {type(format).__name__ for format in plan.values()} <= {"Monarch", "Dense"}


def test_a_model_that_is_read_block_by_block_gets_the_same_plan(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    assert allocate(folder, one, "--keep", "0.6") == 0
    assert allocate(folder, two, "--keep", "0.6", "--stream") == 0
    assert dict(Plan.load(one)) == dict(Plan.load(two))
    capsys.readouterr()
    assert allocate(folder, two, "--stream", "--dtype", "float16") == 1
    assert "expected neither --dtype nor --device with --stream" in capsys.readouterr().err


def test_the_budget_can_be_seconds(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unit = ["--unit", "seconds", "--tokens", "1", "--tokens", "64"]
    assert allocate(folder, tmp_path / "plan.json", "--keep", "1", "--format", "low_rank", *unit) == 0  # so small
    assert "seconds kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--effort", "much"], "expected --effort to be one of"),
        (["--unit", "hours"], "expected --unit to be one of"),
        (["--unit", "seconds", "--tokens", "0"], "expected tokens to be"),
        (["--tokens", "8"], "expected --unit seconds with --tokens"),
        (["--keep", "0.001"], "expected a budget of at least"),
        (["--layers", "nothing"], "expected --layers 'nothing' to pick"),
        (["--exclude", ".*"], "expected dense linear layers to compress, found none"),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert allocate(folder, tmp_path / "plan.json", *words) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()


def test_it_needs_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["allocate", str(folder / "dense")]) == 1
    assert "expected --calibrate" in capsys.readouterr().err
