"""The weight of a structured layer: all that reads it gets the matrix, all that writes it gets an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structmat import Blast, Dense, LowRank, StructuredConv2d, StructuredLinear, apply_plan_, densify_, report
from structmat.network.sites import find_sites
from structmat.network.staying import unseen_weights
from structmat.nn import ReadOnlyWeight


@pytest.fixture
def layer() -> StructuredLinear:
    return StructuredLinear(LowRank(6, 8, 2))


READS: dict[str, Callable[[Tensor], Any]] = {
    "clone": lambda w: w.clone(),
    "sum": lambda w: w.sum(0),
    "product": lambda w: torch.ones(3, 8) @ w.T,
    "linear": lambda w: nn.functional.linear(torch.ones(3, 8), w),
    "items": lambda w: w[1:3],
    "data": lambda w: w.data,
    "detached": lambda w: w.detach() * 2,
    "transposed": lambda w: w.T,
    "numpy": lambda w: torch.from_numpy(w.detach().numpy().copy()),
    "stacked": lambda w: torch.stack([w, w]),
    "split": lambda w: torch.split(w, 3)[1],
    "norm": lambda w: w.norm(),
    "list": lambda w: torch.tensor(w.tolist()),
}


@pytest.mark.parametrize("read", list(READS.values()), ids=list(READS))
def test_reading_gives_what_the_matrix_gives(read: Callable[[Tensor], Any], layer: StructuredLinear) -> None:
    torch.testing.assert_close(read(layer.weight) + 0, read(layer.to_dense()) + 0)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "in place": lambda w: w.add_(1),
    "normal": lambda w: nn.init.normal_(w),
    "data in place": lambda w: w.data.add_(1),
    "data": lambda w: setattr(w, "data", torch.zeros(6, 8)),
    "augmented data": lambda w: exec("w.data += 1", {"w": w}),
    "item": lambda w: w.__setitem__(0, 1.0),
    "view": lambda w: w.view(-1).zero_(),
    "item of a view": lambda w: w.detach()[0].__setitem__(0, 1.0),
    "part of a split": lambda w: torch.split(w.detach(), 3)[0].zero_(),
    "augmented": lambda w: w.__iadd__(1),
    "or": lambda w: w.__ior__(w),
    "copy": lambda w: w.copy_(torch.zeros(6, 8)),
    "out": lambda w: torch.add(torch.zeros(6, 8), 1, out=w),
    "requires_grad": lambda w: w.requires_grad_(False),
    "foreach": lambda w: torch._foreach_add_([w], 1),  # pyright: ignore,
}


@pytest.mark.parametrize("write", list(WRITES.values()), ids=list(WRITES))
def test_writing_is_refused(write: Callable[[Tensor], Any], layer: StructuredLinear) -> None:
    before = layer.to_dense()
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="expected the weight of a structured layer to be read only"),
    ):
        write(layer.weight)
    assert torch.equal(layer.to_dense(), before)


def test_assigning_is_refused(layer: StructuredLinear) -> None:
    with pytest.raises(KeyError, match="attribute 'weight' already exists"):
        layer.weight = nn.Parameter(torch.zeros(6, 8))  # pyright: ignore
    with pytest.raises(AttributeError, match="weight"):
        layer.weight = torch.zeros(6, 8)  # pyright: ignore


def test_it_is_differentiable(layer: StructuredLinear) -> None:
    layer.weight.square().sum().backward()
    got = {name: factor.grad for name, factor in layer.factors.items()}
    layer.zero_grad()
    layer.to_dense().square().sum().backward()
    for name, factor in layer.factors.items():
        torch.testing.assert_close(factor.grad, got[name])


def test_metadata_cost_nothing(layer: StructuredLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StructuredLinear, "to_dense", lambda self: pytest.fail("the matrix was computed"))
    weight = layer.bfloat16().weight
    assert isinstance(weight, ReadOnlyWeight)
    assert (weight.shape, weight.dtype, weight.device.type) == ((6, 8), torch.bfloat16, "cpu")
    assert (weight.numel(), weight.dim(), weight.size(0), weight.element_size()) == (48, 2, 6, 2)
    assert weight.is_floating_point()
    assert hasattr(layer, "weight")
    assert layer.to("meta").weight.is_meta


def test_the_layout_is_that_of_the_dense_layer() -> None:
    layer = StructuredConv2d(LowRank(4, 27, 2), 3)
    assert layer.weight.shape == (4, 3, 3, 3)
    assert torch.equal(layer.weight.flatten(1), layer.to_dense())


def test_the_dense_format_owns_its_weight() -> None:
    layer = StructuredLinear(Dense(6, 8))
    assert isinstance(layer.weight, nn.Parameter)
    with torch.no_grad():
        layer.weight.zero_()
    assert not layer.to_dense().any()


def test_it_is_no_part_of_the_network() -> None:
    model = apply_plan_(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)), {"0": LowRank(6, 8, 2)})
    assert set(model.state_dict()) == {"0.left", "0.right", "0.bias", "1.weight", "1.bias"}
    assert list(find_sites(model)) == ["1"]
    assert unseen_weights(model) == report(model).unseen == {}
    densify_(model)
    assert list(find_sites(model)) == ["0", "1"]


def test_factors_are_stored_contiguously() -> None:
    format = Blast(8, 8, (2, 2), 3)
    factors = {name: factor.T.contiguous().T for name, factor in format.init().items()}
    assert all(factor.is_contiguous() for factor in StructuredLinear(format, factors=factors).factors.values())


class Odd(nn.Module):
    """A matrix that is a parameter of its own, and a vector with many dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 3, 4))
        self.token = nn.Parameter(torch.zeros(1, 1, 4))


def test_what_no_walker_sees_is_named() -> None:
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2),
            "odd": Odd(),
            "embedding": nn.Embedding(5, 8),
            "transposed": nn.ConvTranspose2d(3, 4, 2),
            "sub": nn.Bilinear(2, 3, 4),
            "linear": nn.Linear(8, 8),
        }
    )
    apply_plan_(model, {"linear": LowRank(8, 8, 2)})
    unseen = unseen_weights(model)
    assert set(unseen) == {"odd.table", "sub.weight"}
    assert unseen["sub.weight"] == "4 x 2 x 3, held by a Bilinear, which is no linear layer or convolution to replace"
    model["attention"].register_forward_hook(lambda *_: None)
    assert unseen_weights(model)["attention.in_proj_weight"].startswith(
        "24 x 8, held by a MultiheadAttention, but it has hooks, which would be lost"
    )
    model["attention"]._forward_hooks.clear()
    lines = str(report(model)).splitlines()
    assert [line for line in lines if line.startswith("not in any row: odd.table (1 x 3 x 4, held by a Odd, which")]
    assert report(model).to_dict()["unseen"] == unseen


def test_a_layer_without_its_shape_yet_is_no_matrix() -> None:
    assert unseen_weights(nn.Sequential(nn.LazyConvTranspose2d(4, 2))) == {}
