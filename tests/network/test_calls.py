"""How networks are called: forms of batches, where they go, and the mode that calls leave behind."""

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structmat.integrations.transformers.quantizer import without_cache
from structmat.network.adapters import ADAPTERS
from structmat.network.calls import call, device_of, evaluating, moved, widened

Pair = namedtuple("Pair", ["a", "b"])


class Subtract(nn.Module):
    def forward(self, x: Tensor, y: Tensor | float = 0.0) -> Tensor:
        return x - y


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (torch.ones(2), 1.0),
        ((torch.ones(2), 3.0), -2.0),
        ([torch.ones(2), 3.0], -2.0),
        ({"y": 2.0, "x": torch.ones(2)}, -1.0),
    ],
    ids=["tensor", "tuple", "list", "mapping"],
)
def test_forms_of_a_batch(batch: Any, expected: float) -> None:
    assert torch.equal(call(Subtract(), batch), torch.full((2,), expected))


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x


class Transformer(Subtract):
    main_input_name = "x"


@pytest.mark.parametrize("label", [torch.tensor([1, 0]), torch.rand(2), 3])
def test_the_label_of_a_pair_is_no_argument(label: Any) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(2), torch.tensor([0, 1])), 2)
    for batch in (*loader, (torch.ones(2), label)):
        assert torch.equal(call(Square(), batch), torch.ones(2))
    with pytest.raises(TypeError):
        call(Square(), (torch.ones(2), label, label))  # which is no pair


def test_a_class_for_each_example_is_no_argument_of_transformers() -> None:
    classes = torch.tensor([3, 4])
    assert torch.equal(call(Transformer(), (torch.ones(2), classes)), torch.ones(2))
    assert torch.equal(call(Transformer(), (torch.ones(2), classes.float())), torch.tensor([-2.0, -3.0]))
    assert torch.equal(call(Subtract(), (torch.ones(2), classes)), torch.tensor([-2.0, -3.0]))


def test_batches_move_with_everything_in_them() -> None:
    batch = {"a": torch.ones(2), "b": [torch.ones(3), "text", None], "c": 3}
    there = moved(batch, torch.device("meta"))
    assert there["a"].is_meta
    assert there["b"][0].is_meta
    assert (there["b"][1:], there["c"]) == (("text", None), 3)
    assert not batch["a"].is_meta


def test_the_device_is_that_of_the_first_parameter() -> None:
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta")
    assert device_of(nn.ReLU()) == torch.device("cpu")


def test_widening_takes_what_is_narrower_and_leaves_the_rest() -> None:
    half, single, double, ids = (
        torch.ones(2, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64, torch.int64)
    )
    wide = widened({"a": half, "b": (single, [half, ids]), "c": double, "d": None}, torch.float32)
    assert wide["a"].dtype == torch.float32
    assert wide["b"][0] is single
    assert wide["b"][1][0].dtype == torch.float32
    assert wide["b"][1][1] is ids
    assert wide["c"] is double
    assert wide["d"] is None
    assert widened(single, torch.bfloat16) is single
    for untouched in (Pair(single, ids), {"a": [single]}, [half.double()], "text"):
        assert widened(untouched, torch.float32) is untouched


def test_evaluating_is_undone_after_an_error_too() -> None:
    assert ADAPTERS["transformers"].stateless is without_cache
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval()).train()
    model[1].eval()
    model.config = SimpleNamespace(use_cache=True)  # pyright: ignore
    seen: list[Any] = []

    def fail() -> None:
        with evaluating(model):
            seen.extend(module.training for module in model.modules())
            seen.extend([model.config.use_cache, torch.is_grad_enabled()])  # pyright: ignore
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        fail()
    assert seen == [False] * 5
    assert [module.training for module in model.modules()] == [True, True, False]
    assert model.config.use_cache is True  # pyright: ignore
    assert torch.is_grad_enabled()
