"""``structmat retrain``: what it saves, how it goes on after an interrupt, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from structmat import load_pretrained, plan_of
from structmat.cli import main
from structmat.cli.output import Output
from structmat.cli.retrain import last_checkpoint
from structmat.cli.training import read_settings
from structmat.evaluate import perplexity
from structmat.integrations.transformers import retraining as integration
from training import tiny

pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama under ``dense`` and compressed under ``small``, and texts."""
    path = tmp_path_factory.mktemp("retrain")
    tiny.llama().save_pretrained(path / "dense")
    tiny.structured(tiny.llama()).save_pretrained(path / "small")
    for name in ("dense", "small"):
        tiny.tokenizer().save_pretrained(path / name)
    (path / "texts.txt").write_text("<|endoftext|>".join(tiny.sentences(32)), encoding="utf-8")
    return path


def retrain(folder: Path, out: Path, *words: str) -> int:
    usual = ["--batch-size", "4", "--device", "cpu", "--set", "disable_tqdm=true"]
    return main(["retrain", str(folder / "small"), "-o", str(out), "--data", str(folder / "texts.txt"), *usual, *words])


def test_the_model_and_its_figures(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["--eval", f"{folder / 'texts.txt'}[-8:]", "--teacher", str(folder / "dense"), "--steps", "20"]
    assert retrain(folder, out, *words, "--learning-rate", "1e-2", "--length", "16", "--save-steps", "8") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    record = json.loads((out / "structmat.json").read_text())
    figures = record["figures"]
    measured = [f"{figures[name]:.4f}" for name in ("eval_perplexity_before", "eval_perplexity")]
    assert ["eval_perplexity", *measured] in lines
    assert record["options"]["distill_logits"] == 1
    assert record["options"]["disable_tqdm"] is True
    trained, before = load_pretrained(out), load_pretrained(folder / "small")
    assert plan_of(trained) == plan_of(before)
    texts = tiny.sentences(32)[-8:]
    after = perplexity(trained, tiny.tokenizer(), texts, length=16, progress=False).token
    assert figures["eval_perplexity"] == pytest.approx(after, rel=1e-4)
    start = perplexity(before, tiny.tokenizer(), texts, length=16, progress=False).token
    assert figures["eval_perplexity_before"] == pytest.approx(start, rel=1e-4)
    assert after < start
    assert not list(out.glob("checkpoint-*"))
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    capsys.readouterr()
    assert retrain(folder, out, *words, "--learning-rate", "1e-2", "--length", "16", "--save-steps", "8") == 0
    assert "is finished, with the same options" in capsys.readouterr().err


def test_a_log_is_plain_lines(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--steps", "5", "--set", "logging_steps=1", "--set", "disable_tqdm=false"]
    assert retrain(folder, tmp_path / "out", *words) == 0
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert [line for line in lines if line.startswith("training: 100% (5 of 5), ") and ", loss " in line]
    held_out = [line for line in lines if re.fullmatch(r"after \d of 5 steps, held out: loss [\d.]+", line)]
    assert [line.split()[1] for line in held_out] == ["1", "2", "3", "4", "5"]
    assert "{" not in printed.err + printed.out
    assert "preparation" not in printed.out


def test_an_interrupted_run_goes_on_from_its_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--steps", "6", "--save-steps", "4"]
    assert retrain(folder, tmp_path / "quiet", *words) == 0

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(integration.StructuredTrainer, "save_model", saving_until(6))
        assert retrain(folder, out, *words) == 130
    assert (tmp_path / "out.partial/run/checkpoint-4/trainer_state.json").exists()
    (tmp_path / "out.partial/run/.config.json.x1").touch()  # as a kill leaves it
    capsys.readouterr()
    assert retrain(folder, out, *words, "--learning-rate", "1") == 1
    assert re.search("the options of the interrupted run in .*, got others .learning_rate: ", capsys.readouterr().err)
    with monkeypatch.context() as patch:
        patch.setattr(Output, "appear", interrupted)
        assert retrain(folder, out, *words) == 130
    assert "going on from checkpoint-4" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(integration, "retrain", interrupted)  # all is done but the last step
        assert retrain(folder, out, *words) == 0
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("quiet", "out")]
    assert names[0] == names[1]
    quiet, resumed = (load_pretrained(tmp_path / name).state_dict() for name in ("quiet", "out"))
    assert all(torch.equal(quiet[name], tensor) for name, tensor in resumed.items())
    losses = [json.loads((tmp_path / name / "structmat.json").read_text())["figures"] for name in ("quiet", "out")]
    assert losses[0]["train_loss"] == losses[1]["train_loss"]
    assert {path.name for path in tmp_path.iterdir()} == {"quiet", "out"}


def test_an_output_between_two_moves_is_put_back(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert retrain(folder, out, "--steps", "1") == 0
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/options.json").write_text('{"command": "retrain", "options": {}}')
    out.rename(tmp_path / "out.partial/old")
    assert retrain(folder, out, "--steps", "1") == 0
    assert "is finished, with the same options" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def saving_until(step: int) -> Any:
    """A ``save_model`` that is interrupted at a step."""
    save = integration.StructuredTrainer.save_model

    def save_model(trainer: Any, *arguments: Any, **options: Any) -> None:
        if trainer.state.global_step >= step:
            raise KeyboardInterrupt
        save(trainer, *arguments, **options)

    return save_model


def test_starting_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "out.partial/run/checkpoint-4"
    kept.mkdir(parents=True)
    (kept / "trainer_state.json").write_text('{"global_step": 4}')
    (tmp_path / "out.partial/options.json").write_text('{"command": "retrain", "options": {"model": "x"}}')
    assert retrain(folder, tmp_path / "out", "--steps", "1", "--overwrite") == 0
    assert "starting again, with other options than the interrupted run (model: 'x', now" in capsys.readouterr().err


def test_other_processes_under_torchrun_leave_the_folders_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(integration, "retrain", lambda *given, **_: seen.append(given[4].output_dir) or {})
    assert retrain(folder, tmp_path / "out", "--steps", "1") == 0
    assert seen == [str(tmp_path / "out.partial/run")]
    assert not list(tmp_path.iterdir())


def test_the_last_whole_checkpoint(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for number, content in ((8, '{"global_step": 8}'), (16, '{"global_step": 16}'), (24, '{"global'), (32, None)):
        (tmp_path / f"checkpoint-{number}").mkdir()
        if content is not None:
            (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(content)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-16"


def test_settings() -> None:
    assert read_settings(()) == {}
    texts = ["warmup_steps=5", "bf16=True", "optim=sgd", 'run_name="7"', "adam_epsilon=1e-6", "eval_steps=null"]
    assert read_settings(texts) == {
        "warmup_steps": 5, "bf16": True, "optim": "sgd", "run_name": "7", "adam_epsilon": 1e-6, "eval_steps": None
    }  # fmt: skip
    with pytest.raises(ValueError, match="expected NAME=VALUE for --set, got 'optim'"):
        read_settings(["optim"])
    with pytest.raises(ValueError, match=r"field of TrainingArguments, got 'warm_steps'; did you mean warmup_steps"):
        read_settings(["warm_steps=5"])
    with pytest.raises(ValueError, match="expected --set to name a field of TrainingArguments, got 'output_dir'"):
        read_settings(["output_dir=x"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--distill-logits", "1"], "expected --teacher with --distill-logits"),
        (["--teacher", "./no"], "expected a folder with a model, or its name on the Hub, got './no'"),
        (["--steps", "0"], "expected --steps to be an integer of at least 1, got 0"),
        (["--accumulate", "0"], "expected --accumulate to be an integer of at least 1, got 0"),
        (["--warmup", "-1"], "expected --warmup of at least 0, got -1.0"),
        (["--save-steps", "0"], "expected --save-steps to be an integer of at least 1, got 0"),
        (["--length", "65"], "expected --length of at most the model's 64 positions, got 65"),
    ],
)
def test_wrong_options(
    words: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert retrain(folder, tmp_path / "out", *words) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"structmat: {message}"
    assert not list(tmp_path.iterdir())
