"""``export.to_onnx``: every format, dtype and kind of model, checked by the exporter and once more here."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from export_networks import FEW, FINAL, Bank, Images  # noqa: E402

from small_networks import mlp, snapshot  # noqa: E402
from structmat import Blast, Format, GaudiGblr, apply_plan_, harden_, load_pretrained, make_plan, tile_  # noqa: E402
from structmat.cli import main  # noqa: E402
from structmat.export import ExportError, to_onnx  # noqa: E402
from structmat.export import onnx as exporter  # noqa: E402
from training import tiny  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporter


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path)
    names = [one.name for one in session.get_inputs()]
    return [torch.from_numpy(y) for y in session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def structured() -> nn.Sequential:
    model = mlp().eval()
    return apply_plan_(model, make_plan(model, Blast, keep=0.6, blocks=2))  # type: ignore


@pytest.mark.slow
@pytest.mark.parametrize("formats", [FEW, FINAL], ids=["few", "all"])
def test_every_format_for_every_batch_and_length(formats: list[Format], tmp_path: Path) -> None:
    model = Bank(formats).eval()
    found = to_onnx(model, tmp_path / "bank.onnx", torch.randn(2, 3, 24))
    assert found.inputs == {"x": ("batch", "sequence", 24)}
    assert found.difference < 1e-4
    for shape in ((1, 1), (5, 2), (2, 40)):
        x = torch.randn(*shape, 24)
        for got, expected in zip(run(found.path, x), model(x), strict=True):
            close(got, expected.detach())
    assert {node.domain for node in onnx.load(found.path).graph.node} == {""}
    assert b".py" not in found.path.read_bytes()  # no file of this machine is named


@pytest.mark.parametrize(("blocks", "products"), [pytest.param(2, 4, marks=pytest.mark.slow), (8, 3)])
def test_blast_is_few_products_without_scatter(blocks: int, products: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    apply_plan_(model, make_plan(model, Blast, keep=0.5, blocks=blocks))
    found = operators(to_onnx(model, tmp_path / "blast.onnx", torch.randn(2, 64)).path)
    assert found.count("MatMul") + found.count("Gemm") == products
    assert not {name for name in found if name.startswith(("Scatter", "Gather", "TopK", "Einsum"))}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "words"), [(torch.float16, ""), (torch.bfloat16, ", the weights in float32")])
def test_half_precision(dtype: torch.dtype, words: str, tmp_path: Path) -> None:
    model = structured().to(dtype)
    before = snapshot(model)
    found = to_onnx(model, tmp_path / "half.onnx", torch.randn(3, 24, dtype=dtype))
    assert found.checked == f"onnxruntime {onnxruntime.__version__}{words}"
    assert found.difference < 1e-2
    assert snapshot(model) == before
    names = {onnx.TensorProto.DataType.Name(t.data_type) for t in onnx.load(found.path).graph.initializer}
    assert {"FLOAT16", "BFLOAT16"} & names
    assert "FLOAT" not in names


@pytest.mark.slow
def test_a_structure_that_is_learned_is_hardened_in_the_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48)).eval()
    apply_plan_(model, make_plan(model, {nn.Linear: GaudiGblr}, keep=0.5))
    for layer in (model[0], model[2]):
        layer.get_buffer("sigma").fill_(20.0)
    learned = copy.deepcopy(model.state_dict())
    found = to_onnx(model, tmp_path / "learned.onnx", torch.randn(3, 64))
    assert all(torch.equal(value, learned[name]) for name, value in model.state_dict().items())
    assert set(found.hardened) == {"0", "2"}
    assert "2 layers were hardened for this; their matrices changed by" in str(found)
    harden_(model)
    tile_(model)
    x = torch.randn(5, 64)
    close(run(found.path, x)[0], model(x).detach())


def test_large_weights_are_in_a_second_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter, "LARGEST_FILE", 100)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48)).eval()
    found = to_onnx(model, tmp_path / "new" / "large.onnx", torch.randn(2, 64))
    assert [file.name for file in found.files] == ["large.onnx", "large.onnx.data"]
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["large.onnx", "large.onnx.data"]
    assert found.size == sum(file.stat().st_size for file in found.files)
    x = torch.randn(3, 64)
    close(run(found.path, x)[0], model(x).detach())


@pytest.mark.slow
def test_a_result_that_differs_is_refused_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.onnx").write_text("before")
    right = exporter._session
    monkeypatch.setattr(exporter, "_session", lambda path: lambda x: [y * 1.01 for y in right(path)(x)])
    with pytest.raises(
        ExportError, match=r"expected onnxruntime .* within 1e-04 .* 'output', got a difference of 1.0e-02"
    ):
        to_onnx(structured(), tmp_path / "m.onnx", torch.randn(2, 24))
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_text() == "before"


def test_a_network_that_torch_cannot_export(tmp_path: Path) -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(ExportError, match=r"expected a Branch that torch.onnx can export, got: .*Could not guard"):
        to_onnx(Branch(), tmp_path / "m.onnx", torch.randn(2, 4))
    assert list(tmp_path.iterdir()) == []


def test_other_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a model on the CPU to export, got one on meta"):
        to_onnx(nn.Linear(3, 3, device="meta"), tmp_path / "m.onnx", torch.randn(2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_models_of_transformers(kind: str, tmp_path: Path) -> None:
    model = tiny.structured(getattr(tiny, kind)()).eval()
    found = to_onnx(model, tmp_path / "m.onnx")
    inputs = {
        "bert": (
            torch.randint(3, 128, (3, 9)),
            torch.ones(3, 9, dtype=torch.int64),
            torch.zeros(3, 9, dtype=torch.int64),
        ),
        "vit": (torch.randn(3, 3, 16, 16),),
    }[kind]
    names = ("input_ids", "attention_mask", "token_type_ids") if kind == "bert" else ("pixel_values",)
    assert tuple(found.inputs) == names
    close(run(found.path, *inputs)[0], model(**dict(zip(names, inputs, strict=True))).logits.detach())


@pytest.mark.slow
def test_convolutions(tmp_path: Path) -> None:
    model, x = Images().eval(), torch.randn(2, 3, 12, 10)
    found = to_onnx(model, tmp_path / "m.onnx", x, axes={"x": {0: "batch", 2: "height", 3: "width"}})
    assert found.inputs == {"x": ("batch", 3, "height", "width")}
    other = torch.randn(1, 3, 17, 9)
    close(run(found.path, other)[0], model(other).detach())


def continued(path: Path, tokens: Tensor, count: int) -> Tensor:
    """Greedy tokens after ``tokens (batch, length)`` by an exported model."""
    session = onnxruntime.InferenceSession(path)
    past = {
        one.name: torch.zeros(len(tokens), one.shape[1], 0, one.shape[3]).numpy()
        for one in session.get_inputs()
        if one.name.startswith("past")
    }
    new, outputs = tokens, [one.name for one in session.get_outputs()]
    for _ in range(count):
        total = tokens.shape[1]
        feed = {
            "input_ids": new.numpy(),
            "attention_mask": torch.ones(len(tokens), total, dtype=torch.int64).numpy(),
            "position_ids": torch.arange(total - new.shape[1], total).repeat(len(tokens), 1).numpy(),
        }
        logits, *present = session.run(outputs, feed | past)
        past = dict(zip(past, present, strict=True))
        new = torch.from_numpy(logits)[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, new], 1)
    return tokens


@pytest.mark.slow
def test_a_language_model_generates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.structured(tiny.llama()).eval()
    model.save_pretrained(tmp_path / "small")
    words = ["export", str(tmp_path / "small"), "-o", str(tmp_path / "small.onnx")]
    assert main(words) == 0
    assert "past_key_values.0.key: batch x 2 x past_sequence_length x 16" in capsys.readouterr().out
    tokens = torch.randint(3, 128, (2, 5))
    expected = load_pretrained(tmp_path / "small").generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert torch.equal(continued(tmp_path / "small.onnx", tokens, 12), expected)
    assert main(words) == 1
    assert "is a file, which --overwrite replaces" in capsys.readouterr().err


class Called(nn.Module):
    """A module that is called in its own way."""

    def __init__(self, module: nn.Module, run: Any) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.module, x)


SPLIT = {
    "attention": (nn.MultiheadAttention(16, 4, batch_first=True), (2, 5, 16), lambda m, x: m(x, x, x)[0]),
    "lstm": (nn.LSTM(16, 16, batch_first=True, bidirectional=True), (2, 5, 16), lambda m, x: m(x)[0]),
    "gru": (nn.GRU(16, 16, batch_first=True), (2, 5, 16), lambda m, x: m(x)[0]),
    "conv": (nn.Conv1d(16, 16, 3, padding=1), (2, 16, 9), lambda m, x: m(x)),
    "groups": (nn.Conv2d(16, 16, 3, padding=1, groups=2), (2, 16, 6, 7), lambda m, x: m(x)),
    "transposed": (nn.ConvTranspose2d(16, 16, 3, 2, 1, 1), (2, 16, 6, 7), lambda m, x: m(x)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SPLIT))
def test_modules_that_hold_several_matrices(name: str, tmp_path: Path) -> None:
    module, shape, call = SPLIT[name]
    model = Called(copy.deepcopy(module), call).eval()
    apply_plan_(model, make_plan(model, "low_rank", keep=0.6))
    found = to_onnx(model, tmp_path / "split.onnx", torch.randn(shape), axes={"x": {0: "batch"}})
    assert found.difference < 1e-5
    x = torch.randn(3, *shape[1:])
    close(run(found.path, x)[0], model(x).detach())
