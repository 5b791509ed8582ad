"""Options: sets of them as frozen classes, repeated options, words in any order, formats with options, and help."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from structmat import Blast, Plan
from structmat.cli import main
from structmat.cli.app import COMMANDS
from structmat.cli.calibration import CalibrationOptions, RefinementOptions
from structmat.cli.formats import read_format, read_value
from structmat.cli.models import DTYPES
from structmat.cli.options import Options, command_of, recorded
from structmat.cli.parser import loose_words
from structmat.cli.selection import PlanOptions, PlanOrFile
from structmat.cli.training import TeacherOptions, TrainingOptions
from structmat.formats import BlockSparse, GaudiGblr, Monarch, sized_formats
from training import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama."""
    path = tmp_path_factory.mktemp("options") / "dense"
    tiny.llama().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "order",
    [
        ("--layers", ".*up_proj", "MODEL", "--layers", ".*q_proj"),
        ("--layers", ".*up_proj", "--layers", ".*q_proj", "MODEL"),
        ("MODEL", "--layers=.*up_proj", "--layers", ".*q_proj"),
    ],
)
def test_the_model_stands_before_or_after_options(order: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    words = [str(folder) if word == "MODEL" else word for word in order]
    assert main(["plan", *words, "--blocks", "4", "-o", str(tmp_path / "plan.json")]) == 0
    plan = Plan.load(tmp_path / "plan.json")
    assert sorted({name.rpartition(".")[2] for name in plan}) == ["q_proj", "up_proj"]


def test_the_pattern_does_not_swallow_the_model(folder: Path, tmp_path: Path) -> None:
    assert main(["plan", "--layers", ".*up_proj", str(folder), "--blocks", "4", "-o", str(tmp_path / "plan.json")]) == 0
    assert len(Plan.load(tmp_path / "plan.json")) == 2


@pytest.mark.parametrize(
    ("words", "status", "hint"),
    [
        (["plan", "FOLDER", "--layers", "a.*", "b.*"], 2, "--layers b.*"),
        (["plan", "--layers", "a.*", "./b", "FOLDER"], 2, "--layers ./b FOLDER"),
        (["plan", "--layers", "a.*", "./b"], 1, "--layers ./b"),
        (["evaluate", "FOLDER", "--data", "x", "--tasks", "chess", "./go"], 1, "--tasks ./go"),
        (
            ["retrain", "FOLDER", "-o", "out", "--data", "x", "--set", "optim=sgd", "adam_beta1=0.8"],
            2,
            "adam_beta1=0.8",
        ),
    ],
)
def test_who_lists_values_behind_one_option_is_told_to_repeat_it(
    words: list[str], status: int, hint: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder) if word == "FOLDER" else word for word in words]) == status
    told = capsys.readouterr().err
    spelled = re.escape(hint.partition(" FOLDER")[0])
    assert re.search(f"; an option is repeated for each of its values: .*{spelled}", told)


def test_a_correct_command_line_gets_no_hint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--layers", ".*up_proj", str(folder), "--blocks", "5"]) == 1
    assert "repeated" not in capsys.readouterr().err


def test_loose_words() -> None:
    assert loose_words(["--a", "1", "2", "3", "--b", "4", "5", "--a=6", "7"], {"--a"}) == {
        "2": "--a 2", "3": "--a 3", "7": "--a 7",
    }  # fmt: skip
    assert loose_words(["x", "--a", "-", "--", "y"], {"--a"}) == {}


@dataclass(frozen=True)
class Sizes(Options):
    """Options for a test."""

    width: Annotated[int, typer.Option(help="The width.")]
    depths: Annotated[tuple[int, ...], typer.Option("--depth", help="A depth.")] = (1, 2)
    file: Annotated[Path | None, typer.Option(help="A file.")] = None


def test_a_class_of_options_is_the_signature_the_object_and_the_record() -> None:
    seen: list[Any] = []

    def run(
        name: Annotated[str, typer.Argument()], sizes: Sizes, words: Annotated[tuple[str, ...], typer.Option()] = ()
    ):
        seen.append((name, sizes, words))

    app = typer.Typer(add_completion=False)
    app.command()(command_of(run))
    command: Any = typer.main.get_command(app)
    command.main(["--width", "3", "x", "--depth", "4", "--words", "a", "--words", "b"], standalone_mode=False)
    command.main(["x", "--width", "3", "--debug"], standalone_mode=False)
    assert seen == [("x", Sizes(3, (4,)), ("a", "b")), ("x", Sizes(3, (1, 2)), ())]
    assert recorded(Sizes(3, file=Path("f")), Sizes(4)) == {"width": 4, "depths": [1, 2], "file": None}
    with pytest.raises(Exception, match="Missing parameter: width"):
        command.main(["x"], standalone_mode=False)


def test_records_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """What a run was started with is compared with what an earlier version wrote down."""
    assert recorded(PlanOrFile(), CalibrationOptions(), RefinementOptions()) == {
        "format": "blast", "keep": 0.5, "blocks": "16", "layers": [], "exclude": [], "rules": [], "skip_misfits": False,
        "calibrate": None, "data_files": None,
    }  # fmt: skip
    (tmp_path / "texts.txt").write_text("x")
    data = CalibrationOptions(str(tmp_path / "texts.txt[:3]")).record()
    assert len(data.pop("data_files")) == 16
    assert data == {
        "calibrate": str(tmp_path / "texts.txt[:3]"), "samples": None, "length": None, "batch_size": 8, "packed": False,
        "split": None,
    }  # fmt: skip
    assert RefinementOptions(True, 3).record() == {"refine": True, "refine_steps": 3, "refine_rate": 2e-3}
    (tmp_path / "plan.json").write_text("{}")
    assert PlanOrFile(plan=tmp_path / "plan.json").record() == {
        "plan": str(tmp_path / "plan.json"), "plan_content": "44136fa355b3678a"
    }  # fmt: skip
    assert recorded(TeacherOptions(), TrainingOptions(steps=3, settings=("optim=sgd",))) == {
        "teacher": None, "distill_logits": 0.0, "distill_hidden": 0.0, "task_weight": 1.0, "temperature": 1.0,
        "num_train_epochs": 1.0, "max_steps": 3, "learning_rate": 1e-4, "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8, "gradient_accumulation_steps": 1, "warmup_steps": 0.1, "weight_decay": 0.01,
        "lr_scheduler_type": "cosine", "seed": 0, "bf16": False, "save_steps": 500, "save_total_limit": 2,
        "logging_steps": 10, "report_to": "none", "optim": "sgd",
    }  # fmt: skip
    assert TrainingOptions().record()["max_steps"] == -1
    assert TeacherOptions("model").record()["distill_logits"] == 1.0


def test_formats_with_options(folder: Path, tmp_path: Path) -> None:
    assert read_format("monarch:permute_output=true:blocks=8x4", "--format").options == {"permute_output": True}
    assert read_format("block-sparse:rank=none", "--format").options == {"rank": None}
    rule = read_format("gaudi_gblr:components=12:keep=0.25", "--format")
    assert (rule.format, rule.keep, rule.options) == (GaudiGblr, 0.25, {"components": 12})
    file = tmp_path / "plan.json"
    words = ["--format", "monarch:permute_output=yes:keep=0.6", "--rule", ".*mlp.*=block_sparse:rank=2:blocks=4"]
    assert main(["plan", str(folder), *words, "--blocks", "2", "-o", str(file)]) == 0
    plan = Plan.load(file)
    assert plan["model.layers.0.self_attn.q_proj"] == Monarch.for_budget(
        32, 32, keep=0.6, blocks=2, permute_output=True
    )
    assert plan["model.layers.0.mlp.up_proj"] == BlockSparse.for_budget(64, 32, keep=0.5, blocks=4, rank=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("butterfly", "expected --format to be one of 'dense', .*, got 'butterfly'"),
        (
            "blast:rank=3",
            "expected the option of blast in --format blast:rank=3 to be one of 'keep', 'blocks', got 'rank'",
        ),
        ("blast:blocks", "expected --format NAME:OPTION=VALUE, got 'blocks' in 'blast:blocks'"),
        ("blast:keep=2", r"expected keep in --format blast:keep=2 to be in \(0, 1\], got 2.0"),
        ("monarch:permute_output=3", "expected permute_output in --format .* to be true or false, got '3'"),
        ("block_sparse:rank=many", "expected rank in --format .* to be an integer or none, got 'many'"),
        ("block_sparse:blocks=4by4", "expected blocks in --format .* to be blocks such as 16, or 8x16 .*, got '4by4'"),
    ],
)
def test_formats_that_do_not_read(text: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--format", text]) == 1
    assert re.fullmatch(f"structmat: {message}\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("3", int, 3),
        ("0.5", float, 0.5),
        ("3", float, 3.0),
        ("No", bool, False),
        ("2x3x4", tuple[int, ...], (2, 3, 4)),
        ("None", int | None, None),
        ("4", int | None, 4),
        ("fast", str, "fast"),
        ("4", Any, 4),
        ("8x16", Any, (8, 16)),
        ("true", Any, True),
        ("fast", Any, "fast"),
    ],
)
def test_values_of_options_read_as_their_annotation_says(text: str, hint: Any, value: Any) -> None:
    assert read_value(text, hint, "it") == value
    assert type(read_value(text, hint, "it")) is type(value)


def test_rules_are_for_layers_beside_the_format() -> None:
    options = PlanOptions("low_rank:keep=0.4", rules=(".*up_proj=blast:blocks=2",))
    plan = options.plan_for(tiny.llama())
    assert plan["model.layers.0.mlp.up_proj"] == Blast.for_budget(64, 32, keep=0.5, blocks=2)
    assert {format.name for format in plan.values()} == {"low_rank", "blast"}


@pytest.mark.parametrize("command", ["plan", "compress", "bench", "demo"])
def test_help_lists_what_the_registries_have(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    shown = re.sub(r"[\s│]+", "", capsys.readouterr().out)
    assert ",".join(sized_formats()) in shown
    assert ("gaudi_gblr:components" in shown) == (command != "demo")
    if command in ("compress", "bench"):
        assert ",".join(DTYPES[1:]) in shown


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_the_option_debug(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "--debug" in capsys.readouterr().out


FRESH = """
import json, sys
from structmat.cli import main
status = main({words!r})
heavy = ["torch", "transformers", "numpy", "structmat.formats", "structmat.cli.plan"]
print(json.dumps([status, [name for name in heavy if name in sys.modules]]))
"""


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), ([], 2), (["--version"], 0), (["fly"], 2)])
def test_the_list_of_commands_comes_without_torch(words: list[str], status: int) -> None:
    code = FRESH.format(words=words)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [status, []]
    assert "plan" in done.stdout or status == 2 or words == ["--version"]


def test_help_without_transformers() -> None:
    hidden = dict.fromkeys(("transformers", "torchvision", "accelerate", "datasets"))
    code = f"import sys\nsys.modules.update({hidden!r})\n"
    for words in (["--help"], ["plan", "--help"], ["bench", "--help"], ["retrain", "--help"]):
        run = code + FRESH.format(words=words)
        done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, timeout=120, check=True)
        assert json.loads(done.stdout.splitlines()[-1])[0] == 0
