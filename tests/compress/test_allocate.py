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
from structmat.compress.candidates import Candidate
from structmat.compress.effects import OutputEffect, dense_weights
from structmat.compress.search import Search
from structmat.fit import TruncatedSvd
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
        ({"keep": 0.3, "whole": True}, "raise keep"),
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


def test_the_choice_is_near_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every combination: no better than the best, and no worse than the best with one size less to spend."""
    g = torch.Generator().manual_seed(0)
    library: dict[str, list[Candidate]] = {}
    for k in range(4):
        scale = float(torch.rand(1, generator=g)) + 0.1
        sizes = [Candidate(LowRank(10, 10, r), 20.0 * r, scale * 2.0**-r) for r in range(1, 5)]
        library[f"{k}"] = [*sizes, Candidate(Dense(10, 10), 100.0, 0.0)]
    model = nn.Sequential(*(nn.Linear(10, 10) for _ in range(4)))
    for budget in (100, 180, 220, 300):
        search = Search(model, [randn(8, 10)], library, budget, "error")
        search.sensitivity = dict.fromkeys(library, 1.0)
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


def test_exchanges_never_make_the_joint_effect_worse() -> None:
    model, batches = redundant(), sequences(6)
    effects = [allocated(model, batches, keep=0.5, effort=effort).measured for effort in ("default", "best")]
    assert effects[1] <= effects[0] * 1.02
    with_none = allocated(model, batches, keep=0.5, effort="quick")
    assert with_none.measured > 0


# How it is done


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_model_is_as_before(interrupted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack(depth=2)
    before, values = snapshot(model), copy.deepcopy(model.state_dict())
    if interrupted:
        calls = iter(range(100))

        def measure(self: OutputEffect) -> float:
            if next(calls) == 5:
                raise KeyboardInterrupt
            return 1.0

        monkeypatch.setattr(OutputEffect, "measure", measure)
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
class Counting(TruncatedSvd):
    """Notes how many weights it fits."""

    fitted: ClassVar[list[int]] = []

    def fit_many(self, weights: Any, *args: Any, **kwargs: Any) -> Any:
        self.fitted.append(len(weights))
        return super().fit_many(weights, *args, **kwargs)


def test_another_budget_takes_its_fits_from_the_cache(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Stack(depth=2)
    Counting.fitted.clear()
    allocated(model, keep=0.6, method=Counting(), cache=tmp_path)
    assert Counting.fitted
    Counting.fitted.clear()
    plan = allocated(model, keep=0.4, method=Counting(), cache=tmp_path)
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
    assert "measured with all layers together: relative squared error" in text
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").layers == plan.layers
    assert {type(f).__name__ for f in plan.values()} <= {"LowRank", "Monarch", "Dense"}
    for choice in plan.choices.values():
        shares = [kept for _, kept, _ in choice.considered]
        assert shares == sorted(shares)
        assert choice.considered[-1][1:] == (1.0, 0.0)
    compress_(model, plan, batches=sequences(4), progress=False)


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


def test_dense_weights_come_back() -> None:
    model = Stack(depth=1)
    sites, before = find_sites(model), copy.deepcopy(model.state_dict())

    def overwrite() -> None:
        with dense_weights(sites) as put:
            put("blocks.0.up", torch.zeros(48, 24), torch.ones(48))
            up = model.blocks[0].up
            assert up.weight.eq(0).all()
            assert up.bias.eq(1).all()
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        overwrite()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
