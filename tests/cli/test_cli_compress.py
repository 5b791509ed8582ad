"""``structmat compress`` in one process: what it writes, what it refuses, and the folder that appears when complete."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import structmat
from structmat import Blast, LowRank, Refinement, allocate, compress_, load_pretrained, plan_of
from structmat.cli import compress as command
from structmat.cli import main, models
from structmat.cli.calibration import CalibrationOptions, read_calibration
from structmat.cli.fingerprints import fingerprint
from structmat.cli.output import Output, differences
from structmat.cli.reading import length_for
from structmat.cli.selection import PlanOptions
from structmat.data import token_rows
from structmat.data.sources import Source
from structmat.data.tokens import row_batches
from structmat.evaluate.language import row_loss
from training import tiny

QUICK = ("--blocks", "2", "--keep", "0.6", "--layers", ".*q_proj", "--layers", ".*up_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with its tokenizer under ``dense``, and texts."""
    path = tmp_path_factory.mktemp("compress")
    tiny.llama().save_pretrained(path / "dense")
    tiny.tokenizer().save_pretrained(path / "dense")
    (path / "texts.txt").write_text("<|endoftext|>".join(tiny.sentences(24)), encoding="utf-8")
    return path


def compress(folder: Path, out: Path, *words: str) -> int:
    return main(["compress", str(folder / "dense"), "-o", str(out), *QUICK, *words])


def test_the_result_is_that_of_the_library(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--calibrate", str(folder / "texts.txt"), "--samples", "12", "--length", "10", "--batch-size", "4"]
    words += ["--uniform"]
    assert compress(folder, tmp_path / "out", *words, "--refine", "--refine-steps", "3", "--refine-rate", "1e-2") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(r"calibrating on 12 of 12 rows, \d+ of at most 120 tokens; 1 more are held out", captured.err)

    model = load_pretrained(folder / "dense")
    plan = PlanOptions(blocks="2", keep=0.6, layers=(".*q_proj", ".*up_proj")).plan_for(model)
    rows = sorted(token_rows(tiny.tokenizer(), tiny.sentences(24), length=10, most=12), key=len)
    batches = row_batches(tiny.tokenizer(), rows, 1)  # a step sees those of four rows
    fits = compress_(model, plan, batches=batches, refine=Refinement(3, 1e-2, batches=4), progress=False)
    loaded = load_pretrained(tmp_path / "out")
    assert plan_of(loaded) == plan_of(model)
    lines = captured.err.splitlines()
    assert any(re.match(r"perplexity on what is held out, before: \d", line) for line in lines)
    assert any(re.match(r"perplexity on what is held out: .* before, .* after \([+-]", line) for line in lines)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())

    record = json.loads((tmp_path / "out/structmat.json").read_text())
    assert record["command"] == "compress"
    assert record["options"]["samples"] == 12
    assert record["versions"]["structmat"] == structmat.__version__
    assert {name: facts["error"] for name, facts in record["layers"].items()} == {
        name: pytest.approx(fit.error) for name, fit in fits.items()
    }
    held_out = row_batches(tiny.tokenizer(), token_rows(tiny.tokenizer(), tiny.sentences(24), length=10)[12:13], 4)
    for name, measured in (("measured_before", tiny.llama()), ("measured_after", loaded)):
        loss, tokens = row_loss(measured, held_out)
        assert record[name] == pytest.approx(math.exp(loss / tokens), rel=1e-4)
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert record["dense_parameters"] == sum(parameter.numel() for parameter in tiny.llama().parameters())
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    tokenizer = tiny.transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w5 w7")["input_ids"] == [5, 7]


def test_with_data_layers_share_the_budget(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--calibrate", str(folder / "texts.txt"), "--samples", "12", "--length", "10", "--batch-size", "4"]
    assert compress(folder, tmp_path / "out", *words) == 0
    assert "layers share the budget by their effect on the output" in capsys.readouterr().err
    found = plan_of(load_pretrained(tmp_path / "out"))

    model = load_pretrained(folder / "dense")
    uniform = PlanOptions(blocks="2", keep=0.6, layers=(".*q_proj", ".*up_proj")).plan_for(model)
    rows = sorted(token_rows(tiny.tokenizer(), tiny.sentences(24), length=10, most=12), key=len)
    batches = row_batches(tiny.tokenizer(), rows, 4)
    costs = [sum(f.num_parameters() for f in uniform.values()), sum(f.M * f.N for f in uniform.values())]
    plan = allocate(
        model, batches, keep=costs[0] / costs[1], blocks=2, layers=[re.escape(name) for name in uniform], progress=False
    )
    compress_(model, plan, batches=batches, two_sided=True, progress=False)
    assert found == plan_of(model)
    state = load_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    record = json.loads((tmp_path / "out/structmat.json").read_text())
    assert record["keep"] <= costs[0] / costs[1]


@pytest.mark.parametrize("words", [["--uniform"], ["--uniform", "--two-sided"], ["--one-sided"]])
def test_what_errors_are_weighed_by_is_chosen(words: list[str], folder: Path, tmp_path: Path) -> None:
    data = ["--calibrate", str(folder / "texts.txt"), "--samples", "12", "--length", "10", "--batch-size", "4"]
    assert compress(folder, tmp_path / "out", *data, *words) == 0
    state = load_pretrained(tmp_path / "out").state_dict()
    model = load_pretrained(folder / "dense")
    rows = sorted(token_rows(tiny.tokenizer(), tiny.sentences(24), length=10, most=12), key=len)
    batches = row_batches(tiny.tokenizer(), rows, 4)
    compress_(model, plan_of(load_pretrained(tmp_path / "out")), batches=batches, two_sided="--two-sided" in words)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("data", [False, True])
def test_weights_can_be_stored_in_integers(
    data: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--calibrate", str(folder / "texts.txt"), "--samples", "12", "--length", "10"] if data else []
    for name, words in (("float", []), ("integers", ["--quantize", "int8"])):
        assert compress(folder, tmp_path / name, *given, "--uniform", *words) == 0
    assert re.search(r"weights are in int8, which changed their matrices by \d\.\de-0\d", capsys.readouterr().err)
    assert main(["quantize", str(tmp_path / "float"), "-o", str(tmp_path / "afterwards"), *given]) == 0
    state, expected = (load_pretrained(tmp_path / name).state_dict() for name in ("integers", "afterwards"))
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    record, plain = (json.loads((tmp_path / n / "structmat.json").read_text()) for n in ("integers", "float"))
    assert record["integers"] == "int8"
    assert set(record["rounding_errors"]) > set(record["layers"])
    errors = [{name: layer["error"] for name, layer in one["layers"].items()} for one in (record, plain)]
    assert errors[0] == errors[1]
    assert record["parameters"] == plain["parameters"]
    assert (record.get("measured_after") == plain.get("measured_after")) is not data


def test_a_budget_below_every_size_is_the_same_for_all(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--calibrate", str(folder / "texts.txt"), "--samples", "8", "--length", "10", "--keep", "0.15"]
    assert compress(folder, tmp_path / "out", *words) == 0
    assert re.search(r"every layer keeps the same share: a budget of 0\.1\d+ leaves no choice", capsys.readouterr().err)


def test_streaming_gives_the_same(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--calibrate", str(folder / "texts.txt"), "--samples", "12", "--length", "10", "--batch-size", "4"]
    assert compress(folder, tmp_path / "one", *words, "--one-sided") == 0
    assert compress(folder, tmp_path / "two", *words, "--stream") == 0
    assert capsys.readouterr().err.count("layers share the budget by their effect on the output") == 2
    one, two = load_pretrained(tmp_path / "one"), load_pretrained(tmp_path / "two")
    assert all(torch.equal(two.state_dict()[name], tensor) for name, tensor in one.state_dict().items())
    records = [json.loads((tmp_path / name / "structmat.json").read_text()) for name in ("one", "two")]
    for key in ("parameters", "dense_parameters", "error", "keep"):
        assert records[0][key] == records[1][key]
    assert (tmp_path / "two" / "tokenizer.json").exists()
    capsys.readouterr()
    assert compress(folder, tmp_path / "three", "--stream", "--dtype", "bfloat16") == 1
    assert "expected neither --dtype nor --device with --stream" in capsys.readouterr().err


def test_a_plan_from_a_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", str(folder / "dense"), "--format", "low-rank", "--exclude", ".*mlp.*", "-o", str(file)]) == 0
    assert main(["compress", str(folder / "dense"), "-o", str(tmp_path / "out"), "--plan", str(file)]) == 0
    found = plan_of(load_pretrained(tmp_path / "out"))
    assert len(found) == 8
    assert all(isinstance(format, LowRank) for format in found.values())


def test_the_published_algorithm(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = structmat.fit.Lee2024Blast.published
    monkeypatch.setattr(structmat.fit.Lee2024Blast, "published", staticmethod(lambda: published(sweeps=2)))
    assert compress(folder, tmp_path / "out", "--method", "published") == 0
    record = json.loads((tmp_path / "out/structmat.json").read_text())
    assert record["options"]["method"] == "published"
    assert command.published(LowRank(4, 4, 1)) == structmat.default_method(LowRank(4, 4, 1))
    method = command.published(Blast(4, 4, (2, 2), 1))
    assert method == published(sweeps=2)


def test_dtype_and_skipped_layers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compress", str(folder / "dense"), "-o", str(tmp_path / "out"), "--format", "low_rank", "--keep", "0.02"]
    words += ["--rule", ".*q_proj=low_rank:keep=0.5", "--skip-misfits", "--dtype", "bfloat16", "--device", "cpu"]
    assert main(words) == 0
    assert "stays dense: model.layers.{0-1}.mlp.up_proj: " in capsys.readouterr().err
    loaded = load_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16
    assert len(plan_of(loaded)) == 2
    assert len(json.loads((tmp_path / "out/structmat.json").read_text())["skipped"]) == 12


def test_a_finished_result_is_left_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert compress(folder, out) == 0
    before = (out / "structmat.json").read_bytes()
    (tmp_path / "out.partial").mkdir()  # of a process that was killed at its very end
    capsys.readouterr()
    assert compress(folder, out) == 0
    assert capsys.readouterr().err == f"{out} is finished, with the same options; nothing to do\n"
    assert not (tmp_path / "out.partial").exists()
    assert compress(folder, out, "--method", "published") == 1
    assert capsys.readouterr().err == (
        f"structmat: expected a new folder for --out, but {str(out)!r} was made with other options "
        "(method: 'default', now 'published'); choose another, or pass --overwrite\n"
    )
    assert (out / "structmat.json").read_bytes() == before
    assert compress(folder, out, "--dtype", "float16", "--overwrite") == 0
    assert load_pretrained(out).dtype == torch.float16
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_what_structmat_did_not_make_is_never_overwritten(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert compress(folder, tmp_path, "--overwrite") == 1
    assert "expected a result of structmat to overwrite, got" in capsys.readouterr().err
    assert compress(folder, tmp_path) == 1
    assert re.search("expected a new folder for --out, but '.*' is there; choose another", capsys.readouterr().err)
    assert (tmp_path / "thesis.tex").exists()
    assert not tmp_path.with_name(f"{tmp_path.name}.partial").exists()


def test_an_error_leaves_nothing_behind(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compress(folder, tmp_path / "out", "--calibrate", str(tmp_path / "nothing.txt")) == 1
    assert "'" + str(tmp_path / "nothing.txt") + "'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_goes_on_with_other_options(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("structmat.cli.results.results", interrupted)
        assert compress(folder, out) == 130
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"{out}.partial keeps what is done; run the same command again to go on",
        "structmat: interrupted",
    ]
    fits = sorted((tmp_path / "out.partial/fits").iterdir())
    assert len(fits) == 4
    times = [path.stat().st_mtime_ns for path in fits]
    with monkeypatch.context() as patch:
        patch.setattr("structmat.cli.results.results", interrupted)
        assert compress(folder, out, "--exclude", ".*0.self_attn.q_proj") == 130
    err = capsys.readouterr().err
    assert f"going on with the interrupted run in {out}.partial, with other options (exclude: [], now [" in err
    assert [path.stat().st_mtime_ns for path in fits] == times  # taken from there
    assert main(["densify", str(folder / "dense"), "-o", str(out)]) == 0
    assert "with other options (the command was compress)" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_two_at_once(tmp_path: Path) -> None:
    with Output(tmp_path / "out", "compress", {}) as first:
        with pytest.raises(BlockingIOError, match=r"expected to be alone at '.*out', but another process is writing"):
            Output(tmp_path / "out", "compress", {}).__enter__()
        assert (first.partial / "options.json").exists()
    assert not first.partial.exists()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with Output(tmp_path / "out", "compress", {}) as output:
        (output.new_folder() / "model").write_text("x")
        output.finish({})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model", "structmat.json"]


def test_differences_and_fingerprints(tmp_path: Path) -> None:
    assert differences({"a": 1, "b": 2}, {"b": 3, "c": 4}) == "a: 1, now None, b: 2, now 3, c: None, now 4"
    assert differences({"model_files": "x"}, {"model_files": "y"}) == "model files"
    file = tmp_path / "file"
    assert fingerprint(file) is None
    file.write_text("x")
    before = fingerprint(tmp_path)
    assert before is not None
    file.write_text("xy")
    assert fingerprint(tmp_path) != before
    assert fingerprint(None) is None


def test_calibration_data(folder: Path) -> None:
    config, tokenizer = tiny.llama().config, {"tokenizer": tiny.tokenizer()}
    texts = str(folder / "texts.txt")
    data = read_calibration(CalibrationOptions(texts, samples=5, batch_size=2), tokenizer, config)
    assert [len(batch["input_ids"]) for batch in data.batches] == [2, 2, 1]
    assert [len(batch["input_ids"]) for batch in data.held_out] == [1]
    packed = read_calibration(CalibrationOptions(texts, 4, 8, 2, packed=True), tokenizer, config)
    assert [tuple(batch["input_ids"].shape) for batch in packed.batches] == [(2, 8), (2, 8)]
    assert packed.size == "4 of 4 rows, 32 of at most 32 tokens"
    assert packed.warnings(4) == []
    assert len(packed.warnings(5)) == 1
    assert "32 tokens are fewer than 8 for each of the 5 inputs of a layer" in packed.warnings(5)[0]
    every = read_calibration(CalibrationOptions(texts, samples=100, length=20), tokenizer, config)
    assert (every.rows, sum(len(batch["input_ids"]) for batch in every.held_out)) == (22, 2)  # a tenth of 24
    assert "less than half of the 100 rows that --samples asks for" in every.warnings(1)[0]
    assert (length_for(config, None), length_for(config, 8), length_for(object(), None)) == (64, 8, 512)
    with pytest.raises(ValueError, match="expected --length of at most the model's 64 positions, got 65"):
        length_for(config, 65)
    with pytest.raises(ValueError, match="expected a model with a tokenizer or an image processor to calibrate"):
        read_calibration(CalibrationOptions(texts), {}, config)


def test_short_rows_count_by_their_tokens(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default one gets as many tokens from short documents as from one long text."""
    monkeypatch.setattr("structmat.cli.calibration.SAMPLES", 4)
    config, tokenizer = tiny.llama().config, {"tokenizer": tiny.tokenizer()}
    short, long = tmp_path / "short.jsonl", tmp_path / "long.txt"
    words = [" ".join(tiny.sentences(1, seed=k)) for k in range(40)]
    short.write_text("".join(json.dumps({"text": one}) + "\n" for one in words))
    long.write_text(" ".join(words))
    lengths = [1 + len(tiny.tokenizer()(one)["input_ids"]) for one in words]
    budget = 4 * 2 * max(lengths)
    expected = 0
    while sum(lengths[: expected + 1]) <= budget:
        expected += 1
    few, many = (
        read_calibration(CalibrationOptions(str(one), length=2 * max(lengths)), tokenizer, config)
        for one in (short, long)
    )
    assert many.rows == 4
    assert few.rows == expected > 4
    assert few.tokens is not None
    assert budget - max(lengths) < few.tokens <= budget
    assert few.size == f"{few.rows} rows, {few.tokens} of at most {budget} tokens"
    assert few.warnings(1) == []
    sparse = read_calibration(CalibrationOptions(f"{short}[:3]", length=2 * max(lengths)), tokenizer, config)
    assert f"less than half of the {budget} tokens that are used by default" in sparse.warnings(1)[0]


def test_one_long_text_is_used_to_its_end(folder: Path, tmp_path: Path) -> None:
    """The rows hold every token of a text without separators, and are those of the text, one after the other."""
    words = " ".join(tiny.sentences(24))
    (tmp_path / "book.txt").write_text(words, encoding="utf-8")
    options = CalibrationOptions(str(tmp_path / "book.txt"), length=12)
    data = read_calibration(options, {"tokenizer": tiny.tokenizer()}, tiny.llama().config)
    rows = [
        [int(i) for i, counted in zip(ids, mask, strict=True) if counted]
        for batch in (*data.batches, *data.held_out)
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert all(row[0] == 1 and len(row) <= 12 for row in rows)
    expected = tiny.tokenizer()(words)["input_ids"]
    assert sorted(i for row in rows for i in row[1:]) == sorted(expected)


def test_the_files_of_a_pattern_make_a_fingerprint(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    before = fingerprint(Source.parse(f"{tmp_path}/*.txt"))
    assert before is not None
    (tmp_path / "b.txt").write_text("c")
    assert fingerprint(Source.parse(f"{tmp_path}/*.txt")) != before


class Processor:
    """An image processor that puts every image into 16 x 16."""

    def __call__(self, images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
        pixels = torch.frombuffer(bytearray(images.resize((16, 16)).tobytes()), dtype=torch.uint8)
        return {"pixel_values": pixels.view(16, 16, 3).permute(2, 0, 1)[None] / 127.5 - 1}

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "preprocessor_config.json").write_text("{}")


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images of three classes."""
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    for name, colour in (("blue", (0, 0, 250)), ("green", (0, 250, 0)), ("red", (250, 0, 0))):
        place = tmp_path / "pictures" / name
        place.mkdir(parents=True)
        for k in range(4):
            image.new("RGB", (16, 16), tuple(max(0, c - 9 * k) for c in colour)).save(place / f"{k}.png")
    return tmp_path / "pictures"


def test_images(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "processors", lambda _: {"image processor": Processor()})
    tiny.vit().save_pretrained(tmp_path / "dense")
    options = CalibrationOptions(str(pictures), samples=6, batch_size=4)
    data = read_calibration(options, models.processors(""), tiny.vit().config)
    assert [tuple(batch["pixel_values"].shape) for batch in data.batches] == [(4, 3, 16, 16), (2, 3, 16, 16)]
    assert [tuple(batch["labels"].shape) for batch in data.held_out] == [(1,)]
    assert data.size == "6 of 6 images"
    assert data.vectors(tiny.vit().config) == 6 * 5  # four patches and a class token
    assert data.vectors(object()) == 6 * 64
    words = ["--calibrate", str(pictures), "--samples", "9", "--format", "low_rank", "--refine", "--refine-steps", "2"]
    words += ["--uniform"]
    assert main(["compress", str(tmp_path / "dense"), "-o", str(tmp_path / "out"), *words, "--batch-size", "3"]) == 0
    assert len(plan_of(load_pretrained(tmp_path / "out"))) == 12
    assert (tmp_path / "out/preprocessor_config.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "best"], "expected --method to be one of 'default', 'published', got 'best'"),
        (["--refine"], "expected --calibrate with --refine, which tunes on data"),
        (["--quantize", "int3"], "expected --quantize to be one of 'int8', 'int4', got 'int3'"),
        (["--quantize", "int4", "--stream"], "expected --quantize without --stream and --learn; .*"),
        (["--two-sided"], "expected --two-sided with --calibrate and without --stream: .*"),
        (["--refine", "--refine-steps", "0"], "expected --refine-steps to be an integer of at least 1, got 0"),
        (["--calibrate", "x", "--samples", "0"], "expected --samples to be an integer of at least 1, got 0"),
        (["--calibrate", "x", "--batch-size", "0"], "expected --batch-size to be an integer of at least 1, got 0"),
        (["--calibrate", "x", "--length", "0"], "expected --length to be an integer of at least 1, got 0"),
        (["--calibrate", "x.txt[1]"], "expected a slice such as .*"),
        (["--dtype", "int8"], "expected --dtype to be one of 'auto', 'float32', 'bfloat16', 'float16', got 'int8'"),
        (["--device", "abacus"], "expected --device to be one of this machine, such as cpu, got 'abacus'"),
        (["--plan", "nowhere.json"], "expected a plan in 'nowhere.json'; make one with structmat plan … -o"),
    ],
)
def test_wrong_options(
    words: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compress(folder, tmp_path / "out", *words) == 1
    assert re.fullmatch(f"structmat: {message}", capsys.readouterr().err.splitlines()[-1])
    assert not list(tmp_path.iterdir())
