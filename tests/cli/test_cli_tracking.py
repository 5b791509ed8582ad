"""``--report-to``: the figures of a compression and of a training in TensorBoard."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from structmat import compress_pretrained
from structmat._progress import progress_bar, watched
from structmat.cli import main
from structmat.cli.tracking import TrackingOptions
from training import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama under ``dense`` and texts."""
    path = tmp_path_factory.mktemp("tracking")
    tiny.llama().save_pretrained(path / "dense")
    tiny.tokenizer().save_pretrained(path / "dense")
    (path / "texts.txt").write_text("<|endoftext|>".join(tiny.sentences(40)), encoding="utf-8")
    return path


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The steps and values of every figure in the folder of TensorBoard's files."""
    (run,) = (folder / "runs").iterdir()
    found = EventAccumulator(str(run)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_a_compression_is_reported(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"format": "low_rank", "layers": ".*up_proj", "calibrate": str(folder / "texts.txt")}
    record = compress_pretrained(folder / "dense", tmp_path / "small", report_to="tensorboard", uniform=True, **options)
    plain = compress_pretrained(folder / "dense", tmp_path / "plain", uniform=True, **options)
    assert record["options"] == plain["options"]
    assert "report-to" not in record["commands"][0]
    assert not (tmp_path / "plain" / "runs").exists()
    found = scalars(tmp_path / "small")
    assert [value for _, value in found["eval/perplexity"]] == [
        pytest.approx(record["measured_before"]), pytest.approx(record["measured_after"]),
    ]  # fmt: skip
    shares = [value for _, value in found["train/compress_done"]]
    assert shares == sorted(set(shares))
    assert shares[-1] == 1
    for name, layer in record["layers"].items():
        assert found[f"train/output_error/{name}"][0][1] == pytest.approx(layer["output_error"])
        assert found[f"train/weight_error/{name}"][0][1] == pytest.approx(layer["error"])
    assert found["train/output_error"][0][1] == pytest.approx(record["output_error"])
    steps = sorted(step for values in found.values() for step, _ in values)
    assert set(steps) == set(range(steps[-1] + 1))
    assert {path.name for path in tmp_path.iterdir()} == {"small", "plain"}


def test_a_training_is_reported(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--format", "low_rank", "--layers", ".*up_proj"]
    assert main(["compress", str(folder / "dense"), "-o", str(tmp_path / "small"), *words]) == 0
    words = ["--data", str(folder / "texts.txt"), "--steps", "2", "--device", "cpu", "--length", "16"]
    words += ["--report-to", "tensorboard", "--set", "logging_steps=1"]
    assert main(["retrain", str(tmp_path / "small"), "-o", str(tmp_path / "better"), *words]) == 0
    found = scalars(tmp_path / "better")
    assert [step for step, _ in found["train/loss"]] == [1, 2]
    figures = json.loads((tmp_path / "better/structmat.json").read_text())["figures"]
    losses = dict(found["eval/loss"])
    assert losses[0] == pytest.approx(figures["eval_loss_before"], abs=1e-4)  # which is measured before the training
    assert losses[2] == pytest.approx(figures["eval_loss"], abs=1e-4)
    assert not Path("runs").exists()
    assert "report_to" in (tmp_path / "better/structmat.json").read_text()
    assert json.loads((tmp_path / "better/structmat.json").read_text())["options"]["report_to"] == "none"
    assert main(["retrain", str(tmp_path / "small"), "-o", str(tmp_path / "better"), *words[:-4], *words[-2:]]) == 0


def test_a_missing_package_fails_at_the_start(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.util.find_spec("wandb") is None
    with pytest.raises(ImportError, match="--report-to wandb needs the package wandb: pip install wandb"):
        TrackingOptions(("tensorboard,wandb",)).check()
    words = ["compress", str(folder / "dense"), "-o", str(tmp_path / "small"), "--report-to", "tensorboard,wandb"]
    assert main(words) == 1
    assert capsys.readouterr().err == "structmat: --report-to wandb needs the package wandb: pip install wandb\n"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="expected --report-to to be one of 'tensorboard', 'trackio', 'wandb', got"):
        TrackingOptions(("comet",))
    assert TrackingOptions(("trackio, wandb", "wandb")).names == ["trackio", "wandb"]


def test_bars_are_watched_while_the_context_is_entered() -> None:
    seen: list[tuple[str, float]] = []
    with watched(lambda title, share: seen.append((title, share))), progress_bar(total=4, desc="work") as bar:
        bar.update(1)
        bar.update(3)
        with progress_bar(total=4, desc="hidden", show=False) as hidden:
            hidden.update(1)
    with progress_bar(total=1, desc="later") as bar:
        bar.update(1)
    assert seen == [("work", 0.25), ("work", 1.0)]
