"""``structmat report``, ``generate``, ``densify``, ``import-blast`` and ``evaluate``."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from structmat import densify_, load_pretrained, plan_of
from structmat.cli import main, models
from structmat.cli.evaluate import check_classes
from structmat.cli.evaluate import difference as differ
from structmat.evaluate import perplexity, relative_flops
from training import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama under ``dense`` and compressed under ``small``, and texts."""
    path = tmp_path_factory.mktemp("tools")
    tiny.llama().save_pretrained(path / "dense")
    tiny.structured(tiny.llama()).save_pretrained(path / "small")
    for name in ("dense", "small"):
        tiny.tokenizer().save_pretrained(path / name)
    (path / "texts.txt").write_text("<|endoftext|>".join(tiny.sentences(12)), encoding="utf-8")
    return path


def shown(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of standard output with single spaces."""
    return [re.sub(" +", " ", line).strip() for line in capsys.readouterr().out.splitlines()]


def test_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compress", str(folder / "dense"), "-o", str(tmp_path / "out"), "--format", "low_rank"]
    assert main([*words, "--layers", ".*q_proj"]) == 0
    error = json.loads((tmp_path / "out/structmat.json").read_text())["layers"]["model.layers.0.self_attn.q_proj"]
    capsys.readouterr()
    assert main(["report", str(tmp_path / "out")]) == 0
    lines = shown(capsys)
    assert lines[0] == "layer format settings shape parameters keep mult. per token output error weight error"
    assert lines[2] == f"model.layers.0.self_attn.q_proj low_rank rank 8 32 x 32 512 0.500 512 {error['error']:.4f}"
    assert lines[3] == "model.layers.0.self_attn.k_proj dense 32 x 32 1,024 1.000 1,024"
    assert lines[-1].startswith("whole model ")


def test_report_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder / "small"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = load_pretrained(folder / "small")
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert {row["name"] for row in found["rows"] if row["format"] != "dense"} == set(plan_of(model))


def test_report_names_what_it_cannot_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    tiny.transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert "not in any row: model.layers.0.mlp.experts.gate_up_proj" in capsys.readouterr().err


def test_generate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for words in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--temperature", "0"]):
        assert main(["generate", str(folder / "small"), "w5 w12", "--tokens", "8", *words]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("w5 w12") for text in texts)
    model, ids = load_pretrained(folder / "small"), torch.tensor([[1, 5, 12]])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)[0]
    assert texts[3].strip() == tiny.tokenizer().decode(expected, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "0"], "expected --tokens to be an integer of at least 1, got 0"),
        (["--temperature", "-1"], "expected --temperature of at least 0, got -1.0"),
    ],
)
def test_wrong_options_of_generate(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder / "small"), "w5", *words]) == 1
    assert capsys.readouterr().err == f"structmat: {message}\n"


def test_an_answer_in_a_chat(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.llama().save_pretrained(tmp_path)
    template = "{% for m in messages %}{{ bos_token }}w9 {{ m.content }} {% endfor %}"
    tiny.tokenizer(chat_template=template + "{% if add_generation_prompt %}w8{% endif %}").save_pretrained(tmp_path)
    words = ["w5 w12", "--chat", "--tokens", "6", "--temperature", "0"]
    assert main(["generate", str(tmp_path), *words]) == 0
    ids = torch.tensor([[1, 9, 5, 12, 8]])
    model = load_pretrained(tmp_path)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)[0, 5:]
    assert capsys.readouterr().out.split() == [f"w{i}" for i in expected.tolist() if i > 2]  # the answer alone
    assert main(["generate", str(folder / "dense"), *words]) == 1
    assert "expected a model with a chat template for --chat, got" in capsys.readouterr().err


def test_only_language_models_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.bert().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "w5"]) == 1
    assert "expected a language model that generates, got a BertForSequenceClassification" in capsys.readouterr().err


def test_densify(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["densify", str(folder / "small"), "-o", str(tmp_path / "out")]) == 0
    assert "14 layers were structured and are dense now" in capsys.readouterr().err
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    loaded = tiny.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = densify_(load_pretrained(folder / "small")).state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in expected.items())
    assert main(["densify", str(folder / "small"), "-o", str(tmp_path / "out")]) == 0
    assert "is finished, with the same options" in capsys.readouterr().err
    assert main(["densify", str(folder / "dense"), "-o", str(tmp_path / "out")]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_import_blast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.llama()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    name = "model.layers.0.mlp.up_proj"
    del tensors[f"{name}.weight"]
    generator = torch.Generator().manual_seed(0)
    shapes = {"B": (4, 16, 5), "C": (2, 5, 16), "D": (4, 2, 5)}
    factors = {own: torch.randn(shape, generator=generator) for own, shape in shapes.items()}
    tensors |= {f"{name}.{own}": factor for own, factor in factors.items()}
    source = tmp_path / "authors"
    source.mkdir()
    (source / "config.json").write_text(model.config.to_json_string())
    save_file(tensors, source / "model.safetensors")
    words = ["import-blast", str(source), "-o", str(tmp_path / "out")]
    assert main(words) == 0
    loaded: Any = load_pretrained(tmp_path / "out")
    dense = torch.einsum("ipr,ijr,jrq->ipjq", factors["B"], factors["D"], factors["C"]).reshape(64, 32)
    torch.testing.assert_close(loaded.get_submodule(name).to_dense(), dense, rtol=1e-5, atol=1e-5)
    assert main(words) == 0
    assert "is finished" in capsys.readouterr().err
    assert main(["import-blast", str(tmp_path / "nothing"), "-o", str(tmp_path / "other")]) == 1
    assert "expected the config.json of a Llama" in capsys.readouterr().err
    assert not (tmp_path / "other.partial").exists()


def test_evaluate_language_models(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, small, dense = tmp_path / "found.json", str(folder / "small"), str(folder / "dense")
    words = ["evaluate", small, "--dense", dense, "--data", str(folder / "texts.txt"), "--length", "8", "--stride", "3"]
    assert main([*words, "--json", str(file)]) == 0
    lines = shown(capsys)
    assert lines[0] == f"figure {dense} {small} difference"
    names = ["parameters", "relative parameters", "relative flops", "token perplexity", "word perplexity"]
    assert [" ".join(line.split()[: len(name.split())]) for line, name in zip(lines[2:7], names, strict=True)] == names
    found = json.loads(file.read_text())
    assert found["options"]["stride"] == 3
    model = load_pretrained(folder / "small")
    score = perplexity(model, tiny.tokenizer(), tiny.sentences(12), length=8, stride=3, progress=False)
    figures = found["models"][small]
    assert figures["token_perplexity"] == pytest.approx(score.token, rel=1e-5)
    assert figures["word_perplexity"] == pytest.approx(score.word, rel=1e-5)
    example = {"input_ids": torch.zeros(1, 8, dtype=torch.long)}
    assert figures["relative_flops"] == pytest.approx(relative_flops(model, example).relative)
    assert figures["relative_parameters"] < 1
    reference = found["models"][dense]
    assert (reference["relative_flops"], reference["relative_parameters"]) == (1, 1)
    assert reference["parameters"] == sum(parameter.numel() for parameter in tiny.llama().parameters())


def test_the_models_side_by_side(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(folder / "small"), "--dense", str(folder / "dense"), "--data", str(folder / "texts.txt")]
    assert main([*words, "--max-tokens", "50"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("(50 tokens, ") == 2  # of each model, with how it was measured
    cells = {line.split("  ")[0]: re.split("  +", line)[1:] for line in captured.out.splitlines()[2:]}
    dense, small, difference = cells["parameters"]
    assert difference == f"{int(small.replace(',', '')) - int(dense.replace(',', '')):+,} " + difference.split()[1]
    dense, small, difference = cells["token perplexity"]
    assert float(difference.split()[0]) == pytest.approx(float(small) - float(dense), abs=2e-4)
    assert difference.split()[1] == f"({float(small) / float(dense) - 1:+.1%})"


def test_figures_that_a_model_does_not_have() -> None:
    assert (differ(math.nan, 1.0), differ(1.0, math.nan), differ(3.0, 0.0)) == ("", "", "+3.0000")


def test_evaluate_texts_with_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    tiny.bert().save_pretrained(tmp_path / "bert")
    tiny.tokenizer().save_pretrained(tmp_path / "bert")
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(f"w{k} w9,{k % 2}\n" for k in range(3, 13)))
    file = tmp_path / "found.json"
    words = ["evaluate", str(tmp_path / "bert"), "--data", str(tmp_path / "data.csv"), "--json", str(file)]
    assert main([*words, "--batch-size", "4"]) == 0
    figures = json.loads(file.read_text())["models"][str(tmp_path / "bert")]
    ids = torch.tensor([[k, 9] for k in range(3, 13)])
    right = tiny.bert().eval()(ids).logits.argmax(-1) == torch.arange(3, 13) % 2
    assert figures["accuracy"] == pytest.approx(right.float().mean().item())
    assert figures["relative_flops"] == 1
    (tmp_path / "data.csv").write_text("text,label\nw5,0\nw6,2\n")
    assert main(words) == 1
    assert "structmat: expected classes below the model's 2, got 2" in capsys.readouterr().err
    assert main([*words, "--tasks", "arc_easy"]) == 1


def test_tasks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("structmat.integrations.lm_eval")
    seen: dict[str, Any] = {}

    def tasks(model: Any, tokenizer: Any, names: Any, **options: Any) -> dict[str, dict[str, Any]]:
        seen.update(options, names=names)
        return {"chess": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "chess", "samples": 3}}

    monkeypatch.setattr(module, "lm_eval_tasks", tasks)
    file = tmp_path / "found.json"
    words = [
        "evaluate",
        str(folder / "small"),
        "--tasks",
        "chess",
        "--tasks",
        "go",
        "--limit",
        "5",
        "--json",
        str(file),
    ]
    assert main([*words, "--task-path", str(tmp_path)]) == 0
    figures = json.loads(file.read_text())["models"][str(folder / "small")]
    assert figures["chess acc"] == 0.5
    assert set(figures) == {"parameters", "relative_parameters", "relative_flops", "chess acc"}
    assert seen == {"names": ("chess", "go"), "include_path": tmp_path, "limit": 5, "batch_size": 8, "length": 64}


def test_tasks_without_lm_eval(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "structmat.integrations.lm_eval", None)
    assert main(["evaluate", str(folder / "small"), "--tasks", "chess"]) == 1
    assert "structmat: --tasks needs lm-eval: pip install 'structmat[evaluate]'" in capsys.readouterr().err


def test_tasks_need_a_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.bert().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    assert main(["evaluate", str(tmp_path), "--tasks", "chess"]) == 1
    assert "expected a causal language model for --tasks, got a BertForSeq" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected something to measure on, got neither --data nor --tasks"),
        (["--data", "x", "--batch-size", "0"], "expected --batch-size to be an integer of at least 1, got 0"),
        (["--data", "x", "--dense", "./no"], "expected a folder with a model, or its name on the Hub, got './no'"),
    ],
)
def test_wrong_options_of_evaluate(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(folder / "small"), *words]) == 1
    assert capsys.readouterr().err == f"structmat: {message}\n"


def test_classes_must_be_those_of_the_model() -> None:
    config = tiny.vit().config
    config.label2id = {"cat": 0, "dog": 1, "eel": 2}
    check_classes(config, [0, 1], ("cat", "dog"))
    check_classes(config, [0, 1], ("ant", "bee"))
    with pytest.raises(ValueError, match="in the order of the model's label2id, but 'eel' is 1 in the data and 2 in"):
        check_classes(config, [0, 1], ("cat", "eel"))


def test_a_model_without_a_processor(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"to have a tokenizer .* or an image processor .*, found none; save"):
        models.processor_of(str(tmp_path))
