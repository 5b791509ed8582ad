"""Surgery: layers are replaced and taken out again, and nothing else changes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structmat as sm
from small_networks import Tied, generator, mlp, snapshot
from structmat import (
    Blast,
    BlockDiagonal,
    Dense,
    Format,
    LowRank,
    Monarch,
    StructuredLinear,
    apply_plan_,
    compress_,
    densify_,
)

# apply_plan_


def test_apply_replaces_the_planned_layers_alone() -> None:
    model = mlp()
    kept, bias = model[2], model[0].bias
    plan = {"0": LowRank(32, 24, 4), "4": Blast(24, 32, 4, 5)}
    assert apply_plan_(model, plan) is model
    assert (model[0].format, model[4].format, model[2]) == (plan["0"], plan["4"], kept)
    assert model[0].bias is bias
    assert model(torch.randn(3, 24)).shape == (3, 24)


@pytest.mark.parametrize("bias", [True, False])
def test_what_carries_over(bias: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 6, bias=bias, dtype=torch.bfloat16)).eval()
    model[0].weight.requires_grad_(False)
    apply_plan_(model, {"0": LowRank(6, 8, 2)})
    layer = model[0]
    assert isinstance(layer, StructuredLinear)
    assert not layer.training
    assert (layer.bias is not None) is bias
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert not any(factor.requires_grad for factor in layer.factors.values())
    if layer.bias is not None:
        assert layer.bias.requires_grad


def test_given_factors_are_copied() -> None:
    model, format = mlp(), LowRank(32, 24, 4)
    factors = format.init(generator=generator())
    apply_plan_(model, {"0": format}, factors={"0": factors})
    torch.testing.assert_close(model[0].to_dense(), format.to_dense(factors))
    factors["left"].zero_()
    assert model[0].to_dense().any()


def test_a_generator_decides_the_random_init() -> None:
    plan = {"0": LowRank(32, 24, 4), "2": Monarch(32, 32, 4, 2)}
    one, same, other = (apply_plan_(mlp(), plan, generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one[2].to_dense(), same[2].to_dense())
    assert not torch.equal(one[2].to_dense(), other[2].to_dense())


def test_apply_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(24, 32), nn.Conv2d(4, 8, 3))
    apply_plan_(model, {"0": LowRank(32, 24, 4), "1": LowRank(8, 36, 2)})
    assert all(parameter.is_meta for parameter in model.parameters())
    expected = {f"{k}.{name}" for k in "01" for name in ("bias", "left", "right")}
    assert {name for name, _ in model.named_parameters()} == expected


def test_a_layer_that_is_already_so_or_planned_dense_stays() -> None:
    model = apply_plan_(mlp(), {"0": LowRank(32, 24, 4)})
    before = snapshot(model)
    apply_plan_(model, {"0": LowRank(32, 24, 4), "2": Dense(32, 32)})
    assert snapshot(model) == before


def test_tied_weights_and_modules_stay_tied() -> None:
    model = Tied()
    biases = model.first.bias, model.second.bias
    apply_plan_(model, {"first": LowRank(24, 24, 3), "again": BlockDiagonal(24, 24, 4)})
    assert model.first is not model.second
    assert model.first.left is model.second.left
    assert model.first.right is model.second.right
    assert (model.first.bias, model.second.bias) == biases
    assert model.again is model.inner[0]
    model(torch.randn(2, 24)).sum().backward()
    assert sum(p.numel() for p in model.parameters()) == 3 * 48 + 24 * 6 + 3 * 24


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"9": LowRank(32, 24, 4)}, "expected a module named '9', which the plan wants as LowRank"),
        ({"1": LowRank(32, 24, 4)}, "layer '1' cannot be structured: it is of type ReLU"),
        ({"2": LowRank(32, 24, 4)}, "layer '2' has shape (32, 32), but the plan says LowRank(M=32, N=24, rank=4)"),
        ({"2": LowRank(32, 32, 16)}, "layer '2': expected fewer parameters than the dense 32 x 32 = 1024, got 1024"),
    ],
)
@pytest.mark.parametrize("verb", [apply_plan_, compress_])
def test_a_plan_that_does_not_fit_changes_nothing(
    verb: Callable[..., Any], plan: dict[str, Format], message: str
) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        verb(model, {"0": LowRank(32, 24, 4), **plan})
    assert snapshot(model) == before


def test_problematic_sites_are_refused() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    with pytest.raises(ValueError, match=r"it is of type Conv2d, which holds several matrices; plan 0\.group_0"):
        apply_plan_(model, {"0": LowRank(8, 18, 2)})


def test_another_structure_is_not_replaced() -> None:
    model = apply_plan_(mlp(), {"0": LowRank(32, 24, 4)})
    message = "expected '0' dense or already LowRank(M=32, N=24, rank=5), got LowRank(M=32, N=24, rank=4); densify_ it"
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_plan_(model, {"0": LowRank(32, 24, 5)})


def test_one_weight_cannot_be_planned_twice() -> None:
    model = Tied()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match="the plan names 'first' and 'second', which share one weight; keep one of them"
    ):
        apply_plan_(model, {"first": LowRank(24, 24, 3), "second": LowRank(24, 24, 3)})
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({"2": LowRank(32, 32, 4).init()}, "expected factors only of layers that the plan replaces, got some of ['2']"),
        ({"0": {"left": torch.zeros(32, 4)}}, "does not fit: missing right (4, 24)"),
        ({"0": LowRank(32, 24, 3).init()}, "left: expected shape (32, 4), got (32, 3)"),
    ],
)
def test_factors_that_do_not_fit_change_nothing(factors: dict[str, dict[str, Tensor]], message: str) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_plan_(model, {"0": LowRank(32, 24, 4)}, factors=factors)
    assert snapshot(model) == before


# densify_


def test_densify_gives_back_dense_layers_that_compute_the_same() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    compress_(model, {"0": LowRank(32, 24, 4), "2": Blast(32, 32, 4, 4)}, progress=False)
    model.eval()
    x = torch.randn(3, 24)
    before, bias, matrix = model(x), model[0].bias, model[2].to_dense()
    assert densify_(model) is model
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert model[0].bias is bias
    assert torch.equal(model[2].weight, matrix)
    assert (model[0].weight.requires_grad, model[2].weight.requires_grad, model[0].training) == (False, True, False)
    torch.testing.assert_close(model(x), before)


def test_densify_some() -> None:
    model = apply_plan_(mlp(), {"0": LowRank(32, 24, 4), "2": Monarch(32, 32, 4, 2)})
    densify_(model, ["2"])
    assert isinstance(model[0], StructuredLinear)
    assert type(model[2]) is nn.Linear


def test_densify_keeps_ties() -> None:
    model = apply_plan_(Tied(), {"first": LowRank(24, 24, 3), "again": BlockDiagonal(24, 24, 4)})
    x = torch.randn(3, 24)
    before = model(x)
    densify_(model)
    assert model.first.weight is model.second.weight
    assert model.again is model.inner[0]
    assert type(model.again) is nn.Linear
    torch.testing.assert_close(model(x), before)


def test_densify_keeps_the_dtype() -> None:
    model = apply_plan_(mlp().bfloat16(), {"0": LowRank(32, 24, 4)})
    assert densify_(model)[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("structured", "known"), [({}, "none"), ({"0": LowRank(32, 24, 4), "2": LowRank(32, 32, 4)}, "0, 2")]
)
def test_densify_refuses_other_names(structured: dict[str, Format], known: str) -> None:
    model = apply_plan_(mlp(), structured)
    before = snapshot(model)
    message = f"expected names of structured layers, got ['1', '4']; there are: {known}"
    with pytest.raises(ValueError, match=re.escape(message)):
        densify_(model, [*structured, "1", "4"])
    assert snapshot(model) == before


class Unlucky(LowRank):
    """A format that fails when its layer is made."""

    def _random_factors(self, generator: torch.Generator | None) -> dict[str, Tensor]:
        raise MemoryError("no memory left")


def test_a_failure_in_the_middle_leaves_the_network_alone() -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(MemoryError, match="no memory left"):
        apply_plan_(model, {"0": LowRank(32, 24, 4), "2": Unlucky(32, 32, 4)})
    assert snapshot(model) == before


def test_densify_takes_tied_layers_together() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    apply_plan_(model, {"0": LowRank(16, 16, 4)})
    densify_(model, ["1"])
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]
    assert model[0].weight is model[1].weight


def test_densify_cannot_replace_the_whole_model() -> None:
    with pytest.raises(ValueError, match="layers inside the model, but it is one layer itself"):
        densify_(StructuredLinear(LowRank(8, 8, 2)))


def test_a_plan_without_formats_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a format for layer '0', got 3"):
        apply_plan_(mlp(), {"0": 3})  # pyright: ignore


def test_factors_of_layers_that_are_not_replaced_are_refused() -> None:
    with pytest.raises(ValueError, match=r"factors only of layers that the plan replaces, got some of \['2'\]"):
        apply_plan_(mlp(), {"0": LowRank(32, 24, 4)}, factors={"2": {}})


def test_hooks_are_not_lost_silently() -> None:
    model = mlp()
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layer '0' cannot be structured: it has hooks, which would be lost"):
        apply_plan_(model, {"0": LowRank(32, 24, 4)})


def test_surgery_in_inference_mode_leaves_a_network_that_can_be_trained(tmp_path: Path) -> None:
    sm.save_model(apply_plan_(mlp(), {"2": LowRank(32, 32, 4)}), tmp_path / "file")
    models = [mlp() for _ in range(3)]
    with torch.inference_mode():
        apply_plan_(models[0], {"2": LowRank(32, 32, 4)})
        densify_(apply_plan_(models[1], {"2": LowRank(32, 32, 4)}))
        sm.load_model(models[2], tmp_path / "file")
        sm.load_model(mlp(), tmp_path / "file")  # a network that was made in this mode can be filled there too
    for model in models:
        model(torch.randn(3, 24)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
