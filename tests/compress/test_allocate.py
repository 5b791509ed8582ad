"""One budget for the whole network: who gets what, by what it does to the network's output."""

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from small_networks import Stack, mlp, padding, sequences, snapshot
from structmat import LowRank, Plan, Rule, allocate, compress_, make_plan
from structmat.compress import gradients
from structmat.compress.candidates import Candidate
from structmat.compress.curves import interpolated
from structmat.compress.effects import OutputEffect
from structmat.compress.gradients import gradient_moments
from structmat.compress.search import Search
from structmat.compress.store import FitStore
from structmat.fit import Dao2022Monarch
from structmat.formats import Dense
from structmat.network.sites import find_sites


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def allocated(model: nn.Module, batches: Any = None, **options: Any) -> Any:
    """A quick allocation of low-rank matrices."""
    defaults: dict[str, Any] = {"structures": "low_rank", "effort": "quick", "progress": False}
    return allocate(model, sequences(4) if batches is None else batches, **defaults | options)


def share(plan: Plan, unit: str = "parameters") -> float:
    costs = [f.num_parameters() if unit == "parameters" else f.multiplications() for f in plan.values()]
    return sum(costs) / sum(f.M * f.N for f in plan.values())


# The budget


@pytest.mark.parametrize("keep", [0.4, 0.5, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("unit", ["parameters", "multiplications"])
def test_the_budget_holds_and_is_used(keep: float, unit: str) -> None:
    plan = allocated(Stack(depth=2), keep=keep, unit=unit)
    assert keep - 0.12 < share(plan, unit) <= keep
    assert plan.kept == pytest.approx(share(plan, unit))
    assert len(plan) == 2 * 6  # the layers of the blocks


def test_a_unit_of_ones_own() -> None:
    plan = allocated(Stack(depth=2), keep=0.6, unit=lambda format: format.M * (0.1 if format.replaces else 1.0))
    assert sum(f.M * (0.1 if f.replaces else 1.0) for f in plan.values()) <= 0.6 * sum(f.M for f in plan.values())
    assert plan.unit == "cost"


def test_a_budget_for_the_whole_model() -> None:
    model = Stack(depth=2)
    plan = allocated(model, keep=0.8, whole=True)
    compress_(model, plan, progress=False)
    total = sum(p.numel() for p in Stack(depth=2).parameters())
    assert 0.7 * total < sum(p.numel() for p in model.parameters()) <= 0.8 * total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.01}, "expected a budget of at least"),
        ({"keep": 0.1, "whole": True}, "raise keep"),
        ({"whole": True, "unit": "multiplications"}, "expected the unit 'parameters'"),
        ({"unit": "seconds"}, "expected unit"),
        ({"effort": "much"}, "expected effort"),
        ({"effect": "loss"}, "expected effect"),
        ({"batches": []}, "expected at least one batch"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        allocated(Stack(depth=2), **options)


def test_layers_may_be_selected_and_excluded() -> None:
    model = mlp()
    assert list(allocated(model, [randn(64, 24)], keep=0.6)) == ["0", "2", "4"]
    assert list(allocated(model, [randn(64, 24)], keep=0.6, exclude="0")) == ["2", "4"]
    assert list(allocated(model, [randn(64, 24)], keep=0.6, layers=["0", "4"])) == ["0", "4"]


# Who gets what


class Weighed(nn.Module):
    """Two layers side by side, of which the second counts for more in the output, or not at all."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.weight = nn.Linear(32, 32), nn.Linear(32, 32), weight

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.weight * self.b(x)


@pytest.mark.parametrize("weight", [0.0, 0.05, 20.0])
def test_layers_that_matter_more_get_more(weight: float) -> None:
    plan = allocated(Weighed(weight), [randn(64, 32, seed=k) for k in range(4)], keep=0.65, effect="error")
    a, b = plan.choices["a"], plan.choices["b"]
    assert (a.kept > b.kept) == (weight < 1)
    assert (a.sensitivity > b.sensitivity) == (weight < 1)
    if weight == 0:
        assert b.sensitivity == b.predicted == 0
        assert isinstance(plan["a"], Dense)


def test_the_choice_is_near_the_best_of_all() -> None:
    """Against every combination: no better than the best, and no worse than the best with one size less to spend."""
    g = torch.Generator().manual_seed(0)
    library: dict[str, list[Candidate]] = {}
    for k in range(4):
        scale = float(torch.rand(1, generator=g)) + 0.1
        sizes = [Candidate(LowRank(10, 10, r), 20.0 * r, scale * 2.0**-r) for r in range(1, 5)]
        library[f"{k}"] = [*sizes, Candidate(Dense(10, 10), 100.0, 0.0)]
    for budget in (100, 180, 220, 300):
        search = Search(library, budget, dict.fromkeys(library, 1.0))
        picks = search.best()

        def loss(chosen: tuple[int, ...]) -> float:
            return sum(options[k].error for options, k in zip(library.values(), chosen, strict=True))

        def least(most: float) -> float:
            every = itertools.product(range(5), repeat=4)
            return min(
                loss(one)
                for one in every
                if sum(options[k].cost for options, k in zip(library.values(), one, strict=True)) <= most
            )

        assert search.cost(picks) <= budget
        assert least(budget) - 1e-12 <= loss(tuple(picks.values())) <= least(budget - 20) + 1e-12


def redundant() -> Stack:
    """A network whose layers differ in how fast their spectrum falls."""
    torch.manual_seed(0)
    model = Stack(depth=3)
    with torch.no_grad():
        for k, layer in enumerate(m for m in model.modules() if type(m) is nn.Linear):
            U, S, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_(3 * U * S.max() * torch.arange(1, len(S) + 1).pow(-0.3 - 0.25 * (k % 4)) @ Vh)
    return model.eval()


@torch.no_grad()
def test_it_is_better_than_a_uniform_keep_on_data_that_it_did_not_see() -> None:
    dense, batches, fresh = redundant(), sequences(20), torch.cat(sequences(5, seed=9))
    errors = {}
    for name in ("uniform", "allocated"):
        model = copy.deepcopy(dense)
        plan = (
            allocated(model, batches, keep=0.5, effort="default")
            if name == "allocated"
            else make_plan(model, {r"blocks\..*": LowRank}, keep=0.5)
        )
        compress_(model, plan, batches=batches, progress=False)
        errors[name] = float((model(fresh) - dense(fresh)).norm() / dense(fresh).norm())
    assert errors["allocated"] < 0.95 * errors["uniform"]


def test_predictions_are_near_what_a_layer_alone_does() -> None:
    """The effect of one low-rank layer in a network that is dense elsewhere, measured at the output."""
    model, batches = redundant(), sequences(40)
    plan = allocated(model, batches, keep=0.5)
    ratios = []
    for name, choice in plan.choices.items():
        if not plan[name].replaces:
            continue
        other = copy.deepcopy(model)
        effect = OutputEffect(other, sequences(10, seed=9), "error")
        one = Plan({name: plan[name]})
        compress_(other, one, batches=batches, two_sided=True, progress=False)
        ratios.append(effect.measure() / choice.predicted)
    assert len(ratios) > 5
    ratios.sort()
    assert 0.5 < ratios[len(ratios) // 2] < 2
    assert ratios[1] > 0.2
    assert ratios[-2] < 5


def test_two_sided_fits_harm_the_output_less() -> None:
    """Where directions of a layer's output matter unequally, fits that know it leave the network's output nearer."""
    torch.manual_seed(0)
    scales = torch.logspace(0, -2, 32)
    model = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 32)).eval()
    with torch.no_grad():
        model[1].weight.mul_(scales)
    batches = [randn(64, 24, seed=k) for k in range(8)]
    effects = []
    for two_sided in (False, True):
        other = copy.deepcopy(model)
        effect = OutputEffect(other, batches, "error")
        fits = compress_(other, {"0": LowRank(32, 24, 4)}, batches=batches, two_sided=two_sided, progress=False)
        effects.append(effect.measure())
        assert fits["0"].loss_error is not None
        assert (fits["0"].loss_error == fits["0"].output_error) != two_sided
    assert effects[1] < 0.8 * effects[0]


def test_a_plan_that_was_allocated_gets_the_errors_it_was_made_for(tmp_path: Path) -> None:
    model, batches = mlp().eval(), [randn(64, 24, seed=k) for k in range(5)]
    plan = allocated(model, batches, keep=0.6)
    plan.save(tmp_path / "plan.json")
    found: dict[str, dict[str, Tensor]] = {}
    for name, given, how in (
        ("default", plan, None),
        ("from a file", Plan.load(tmp_path / "plan.json"), None),
        ("two-sided", plan, True),
        ("one-sided", plan, False),
        ("plain plan", Plan(dict(plan)), None),
    ):
        other = copy.deepcopy(model)
        compress_(other, given, batches=batches, two_sided=how, progress=False)
        found[name] = other.state_dict()
    for one, same in (("default", "two-sided"), ("from a file", "two-sided"), ("one-sided", "plain plan")):
        assert all(torch.equal(found[one][name], tensor) for name, tensor in found[same].items())
    assert any(not torch.equal(found["default"][name], tensor) for name, tensor in found["one-sided"].items())
    compress_(copy.deepcopy(model), plan, progress=False)  # without data there is nothing to weigh


def test_two_sided_needs_data() -> None:
    with pytest.raises(ValueError, match="expected batches to be two-sided on"):
        compress_(mlp(), {}, two_sided=True)


# Gradients


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_gradient_moments_of_an_error_by_their_definition(kind: str) -> None:
    """For a relative squared error, moments times vectors are ``2 T J^T J / energy``; few norms are clipped."""
    torch.manual_seed(0)
    if kind == "linear":
        model: nn.Module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 40, bias=False)).eval()
        batches = [randn(400, 6, seed=k) for k in range(8)]
    else:
        model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 40, 1, bias=False)).eval()
        batches = [randn(4, 3, 10, 10, seed=k) for k in range(8)]
    found = gradient_moments(model, batches, {"0": find_sites(model)["0"]}, effect="error", progress=False)
    J = dict(model.named_modules())["1"].weight.detach().flatten(1)  # pyright: ignore
    with torch.no_grad():
        outputs = torch.cat([model(x) for x in batches])
    count = len(outputs) * (100 if kind == "convolution" else 1)
    expected = 2 * count * (J.mT @ J).double() / float(outputs.square().sum())
    G = found.vectors["0"] * found.moments["0"].double()
    G = G - torch.eye(5) * G.diagonal().mean() * 0.1 / 1.1
    assert float((G - expected).norm() / expected.norm()) < 0.15


def test_gradient_moments_leave_the_network_as_before() -> None:
    model = Stack(depth=1)
    model.blocks[0].up.weight.requires_grad_(False)
    before, values = snapshot(model), copy.deepcopy(model.state_dict())
    sites = {name: site for name, site in find_sites(model).items() if name.startswith("blocks")}
    one, other = (gradient_moments(model, sequences(2), sites, progress=False) for _ in range(2))
    assert set(one.moments) == set(sites)
    assert all(torch.equal(one.moments[name], other.moments[name]) for name in sites)
    assert snapshot(model)["modules"] == before["modules"]
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert not model.blocks[0].up.weight.requires_grad
    assert model.blocks[0].down.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_more_layers_serve_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, store = Stack(depth=2), FitStore(tmp_path)
    sites = {name: site for name, site in find_sites(model).items() if name.startswith("blocks")}
    some = dict(list(sites.items())[1:3])
    few = gradient_moments(model, sequences(2), some, store=store, progress=False)
    every = gradient_moments(model, sequences(2), sites, store=store, progress=False)
    assert set(every.moments) == set(sites)
    monkeypatch.setattr(gradients, "_gathered", None)  # no more data flows
    again = gradient_moments(model, sequences(2), some, store=store, progress=False)
    assert again.vectors == few.vectors
    assert set(again.moments) == set(some)
    assert all(torch.equal(few.moments[name], again.moments[name]) for name in some)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.45, 0.8, 0.95])
def test_curves_are_lines_of_logarithms(share: float) -> None:
    curve = [(0.3, 1e-1), (0.5, 1e-2), (0.9, 1e-6)]
    slope = -5 if share <= 0.5 else -10
    assert interpolated(curve, share) == pytest.approx(10 ** (-2 + slope * (share - 0.5)), rel=1e-6)
    assert interpolated(curve[1:2], share) == pytest.approx(1e-2)


def test_another_kind_is_sized_by_the_layer_that_stands_for_it() -> None:
    """With the effort ``best`` each layer has fits of its own; by default the middle one of its kind stands for it."""
    model, batches = redundant(), sequences(10)
    plans = [
        allocated(model, batches, keep=0.5, structures=Rule("monarch", blocks=2), effort=effort)
        for effort in ("default", "best")
    ]
    pairs = [
        (a[2], b[2])
        for name in plans[0].choices
        for a, b in zip(plans[0].choices[name].considered, plans[1].choices[name].considered, strict=False)
        if a[2] and b[2] and a[0] == b[0]
    ]
    ratios = sorted(a / b for a, b in pairs)
    assert 0.5 < ratios[len(ratios) // 2] < 2


# How it is done


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_model_is_as_before(interrupted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack(depth=2)
    before, values = snapshot(model), copy.deepcopy(model.state_dict())
    if interrupted:
        calls = iter(range(100))

        def vectors(self: OutputEffect, batch: Any, returned: Any, i: int) -> list[Tensor]:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return [returned]

        monkeypatch.setattr(OutputEffect, "vectors", vectors)
        with pytest.raises(KeyboardInterrupt):
            allocated(model, keep=0.6)
    else:
        allocated(model, keep=0.6)
    assert snapshot(model)["modules"] == before["modules"]
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_the_same_call_gives_the_same_plan() -> None:
    one, other = (allocated(Stack(depth=2), keep=0.6, effort="default", seed=3) for _ in range(2))
    assert one.layers.keys() == other.layers.keys()
    torch.manual_seed(1)
    model = Stack(depth=2)
    assert allocated(model, keep=0.6, effort="default") == allocated(model, keep=0.6, effort="default")


@dataclass(frozen=True)
class Counting(Dao2022Monarch):
    """Notes how many weights it fits."""

    fitted: ClassVar[list[int]] = []

    def fit_many(self, weights: Any, *args: Any, **kwargs: Any) -> Any:
        self.fitted.append(len(weights))
        return super().fit_many(weights, *args, **kwargs)


def test_another_budget_takes_its_fits_from_the_cache(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Stack(depth=2)
    Counting.fitted.clear()
    monarch = Rule("monarch", blocks=2)
    allocated(model, keep=0.6, structures=monarch, method=Counting(), cache=tmp_path)
    assert Counting.fitted
    Counting.fitted.clear()
    plan = allocated(model, keep=0.4, structures=monarch, method=Counting(), cache=tmp_path)
    assert Counting.fitted == []
    assert share(plan) <= 0.4


def test_biases_and_padding_are_heeded() -> None:
    batches = [{"x": x, "attention_mask": padding()} for x in sequences(4)]
    plan = allocated(Stack(depth=2), batches, keep=0.6)
    noisy = [{"x": x.where(padding()[..., None].bool(), 7.0), "attention_mask": padding()} for x in sequences(4)]
    torch.manual_seed(5)
    model = Stack(depth=2)
    assert allocated(model, batches, keep=0.6).layers == allocated(model, noisy, keep=0.6).layers
    assert share(plan) <= 0.6


def test_it_explains_itself_and_is_an_ordinary_plan(tmp_path: Path) -> None:
    model = Stack(depth=2)
    plan = allocated(model, keep=0.6, structures=["low_rank", Rule("monarch", blocks=2)])
    text = plan.why()
    assert all(name in text for name in plan)
    assert "predicted relative squared error" in text
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").layers == plan.layers
    assert {type(f).__name__ for f in plan.values()} <= {"LowRank", "Monarch", "Dense"}
    for choice in plan.choices.values():
        shares = [kept for _, kept, _ in choice.considered]
        assert shares == sorted(shares)
        assert choice.considered[-1][1:] == (1.0, 0.0)
    fits = compress_(model, plan, batches=sequences(4), two_sided=True, progress=False)
    table = plan.why(fits)
    assert "measured" in table.splitlines()[0]
    assert plan.measured(fits) == pytest.approx(
        sum(plan.choices[name].sensitivity * (fit.loss_error or 0) ** 2 for name, fit in fits.items())
    )


# Effects


class Logits(nn.Module):
    """A network that returns logits as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 5)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.layer(x)}


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_the_divergence_of_logits_by_its_definition(masked: bool) -> None:
    model, x, mask = Logits().eval(), sequences(1)[0], padding()
    effect = OutputEffect(model, [{"x": x, "attention_mask": mask} if masked else {"x": x}])
    assert effect.name == "KL divergence"
    assert effect.measure() == pytest.approx(0, abs=1e-7)
    p = F.softmax(model.layer(x).double(), -1)
    model.layer.weight.mul_(1.3)
    divergence = (p * (p / F.softmax(model.layer(x).double(), -1)).log()).sum(-1)
    expected = divergence[mask.bool()].mean() if masked else divergence.mean()
    assert effect.measure() == pytest.approx(float(expected), rel=1e-4)


@torch.no_grad()
def test_the_error_of_outputs_and_a_loss_of_ones_own() -> None:
    model, batches = nn.Sequential(nn.Linear(12, 8)).eval(), sequences(3)
    effect = OutputEffect(model, batches)
    loss = OutputEffect(model, batches, lambda batch, output: output.square().mean() + batch.sum())
    assert (effect.name, loss.name) == ("relative squared error", "loss")
    before = torch.cat(batches) @ model[0].weight.T + model[0].bias
    old = torch.stack([model(x).square().mean() for x in batches])
    model[0].weight.mul_(0.9)
    after = torch.cat(batches) @ model[0].weight.T + model[0].bias
    assert effect.measure() == pytest.approx(float((after - before).square().sum() / before.square().sum()), rel=1e-4)
    new = torch.stack([model(x).square().mean() for x in batches])
    assert loss.measure() == pytest.approx(float((new - old).mean()), rel=1e-4, abs=1e-6)
