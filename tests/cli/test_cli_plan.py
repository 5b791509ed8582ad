"""``structmat plan``: which layers the options pick, what they become, and how wrong options are explained."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from structmat import Blast, Dense, LowRank, Monarch, Plan, Rule
from structmat.cli import main, models
from structmat.cli.formats import format_class, read_blocks, read_rule
from structmat.cli.selection import PlanOptions, PlanOrFile, usual_layers
from training import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved Llama."""
    path = tmp_path_factory.mktemp("plan") / "dense"
    tiny.llama().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("make", "head", "count"),
    [(tiny.llama, "lm_head", 14), (tiny.bert, "classifier", 13), (tiny.vit, "classifier", 12)],
)
def test_the_usual_layers_are_all_but_the_head(make: Any, head: str, count: int) -> None:
    model = make()
    names = usual_layers(model)
    linears = {name for name, module in model.named_modules() if type(module).__name__ == "Linear"}
    assert linears - set(names) == {head}
    assert len(names) == count


def test_gpt2_has_conv1d_layers() -> None:
    config = tiny.transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    names = usual_layers(tiny.transformers.GPT2LMHeadModel(config))
    assert names == [f"transformer.h.0.{own}" for own in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


def test_rules_come_first_and_exclusions_stay_dense() -> None:
    options = PlanOptions(
        "low-rank",
        0.6,
        None,
        "2",
        (),
        (r".*layers\.0\.mlp.*",),
        (".*q_proj=blast:keep=0.4:blocks=4x2", ".*o_proj=dense"),
    )
    plan = options.plan_for(tiny.llama())
    assert len(plan) == 11
    assert plan["model.layers.0.self_attn.q_proj"] == Blast.for_budget(32, 32, keep=0.4, blocks=(4, 2))
    assert isinstance(plan["model.layers.1.self_attn.o_proj"], Dense)
    assert plan["model.layers.1.mlp.up_proj"] == LowRank.for_budget(64, 32, keep=0.6)
    assert not any(name.startswith("model.layers.0.mlp") for name in plan)


def test_layers_that_are_named() -> None:
    plan = PlanOptions(blocks="2", layers=(".*up_proj", ".*down_proj")).plan_for(tiny.llama())
    assert sorted(plan) == [f"model.layers.{k}.mlp.{own}" for k in (0, 1) for own in ("down_proj", "up_proj")]


def test_misfits_are_skipped_when_that_is_asked_for() -> None:
    options = PlanOptions(blocks="64", layers=(".*up_proj", ".*q_proj"))
    with pytest.raises(ValueError, match="expected a block count that divides the 32 rows, got 64"):
        options.plan_for(tiny.llama())
    plan = PlanOptions(blocks="64x2", keep=0.9, layers=options.layers, skip_misfits=True).plan_for(tiny.llama())
    assert sorted(plan.skipped) == [f"model.layers.{k}.self_attn.q_proj" for k in (0, 1)]
    assert sorted(plan) == [f"model.layers.{k}.mlp.up_proj" for k in (0, 1)]


def test_nothing_is_left() -> None:
    with pytest.raises(ValueError, match="expected dense linear layers to compress, found none that is not excluded"):
        PlanOptions(exclude=(".*",)).plan_for(tiny.llama())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (".*mlp.*=monarch", (".*mlp.*", Rule(Monarch))),
        ("a=b=low-rank:keep=0.3", ("a=b", Rule(LowRank, 0.3))),
        ("(?:x)=BLAST:blocks=8:keep=1", ("(?:x)", Rule(Blast, 1.0, 8))),
    ],
)
def test_rules_read(text: str, expected: tuple[str, Rule]) -> None:
    assert read_rule(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("blast", "expected --rule such as '.*', got 'blast'"),
        ("a=butterfly", "expected --rule to be one of 'dense', .*, got 'butterfly'"),
        (
            "a=blast:rank=3",
            "expected the option of blast in --rule blast:rank=3 to be one of 'keep', 'blocks', got 'rank'",
        ),
        ("a=blast:keep=half", "expected keep in --rule blast:keep=half to be a number, got 'half'"),
        ("a=blast:blocks=8by8", "expected blocks in --rule .* to be blocks such as 16, .*, got '8by8'"),
        ("a=low_rank:blocks=8", "expected the option of low_rank in .* to be one of 'keep', got 'blocks'"),
    ],
)
def test_rules_that_do_not_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rule(text)


def test_block_counts_and_formats() -> None:
    assert (read_blocks("16"), read_blocks("8x4")) == (16, (8, 4))
    assert format_class("Low-Rank", "--format") is LowRank
    with pytest.raises(
        ValueError, match="expected --blocks to be blocks such as 16, or 8x16 for rows x columns, got '8x'"
    ):
        read_blocks("8x")


def test_a_misspelt_folder_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder.with_name("dens"))]) == 1
    assert f"got {str(folder.with_name('dens'))!r}; did you mean {str(folder)!r}?" in capsys.readouterr().err


def test_the_plan_is_shown_and_written(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert (
        main(["plan", str(folder), "--blocks", "4", "--layers", ".*up_proj", "--layers", ".*q_proj", "-o", str(file)])
        == 0
    )
    captured = capsys.readouterr()
    lines = [re.sub(" +", " ", line).strip() for line in captured.out.splitlines()]
    assert lines[0] == "layer layers format parameters keep"
    assert "model.layers.{0-1}.mlp.up_proj 2 Blast(M=64, N=32, blocks=(4, 4), rank=9) 2,016 0.492" in lines
    assert lines[-2] == "planned 4 6,144 parameters dense 2,976 0.484"
    total = sum(parameter.numel() for parameter in tiny.llama().parameters())
    assert lines[-1] == f"whole model {total:,} parameters dense {total - 3168:,} {1 - 3168 / total:.3f}"
    said = captured.err.splitlines()
    assert re.fullmatch(r"compress without data takes about \d+ s", said[0])
    expected = r"compress with --calibrate, 512 rows of 64 tokens, takes about \d+ s, or \d+ s with --uniform"
    assert re.fullmatch(expected, said[1])
    assert said[2:] == [f"wrote {file}"]
    plan = Plan.from_json(file.read_text())
    assert len(plan) == 4
    assert PlanOrFile(plan=file).plan_for(tiny.llama()) == plan


@pytest.mark.parametrize("total", [0.9, 0.7])
def test_a_budget_for_the_whole_model(total: float) -> None:
    model = tiny.llama()
    plan = PlanOptions("low-rank", keep_total=total).plan_for(model)
    every = sum(parameter.numel() for parameter in model.parameters())
    saved = sum(format.M * format.N - format.num_parameters() for format in plan.values())
    assert total - 0.04 < 1 - saved / every <= total
    with pytest.raises(ValueError, match=r"expected --keep-total above 0\.\d+, the share of what is not compressed"):
        PlanOptions("low-rank", keep_total=0.1).plan_for(model)
    with pytest.raises(ValueError, match="expected no keep in --format or --rule with --keep-total"):
        PlanOptions("low-rank:keep=0.5", keep_total=total).plan_for(model)


def test_skipped_layers_are_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(folder), "--blocks", "64x2", "--keep", "0.9", "--layers", ".*up_proj", "--layers", ".*q_proj"]
    assert main([*words, "--skip-misfits"]) == 0
    assert "skipped: expected a block count that divides the 32 rows, got 64" in capsys.readouterr().out


def test_a_skeleton_has_no_weights_and_the_saved_structure(tmp_path: Path) -> None:
    structured = tiny.structured(tiny.llama())
    structured.save_pretrained(tmp_path)
    skeleton = models.skeleton(str(tmp_path))
    assert all(tensor.is_meta for tensor in skeleton.parameters())
    assert {name: tensor.shape for name, tensor in skeleton.state_dict().items()} == {
        name: tensor.shape for name, tensor in structured.state_dict().items()
    }


def write_config(folder: Path, **changes: Any) -> None:
    config = {**json.loads(tiny.llama().config.to_json_string()), "architectures": ["LlamaForCausalLM"], **changes}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["./nowhere"], "expected a folder with a model, or its name on the Hub, got './nowhere'"),
        (["one/two/three"], "expected a folder with a model, or its name on the Hub, got 'one/two/three'"),
        (["{empty}"], "expected a model in the folder '.*', but it has no config.json"),
        (["{folder}", "--keep", "2"], r"expected --keep to be in \(0, 1\], got 2.0"),
        (["{folder}", "--format", "butterfly"], "expected --format to be one of .*, got 'butterfly'"),
        (
            ["{folder}", "--blocks", "a"],
            "expected --blocks to be blocks such as 16, or 8x16 for rows x columns, got 'a'",
        ),
        (["{folder}", "--layers", "("], r"expected a regular expression for --layers, got '\(': .*"),
        (["{folder}", "--exclude", "["], r"expected a regular expression for --exclude, got '\[': .*"),
        (["{folder}", "--rule", "*=blast"], r"expected a regular expression for --rule, got '\*': .*"),
        (
            ["{folder}", "--layers", "nothing"],
            "expected --layers 'nothing' to pick a dense linear layer or convolution.*",
        ),
        (["{folder}", "--blocks", "5"], "layer 'model.layers.0.self_attn.q_proj' does not fit: .*"),
        (["{unnamed}"], "expected the configuration of '.*' to name a class of transformers .*, got 'Lama'"),
        (["{quantized}"], "expected a model with dense weights, got '.*', which is quantized; dequantize it"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: tmp_path / name for name in ("empty", "unnamed", "quantized")}
    for place in places.values():
        place.mkdir()
    write_config(places["unnamed"], architectures=["Lama"])
    write_config(places["quantized"], quantization_config={"quant_method": "gptq", "bits": 4})
    filled = [words[0].format(folder=folder, **places), *words[1:]]
    assert main(["plan", *filled]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(f"structmat: {message}\n", captured.err)


def test_no_plan_in_a_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a plan in '.*'; make one with structmat plan"):
        PlanOrFile(plan=tmp_path / "plan.json").plan_for(tiny.llama())


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = models.importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name)
    )
    assert main(["plan", "gpt2"]) == 1
    assert capsys.readouterr().err == (
        "structmat: this command needs transformers: pip install 'structmat[transformers]'\n"
    )
