"""Parameter groups hold everything once, and balancing changes no matrix."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from structmat import Blast, Format, LowRank, Monarch, StructuredLinear, apply_plan_, default_method
from structmat.formats import Factors, FactorSpec
from structmat.training import balance_, parameter_groups


@dataclass(frozen=True)
class Gated(Format):
    """A format with a trainable factor of a fixed dtype."""

    name: ClassVar[str] = "gated"
    scale_exponents: ClassVar[dict[str, float]] = {"basis": 1.0}

    def factor_specs(self) -> dict[str, FactorSpec]:
        return {"basis": FactorSpec((self.M, self.N)), "widths": FactorSpec((2, self.M), dtype=torch.float32)}

    def to_dense(self, factors: Factors) -> Tensor:
        return factors["basis"] * factors["widths"].sum(0)[:, None]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.blast = StructuredLinear(Blast(16, 16, 2, 4))
        self.gated = StructuredLinear(Gated(16, 16), bias=False)
        self.norm = nn.LayerNorm((2, 16))
        self.head = nn.Linear(16, 32)
        self.head.weight = self.embed.weight
        self.plain = nn.Linear(16, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.again = self.plain


def grouped(model: nn.Module, **options: Any) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1e-3, 0.1, **options)
    assert [len(group["params"]) for group in groups] == [len({id(p) for p in group["params"]}) for group in groups]
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def test_what_decays() -> None:
    expected = {
        "dense": {"plain.weight"},
        "dense, no decay": {
            "embed.weight", "blast.bias", "norm.weight", "norm.bias", "head.bias", "plain.bias",
        },
        "structured": {"blast.left", "blast.right", "gated.basis"},
        "structured, no decay": {"blast.diag"},
        "structure": {"gated.widths"},
    }  # fmt: skip
    assert grouped(Network()) == expected
    expected["dense"].add("embed.weight")
    expected["dense, no decay"].remove("embed.weight")
    assert grouped(Network(), decay_embeddings=True) == expected


def test_rates_reach_the_optimizer() -> None:
    groups = parameter_groups(Network(), 1e-3, 0.1, structured_learning_rate=5e-3)
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=1.0)
    found = [(group["name"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [
        ("dense", 1e-3, 0.1), ("dense, no decay", 1e-3, 0.0),
        ("structured", 5e-3, 0.1), ("structured, no decay", 5e-3, 0.0), ("structure", 5e-3, 0.0),
    ]  # fmt: skip
    assert [group["betas"][0] for group in optimizer.param_groups] == [0.9, 0.9, 0.9, 0.9, 0.0]
    groups = parameter_groups(Network(), 1e-3, 0.1, structure_learning_rate=7e-3)
    assert [group["lr"] for group in groups] == [1e-3, 1e-3, 1e-3, 1e-3, 7e-3]
    assert {group["lr"] for group in parameter_groups(Network(), 1e-3, 0.1)} == {1e-3}


def test_empty_groups_are_left_out() -> None:
    assert list(grouped(nn.Linear(4, 4, bias=False))) == ["dense"]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(2, 2), {"learning_rate": -1.0}, r"expected learning rates of at least 0, got -1\.0"),
        (nn.Linear(2, 2), {"weight_decay": -1.0}, r"expected a weight decay of at least 0, got -1\.0"),
        (nn.Linear(2, 2), {"structured_learning_rate": -1.0}, r"expected learning rates of at least 0, got -1\.0"),
        (nn.Linear(2, 2), {"structure_learning_rate": -1.0}, r"expected learning rates of at least 0, got -1\.0"),
        (nn.ReLU(), {}, "expected a parameter that learns, but none has requires_grad=True"),
    ],
)
def test_what_makes_no_groups(model: nn.Module, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parameter_groups(model, **{"learning_rate": 1.0, "weight_decay": 0.0, **options})


# balance


def sizes(layer: StructuredLinear) -> dict[str, Tensor]:
    factors = layer.factors
    if isinstance(layer.format, LowRank):
        return {"left": factors["left"].norm(dim=0), "right": factors["right"].norm(dim=1)}
    assert isinstance(layer.format, Blast)
    left, diag, right = layer.format.views(factors)
    rms = [
        left.square().mean((0, 1)).sqrt(), diag.square().mean((0, 1)).sqrt(), right.square().mean((0, 2)).sqrt()
    ]  # fmt: skip
    return dict(zip(("left", "diag", "right"), rms, strict=True))


@pytest.mark.parametrize("format", [LowRank(24, 36, 5), Blast(24, 36, (4, 3), 5)], ids=lambda format: format.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_balance_makes_sizes_equal_and_keeps_the_matrix(format: Format, dtype: torch.dtype) -> None:
    layer = StructuredLinear(format, dtype=dtype)
    with torch.no_grad():
        for k, factor in enumerate(layer.factors.values()):
            factor.mul_(10.0 ** (k - 1))
    before = layer.to_dense().detach()
    assert balance_(nn.Sequential(layer)) == ["0"]
    torch.testing.assert_close(layer.to_dense().detach(), before)
    first, *others = sizes(layer).values()
    for other in others:
        torch.testing.assert_close(other, first)


@pytest.mark.parametrize("format", [LowRank(24, 36, 5), Blast(24, 36, (4, 3), 5)], ids=lambda format: format.name)
def test_fits_are_balanced_already(format: Format) -> None:
    layer = StructuredLinear(format, factors=default_method(format)(torch.randn(24, 36), format).factors)
    before = {name: factor.detach().clone() for name, factor in layer.factors.items()}
    balance_(layer)
    for name, factor in layer.factors.items():
        torch.testing.assert_close(factor.detach(), before[name], rtol=1e-4, atol=1e-6)


def test_dead_components_other_formats_and_shared_factors() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    apply_plan_(model, {"0": LowRank(16, 16, 4), "2": Monarch(16, 16, 4, 1)})
    with torch.no_grad():
        model[0].left[:, 1] = 0
        model[0].right[2] *= 100
    dense = [layer.to_dense().detach() for layer in model]
    dead = model[0].right[1].detach().clone()
    assert balance_(model) == ["0", "1"]
    for layer, matrix in zip(model, dense, strict=True):
        torch.testing.assert_close(layer.to_dense().detach(), matrix)
    assert torch.equal(model[0].right[1], dead)
