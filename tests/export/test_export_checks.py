"""``export.checks``: how a runtime is compared with PyTorch, and how files appear."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structmat.export.checks import Exported, ExportError, appearing, largest_difference, runtime
from structmat.network.signatures import Signature, signature_of


def signature() -> Signature:
    return signature_of(nn.Linear(3, 2).eval(), torch.randn(2, 5, 3))


def difference(change: Callable[[Tensor], Any], dtype: torch.dtype = torch.float32) -> float:
    one = signature()
    return largest_difference(one, lambda x: [change(y.detach()) for y in one.module(*x)], dtype, "a runtime")


def test_sizes_and_differences() -> None:
    seen: list[tuple[int, ...]] = []
    one = signature()

    def run(inputs: Any) -> Any:
        seen.append(tuple(inputs[0].shape))
        with torch.no_grad():
            return one.module(*inputs)

    assert largest_difference(one, run, torch.float32, "a runtime") == 0
    assert seen == [(2, 5, 3), (1, 5, 3), (5, 7, 3), (7, 1, 3)]
    assert 0 < difference(lambda y: y * (1 + 1e-5)) < 1e-4
    assert difference(lambda y: y * 1.01, torch.float16) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    "change",
    [lambda y: y * 1.01, lambda y: y * torch.nan, lambda y: y[..., :1], lambda y: y + torch.inf],
    ids=["size", "nan", "shape", "infinity"],
)
def test_a_difference_is_refused(change: Callable[[Tensor], Any]) -> None:
    with pytest.raises(ExportError, match="expected a runtime to compute what PyTorch does, within 1e-04 of the larg"):
        difference(change)


def test_a_runtime_that_fails_is_named() -> None:
    def fail(y: Tensor) -> Any:
        raise RuntimeError("the batch is fixed")

    with pytest.raises(
        ExportError, match=r"a runtime fails on inputs with \{'batch': 2, 'sequence': 5\}: the batch is f"
    ):
        difference(fail)


def test_infinities_and_empty_outputs_are_the_same() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.new_full((2,), -torch.inf), x.new_zeros(0), x / 0 * 0

    one = signature_of(Odd(), torch.randn(2, 3))
    assert largest_difference(one, lambda x: one.module(*x), torch.float32, "a runtime") == 0


def test_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with appearing(tmp_path / "new" / "model") as path:
            path.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list((tmp_path / "new").iterdir()) == []
    with appearing(tmp_path / "new" / "model") as path:
        path.write_text("whole")
        path.with_name("model.data").write_text("weights")
    assert sorted(file.name for file in (tmp_path / "new").iterdir()) == ["model", "model.data"]


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(
        ImportError, match=r"expected no_such_runtime to be installed .* pip install 'structmat\[onnx\]'"
    ):
        runtime("no_such_runtime.session", "onnx")


def test_what_was_written_as_text(tmp_path: Path) -> None:
    shapes = {f"past.{k}": (2, "batch") for k in range(6)}
    found = Exported(tmp_path, (tmp_path,) * 2, 1234, shapes, {"y": ()}, 1e-6, "a runtime", {"0": 0.5}, 3)
    assert str(found).splitlines()[1:] == [
        "input past.0: 2 x batch", "input past.1: 2 x batch", "input past.2: 2 x batch", "input past.3: 2 x batch",
        "2 more inputs, up to past.5", "output y: one number",
        "1 layers were hardened for this; their matrices changed by 5.0e-01 at most", "3 parts run in the backend",
        "checked with a runtime: the largest difference from PyTorch is 1.0e-06",
    ]  # fmt: skip
    assert str(found).splitlines()[0] == f"{tmp_path}: 1,234 bytes in 2 files"
