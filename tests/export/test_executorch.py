"""``export.to_executorch``: checked by the exporter and once more here, in ExecuTorch's own runtime."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("executorch.exir")
runtime = pytest.importorskip("executorch.runtime")

from export_networks import FINAL, Bank  # noqa: E402

from structmat import Blast, Format, StructuredLinear  # noqa: E402
from structmat.cli import main  # noqa: E402
from structmat.export import ExportError, to_executorch  # noqa: E402
from structmat.export import executorch as exporter  # noqa: E402
from training import tiny  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporter


def run(path: Path, *inputs: Tensor) -> list[Tensor]:
    program = runtime.Runtime.get().load_program(path.read_bytes())
    return [output.clone() for output in program.load_method("forward").execute(list(inputs))]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def small(blocks: int = 2) -> nn.Sequential:
    return nn.Sequential(StructuredLinear(Blast(64, 64, (blocks, blocks), 8))).eval()


@pytest.mark.slow
def test_fixed_shapes_are_one_part(tmp_path: Path) -> None:
    model, x = small(), torch.randn(3, 64)
    found = to_executorch(model, tmp_path / "m.pte", x, dynamic=False)
    assert found.delegates == 1
    assert "1 parts run in the backend" in str(found)
    assert found.inputs == {"input": (3, 64)}
    close(run(found.path, x)[0], model(x).detach())


def test_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 64)
    with pytest.raises(ValueError, match=r"expected a model in float32 for ExecuTorch, got one in torch\.float16"):
        to_executorch(small().half(), tmp_path / "m.pte", x.half())
    with pytest.raises(ValueError, match="expected a largest length of at least 3 for 'batch', that of the example"):
        to_executorch(small(), tmp_path / "m.pte", x, lengths={"batch": 2})
    with pytest.raises(ValueError, match="batch"):
        to_executorch(small(), tmp_path / "m.pte", x, lengths={"height": 2})

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(ExportError, match=r"expected a Branch that ExecuTorch can export, got: .*guard"):
        to_executorch(Branch(), tmp_path / "m.pte", x)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_result_that_differs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = exporter._Method.__call__
    monkeypatch.setattr(exporter._Method, "__call__", lambda self, x: [1.01 * y for y in right(self, x)])
    with pytest.raises(ExportError, match=r"expected ExecuTorch .* within 1e-04 .* got a difference of 1.0e-02"):
        to_executorch(small(), tmp_path / "m.pte", torch.randn(3, 64), dynamic=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("format", FINAL, ids=lambda format: f"{format.name}-{format.M}x{format.N}")
def test_every_format_for_every_batch(format: Format, tmp_path: Path) -> None:
    model = Bank([format]).eval()
    found = to_executorch(model, tmp_path / "m.pte", torch.randn(3, 24))
    assert found.difference < 1e-4
    x = torch.randn(7, 24)
    close(run(found.path, x)[0], model(x)[0].detach())


@pytest.mark.slow
def test_int8_is_smaller_and_close(tmp_path: Path) -> None:
    model = nn.Sequential(StructuredLinear(Blast(512, 512, (2, 2), 128))).eval()
    x = torch.randn(3, 512)
    whole = to_executorch(model, tmp_path / "float.pte", x, dynamic=False)
    found = to_executorch(model, tmp_path / "int8.pte", x, dynamic=False, int8=True)
    assert found.size < whole.size / 3
    assert 1e-4 < found.difference < 0.05
    expected = model(x).detach()
    assert (run(found.path, x)[0] - expected).norm() < 0.03 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_models_in_int8(kind: str, tmp_path: Path) -> None:
    found = to_executorch(tiny.structured(getattr(tiny, kind)()).eval(), tmp_path / "m.pte", dynamic=False, int8=True)
    assert 1e-4 < found.difference < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_vision_transformer(dynamic: bool, tmp_path: Path) -> None:
    model = tiny.structured(tiny.vit()).eval()
    found = to_executorch(model, tmp_path / "m.pte", dynamic=dynamic)
    assert found.delegates
    x = torch.randn(5 if dynamic else 2, 3, 16, 16)
    close(run(found.path, x)[0], model(x).logits.detach())


@pytest.mark.slow
def test_a_language_model_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.structured(tiny.llama()).eval()
    model.save_pretrained(tmp_path / "small")
    words = ["export", str(tmp_path / "small"), "-o", str(tmp_path / "small.pte"), "--to", "executorch", "--fixed"]
    assert main(words) == 0
    assert "input past_key_values.0.key: 2 x 2 x 5 x 16" in capsys.readouterr().out
    tokens = torch.randint(3, 128, (2, 8))
    past = [torch.zeros(2, 2, 5, 16) for _ in range(2 * model.config.num_hidden_layers)]
    mask = torch.tensor([[0] * 5 + [1] * 3] * 2)
    logits = run(tmp_path / "small.pte", tokens[:, :3].contiguous(), mask, torch.arange(3).repeat(2, 1), *past)[0]
    close(logits, model(tokens[:, :3]).logits.detach())


def test_options_of_executorch_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "-o", str(tmp_path / "m.onnx"), "--int8"]) == 1
    assert "expected --to executorch for --int8, got --to onnx; leave --int8 out" in capsys.readouterr().err
