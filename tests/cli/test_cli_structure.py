"""The way of a learned structure through the command line: compress, retrain, report, harden."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import image

from structmat import GaudiGblr, Gblr, apply_plan_, load_pretrained, make_plan, plan_of, report
from structmat.cli import main
from structmat.cli.report import drawn, read_history, with_factors
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


@pytest.mark.filterwarnings("ignore:the layers with a budget of 0.4 are at")  # so few steps do run into a cliff
def test_the_whole_way(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = str(folder / "texts.txt")
    assert compress(folder, tmp_path / "learning", "--keep", "0.8", "--calibrate", texts, "--learn") == 0
    learning = load_pretrained(tmp_path / "learning")
    assert {type(format) for format in plan_of(learning).values()} == {GaudiGblr}
    words = ["retrain", str(tmp_path / "learning"), "-o", str(tmp_path / "learned"), "--data", texts, "--steps", "4"]
    for setting in ("structure_target=0.4", "structure_learning_rate=0.01", "structure_shrinkage=0.5"):
        words += ["--set", setting]
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
    capsys.readouterr()
    assert main(["report", str(tmp_path / "learned"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == as_data(learned)["rows"]


def as_data(model: Any) -> dict[str, Any]:
    return report(model).to_dict()


def spread_widths(model: Any) -> Any:
    """Another share for every Gaudi-GBLR layer than a fresh one has."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(getattr(module, "format", None), GaudiGblr):
            module.width.data.mul_(torch.rand((), generator=generator))
    return model


def learning_vit() -> Any:
    model = tiny.vit()
    plan = make_plan(model, {r".*(query|key|value|q_proj|k_proj|v_proj)": GaudiGblr}, keep=0.8)
    return apply_plan_(model, plan, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [tiny.learning_llama, learning_vit], ids=["llama", "vit"])
def test_report_counts_the_widths_as_they_are(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second's tensors have other names in the file than in the model."""
    model = spread_widths(make())
    model.save_pretrained(tmp_path)
    assert main(["report", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == as_data(model)
    shares = {row["parameters"] / row["dense_parameters"] for row in found["rows"] if row["format"] == "gaudi_gblr"}
    assert max(shares) < 0.89
    assert len(shares) > 3
    assert found["dense_parameters"] == report(tiny.llama() if make is tiny.learning_llama else tiny.vit()).parameters


def test_report_reads_the_segments_alone(tmp_path: Path) -> None:
    model = spread_widths(tiny.learning_llama())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    filled = with_factors(str(tmp_path), drawn)
    values = {name: tensor for name, tensor in filled.state_dict().items() if not tensor.is_meta}
    assert {name.rpartition(".")[2] for name in values} == {"location", "width", "sigma"}
    assert len(values) == 3 * 14
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in values.items())


@pytest.mark.parametrize("hardened", [False, True])
def test_report_draws_the_structure_and_the_budget(
    hardened: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"structure_target": 0.85, "structure_shrinkage": 4.0, "structure_learning_rate": 1e-2}
    arguments = tiny.arguments(tmp_path / "run", save_steps=2, save_strategy="steps", **options)
    run = tiny.trainer("causal-lm", arguments, model=tiny.learning_llama())
    run.train()
    source = tmp_path / "run/checkpoint-4"
    assert [entry["step"] for entry in read_history(tmp_path / "run")] == [1, 2, 3, 4]
    assert [entry["step"] for entry in read_history(tmp_path / "run/checkpoint-2")] == [1, 2]
    if hardened:
        tiny.tokenizer().save_pretrained(source)
        assert main(["harden", str(source), "-o", str(tmp_path / "small")]) == 0
        source = tmp_path / "small"
    capsys.readouterr()
    assert main(["report", str(source), "--plot", str(tmp_path / "pictures")]) == 0
    output = capsys.readouterr()
    assert "model.layers.0.mlp.up_proj" in output.out
    names = ["structure.png"] if hardened else ["budget.png", "structure.png"]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == names
    assert [line for line in output.err.splitlines() if line.startswith("wrote ")] == [
        f"wrote {tmp_path / 'pictures' / name}" for name in reversed(names)
    ]
    for name in names:
        assert image.imread(tmp_path / "pictures" / name).std() > 0.1


def test_report_on_what_other_commands_made(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their records have no errors of fits."""
    assert compress(folder, tmp_path / "small", "--keep", "0.6") == 0
    assert main(["densify", str(tmp_path / "small"), "-o", str(tmp_path / "plain")]) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path / "plain"), "--json"]) == 0
    assert {row["format"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"dense"}
    assert main(["report", str(tmp_path / "small"), "--json"]) == 0
    assert sum(row["error"] is not None for row in json.loads(capsys.readouterr().out)["rows"]) == 14


def test_report_draws_couplings(tmp_path: Path) -> None:
    model = tiny.structured(tiny.llama())
    model.save_pretrained(tmp_path / "small")
    assert main(["report", str(tmp_path / "small"), "--plot", str(tmp_path / "pictures")]) == 0
    blast = {name for name, format in plan_of(model).items() if format.name == "blast"}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {f"couplings-{name}.png" for name in blast}


def test_report_says_what_it_cannot_draw(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder / "dense"), "--plot", str(tmp_path / "pictures")]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"structmat: expected GBLR, Gaudi-GBLR or BLAST layers to draw, got none in '.*dense'\n", error)
    assert not (tmp_path / "pictures").exists()
    tiny.learning_llama().save_pretrained(tmp_path / "fresh")
    assert main(["report", str(tmp_path / "fresh"), "--plot", str(tmp_path / "pictures")]) == 0
    assert "no budget.png: there is no trainer_state.json" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["structure.png"]


def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compress(folder, tmp_path / "a", "--stream") == 1
    assert "expected no gaudi_gblr with --stream" in capsys.readouterr().err
    assert main(["compress", str(folder / "dense"), "-o", str(tmp_path / "a"), "--blocks", "2", "--learn"]) == 1
    assert (
        "expected a layer of a format that learns with --learn, got none; pass --format gaudi_gblr"
        in capsys.readouterr().err
    )
    assert main(["harden", str(folder / "dense"), "-o", str(tmp_path / "a")]) == 1
    assert "expected a network with GaudiGblr layers, got none" in capsys.readouterr().err
    assert main(["compress", str(folder / "dense"), "-o", str(tmp_path / "a"), "--format", "gblr"]) == 1
    assert "gaudi_gblr" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_report_writes_a_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = str(folder / "texts.txt")
    assert main(["compress", str(folder / "dense"), "-o", str(tmp_path / "small"), "--format", "blast", "--blocks", "4",
                 "--keep", "0.5", "--uniform", "--calibrate", texts]) == 0  # fmt: skip
    record = json.loads((tmp_path / "small/structmat.json").read_text())
    entry = {"model": "small", "step": "decode", "tokens": 1, "speedup": 1.25, "tokens_per_second": 400.0}
    bench = {"hardware": {"processor": "a CPU", "threads": "2"}, "models": [{**entry, "seconds": {"median": 0.0025}}]}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    words = ["report", str(tmp_path / "small"), "--html", str(tmp_path / "out/report.html")]
    assert main([*words, "--bench", str(tmp_path / "bench.json")]) == 0
    assert f"wrote {tmp_path / 'out/report.html'}" in capsys.readouterr().err
    text = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    for name, facts in record["layers"].items():
        assert f"{name}: error of the output {facts['output_error']:.3f}" in text
    assert f'<div class="big">{record["measured_after"]:.4g}</div>' in text
    assert "were measured on a CPU with 2 threads" in text
    assert '<td class="right">2.5 ms</td><td class="right">400.0</td><td class="right">1.25x</td>' in text
    assert "<dt>calibrate</dt>" in text
    assert "data:image/png;base64," in text


def test_times_need_a_page_and_models(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bench.json").write_text(json.dumps({"hardware": {}, "layers": []}))
    words = ["report", str(folder / "dense"), "--bench", str(tmp_path / "bench.json")]
    assert main(words) == 1
    assert "expected --html with --bench: the page alone shows the times" in capsys.readouterr().err
    assert main([*words, "--html", str(tmp_path / "report.html")]) == 1
    assert "expected times of models, got those of layers; run: structmat bench MODEL" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
