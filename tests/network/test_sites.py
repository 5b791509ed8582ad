"""Which layers cannot be structured, and the reason that is given."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from structmat import LowRank, make_plan
from structmat.network.sites import find_sites


def replaced_forward(layer: nn.Linear) -> None:
    original = layer.forward
    layer.forward = lambda x: 3 * original(x)  # pyright: ignore


def hooked_by_accelerate(layer: nn.Linear) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(layer, hooks.ModelHook())


def extra_buffer(layer: nn.Linear) -> None:
    layer.register_buffer("scale", torch.ones(1))


def extra_parameter(layer: nn.Linear) -> None:
    layer.gain = nn.Parameter(torch.ones(1))


def extra_module(layer: nn.Linear) -> None:
    layer.norm = nn.LayerNorm(16)


def gradient_hook(layer: nn.Linear) -> None:
    layer.weight.register_hook(lambda grad: 0 * grad)


def late_gradient_hook(layer: nn.Linear) -> None:
    layer.weight.register_post_accumulate_grad_hook(lambda parameter: None)


def state_hook(layer: nn.Linear) -> None:
    layer.register_state_dict_post_hook(lambda *_: None)


def load_hook(layer: nn.Linear) -> None:
    layer.register_load_state_dict_post_hook(lambda *_: None)


def eight_bits(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)


def sparse(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.data.to_sparse(), requires_grad=False)


def integers(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replaced_forward, "its forward was replaced"),
        (hooked_by_accelerate, "its forward was replaced"),
        (extra_buffer, "it holds 'scale' too, which would be lost"),
        (extra_parameter, "it holds 'gain' too, which would be lost"),
        (extra_module, "it holds 'norm' too, which would be lost"),
        (gradient_hook, "its weight has gradient hooks, which would be lost"),
        (late_gradient_hook, "its weight has gradient hooks, which would be lost"),
        (state_hook, "it has hooks, which would be lost"),
        (load_hook, "it has hooks, which would be lost"),
        (eight_bits, "its weight is no plain matrix of floating-point numbers but float8_e4m3fn"),
        (integers, "its weight is no plain matrix of floating-point numbers but int8"),
        (sparse, "its weight is no plain matrix of floating-point numbers but torch.sparse_coo"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.filterwarnings("ignore:.*[sS]parse")
def test_what_would_be_lost_is_a_reason(change: Callable[[nn.Linear], None], reason: str) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    change(model[0])
    problem = find_sites(model)["0"].problem
    assert problem is not None
    assert reason in problem
    plan = make_plan(model, {nn.Linear: LowRank}, keep=0.5, misfits="skip")
    assert list(plan) == ["2"]
    assert reason in plan.skipped["0"]
    with pytest.raises(ValueError, match=re.escape(reason)):
        make_plan(model, {nn.Linear: LowRank}, keep=0.5)


def test_a_plain_layer_has_no_problem() -> None:
    model = nn.Sequential(*[nn.Linear(16, 16, dtype=d) for d in (torch.float16, torch.bfloat16, torch.float64)])
    assert [site.problem for site in find_sites(model).values()] == [None] * 3


# Selectors


def test_a_name_is_a_selector_whatever_its_letters() -> None:
    model = nn.ModuleDict({"a+b": nn.Linear(16, 16), "c(d": nn.Linear(16, 16)})
    assert list(make_plan(model, {"a+b": LowRank})) == ["a+b"]
    assert list(make_plan(model, {"c(d": LowRank})) == ["c(d"]
    with pytest.raises(ValueError, match=r"'c\(' to pick .*, but it picks none \(it is no regular expression: missing"):
        make_plan(model, {"c(": LowRank})


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"embed": nn.Embedding(20, 16), "up": nn.Linear(16, 16)})
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.model["embed"].weight


def test_a_selector_does_not_pick_a_layer_by_the_name_of_its_embedding() -> None:
    model = TiedHead()
    assert list(make_plan(model, {r"model\..*": LowRank})) == ["model.up"]
    with pytest.raises(ValueError, match=r"its weight is shared with 'model\.embed'"):
        make_plan(model, {"head": LowRank})
