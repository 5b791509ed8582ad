"""Warnings while the structure is learned: each is there when its failure is, before it happens, and only then."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import TrainerState

import structmat as sm
from structmat.integrations.transformers.callback import StructureCallback, rates_left
from structmat.training import (
    StructureLearning,
    parameter_groups,
    structure_layers,
    structure_state,
    structure_step_,
    structure_warnings,
)
from structmat.training.diagnosis import CLIFF, energy_outside
from training import tiny


def network(keep: float = 0.5, *, size: int = 48) -> nn.Sequential:
    """Two layers at a share of the dense cost."""
    generator = torch.Generator().manual_seed(0)
    formats = [sm.GaudiGblr.for_budget(size, size, keep=keep) for _ in range(2)]
    return nn.Sequential(*(sm.StructuredLinear(format, generator=generator) for format in formats))


def widths(model: nn.Module) -> list[Tensor]:
    return [layer.get_parameter("width") for layer in structure_layers(model).values()]


def test_a_start_at_the_budget_is_fine() -> None:
    assert structure_warnings(network(0.25), StructureLearning(0.25), rates=0.0) == {}


# dead components


def test_many_dead_components_are_told() -> None:
    model = network()
    rule = StructureLearning(0.5)
    with torch.no_grad():
        widths(model)[0][0, :40] = 0
    assert structure_warnings(model, rule, 1.0) == {}  # 40 of 96
    with torch.no_grad():
        widths(model)[1][0, :9] = 0.001  # less than half an entry
    assert structure_warnings(model, rule, 1.0) == {
        "dead": "51% of the components have no block; lower the learning rate of widths and locations or the "
        "shrinkage, or begin with fewer components"
    }


def test_a_layer_without_a_block_is_named() -> None:
    model = nn.Sequential(*network(), *network(), *network())
    with torch.no_grad():
        widths(model)[3][0] = 0
    text = structure_warnings(model, StructureLearning(0.5), 1.0)["dead"]
    assert text.startswith("17% of the components have no block, and no component of 3 has one; ")
    with torch.no_grad():
        for k in (0, 1, 2):
            widths(model)[k][0] = 0
    assert (
        "no component of 0, 1, 2 and 1 others has one" in structure_warnings(model, StructureLearning(0.5), 1)["dead"]
    )


# the cliff


def shrunk(model: nn.Module, rule: StructureLearning, rates: list[float]) -> tuple[float, float]:
    """The share before and after the last phase takes off the rest, without any gradient."""
    for step, rate in enumerate(rates):
        structure_step_(model, rule, rate, (step + 1) / (len(rates) + 1) * (1 - rule.hard_share))
    before = structure_state(model).share
    structure_step_(model, rule, 0.0, 1.0)
    return before, structure_state(model).share


@given(
    target=st.floats(0.1, 0.5),
    shrinkage=st.floats(0.01, 4),
    rule=st.sampled_from(["switch", "continuous"]),
    start=st.floats(0.3, 0.9),
)
@settings(max_examples=40, deadline=None)
def test_a_cliff_is_told_before_it_happens(target: float, shrinkage: float, rule: str, start: float) -> None:
    learning = StructureLearning(target, rule=rule, shrinkage=shrinkage)
    rates = [0.01 * (1 - step / 200) for step in range(200)]
    model = network(start)
    told = "cliff" in structure_warnings(model, learning, sum(rates))
    before, after = shrunk(model, learning, rates)
    assert after <= target
    if abs(before / target - 1 - CLIFF) > 0.03:  # the prediction takes few strides
        assert told == (before > (1 + CLIFF) * target)


def test_the_shrinkage_that_a_warning_names_is_enough() -> None:
    model = network(0.8)
    text = structure_warnings(model, StructureLearning(0.3, shrinkage=0.1), rates=0.5)["cliff"]
    assert text.startswith("the layers with a budget of 0.3 are at 0.799 and expected at 0.7")
    named = float(text.split("raise shrinkage to about ")[1].split(",")[0])
    assert "cliff" in structure_warnings(model, StructureLearning(0.3, shrinkage=0.7 * named), rates=0.5)
    assert structure_warnings(model, StructureLearning(0.3, shrinkage=named), rates=0.5) == {}


def test_nothing_left_to_shrink_with_is_told_of_too() -> None:
    for rule in ("switch", "continuous"):
        text = structure_warnings(network(0.8), StructureLearning(0.3, rule=rule), rates=0.0)["cliff"]
        assert "are at 0.799 and expected at 0.799" in text
        assert "; raise shrinkage, raise" in text


def test_the_shrink_rule_has_no_cliff() -> None:
    assert structure_warnings(network(0.8), StructureLearning(0.3, rule="shrink"), rates=0.0) == {}


def test_the_group_over_its_budget_is_told() -> None:
    rule = StructureLearning({"0": 0.9, "1": 0.2}, shrinkage=0.01)
    text = structure_warnings(network(0.8), rule, rates=0.1)["cliff"]
    assert text.startswith("the layers with a budget of 0.2 are at 0.799")


# masks beyond their segments


@given(
    n=st.integers(1, 200),
    width=st.floats(-0.2, 1.2),
    location=st.floats(-2, 2),
    sigma=st.one_of(st.floats(0.05, 1e4), st.just(math.inf)),
)
@settings(max_examples=300, deadline=None)
def test_masks_of_a_layer_do_not_spike(n: int, width: float, location: float, sigma: float) -> None:
    """Off the grid they would, by up to 28 %; widths and locations are rounded to it."""
    format = sm.GaudiGblr(n, n, 1)
    factors = {
        "location": torch.full((2, 1), location), "width": torch.full((2, 1), width), "sigma": torch.tensor([sigma])
    }  # fmt: skip
    mask = format.masks(factors)[0]
    assert float(mask.min()) > -0.06
    assert float(mask.max()) < 1.06


def test_energy_outside_by_hand() -> None:
    format = sm.GaudiGblr(64, 96, 8, initial_width=0.25)
    factors = {
        name: factor.double() for name, factor in format.init(generator=torch.Generator().manual_seed(0)).items()
    }
    factors["sigma"] = torch.tensor([6.0], dtype=torch.float64)
    smooth = format.masks(factors)
    sharp = format.masks({**factors, "sigma": torch.tensor([math.inf], dtype=torch.float64)})
    whole, inside = (smooth[0][3][:, None] * smooth[1][3]).square(), (sharp[0][3][:, None] * sharp[1][3]) > 0.5
    entries = format.rounded_widths(factors["width"])
    expected = float(whole[~inside].sum() / whole.sum())
    assert expected > 0.02
    assert energy_outside(format.shape, entries, 6.0) == pytest.approx(expected, rel=1e-6)
    assert energy_outside(format.shape, entries, math.inf) == pytest.approx(0, abs=1e-12)
    assert energy_outside(format.shape, torch.zeros_like(entries), 6.0) == 0


def test_a_smoothing_that_ends_too_low_is_told() -> None:
    model = network(0.2)
    found = structure_warnings(model, StructureLearning(0.2, sigma=(1.0, 5.0)), rates=1.0)
    assert list(found) == ["smeared"]
    assert found["smeared"].startswith("masks of the present widths have ")
    assert "in 0 where the smoothing ends, at sigma 5," in found["smeared"]
    assert structure_warnings(model, StructureLearning(0.2, sigma=(1.0, 100.0)), rates=1.0) == {}
    assert structure_warnings(model, StructureLearning(0.2, sigma=None), rates=1.0) == {}


def test_what_is_told_of_smearing_is_lost() -> None:
    """Hardening where the smoothing ends changes the matrices by as much."""
    gaps = {}
    for last in (5.0, 100.0):
        model = network(0.2)
        structure_step_(model, StructureLearning(0.2, sigma=(last, last), hard_share=0), 0.0, 0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gaps[last] = max(sm.harden_(model).values())
    assert gaps[5.0] > 0.3
    assert gaps[100.0] < 0.05


# at the edge


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a sum of learning rates of at least 0, got -1"):
        structure_warnings(network(), StructureLearning(0.5), -1)
    with pytest.raises(ValueError, match="expected a network with Gaudi-GBLR layers, got none"):
        structure_warnings(nn.Linear(3, 3), StructureLearning(0.5), 0.0)


# within a trainer


def told(folder: Path, **options: Any) -> list[str]:
    """The warnings of a run whose structure begins at 0.9 of the dense cost."""
    usual = {"structure_target": 0.85, "structure_learning_rate": 1e-2, "max_steps": 6, "structure_shrinkage": 4.0}
    run = tiny.trainer("causal-lm", tiny.arguments(folder, **{**usual, **options}), model=tiny.learning_llama())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.train()
    return [str(warning.message) for warning in caught if "phase begins" in str(warning.message)]


def test_the_trainer_warns_once_and_only_of_what_is_ahead(tmp_path: Path) -> None:
    assert told(tmp_path) == []
    (text,) = told(tmp_path, structure_target=0.4, structure_shrinkage=0.04)
    assert text.startswith("the layers with a budget of 0.4 are at 0.899 and expected at 0.89")
    (text,) = told(tmp_path, structure_sigma_end=2.0)
    assert "energy outside their segments" in text


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_the_trainer_knows_the_rates_to_come(tmp_path: Path, schedule: str) -> None:
    """The shrinkage that is enough for what is left of the schedule is not warned of, that for 0.6 of it is."""
    options = {"structure_target": 0.6, "structure_sigma_start": math.inf, "structure_learning_rate": 1e-3,
               "lr_scheduler_type": schedule, "max_steps": 10}  # fmt: skip
    sums = {"constant": 8.0, "linear": 5.2, "cosine": 5.38, "inverse_sqrt": 8.0}
    enough = 0.18 / (1e-3 * sums[schedule])
    assert told(tmp_path, structure_shrinkage=enough, **options) == []
    assert len(told(tmp_path, structure_shrinkage=0.6 * enough, **options)) == 1


@pytest.mark.parametrize(("step", "steps"), [(0, 40), (30, 40), (36, 40), (0, 2000), (700, 2000)])
def test_the_rates_to_come_are_summed_until_the_last_phase(step: int, steps: int) -> None:
    """Those of the steps of which it is the progress after them that counts; where they are many, by samples."""
    learning = StructureLearning(0.5)
    groups = parameter_groups(network(), 1e-2, 0.0, structure_learning_rate=2e-3)
    optimizer = torch.optim.AdamW(groups)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / steps)
    state = TrainerState(global_step=step, max_steps=steps)
    left = [done for done in range(step, steps) if (done + 1) / steps < 0.9]
    expected = sum(2e-3 * (1 - done / steps) for done in left)
    found = rates_left(learning, state, optimizer.param_groups, falling)
    assert found == pytest.approx(expected, rel=1e-9 if steps == 40 else 0.02)
    optimizer.param_groups[-1]["lr"] = 1e-5  # a schedule that cannot be asked: no less than is left
    other = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert rates_left(learning, state, optimizer.param_groups, other) == pytest.approx(2e-3 * len(left), rel=0.02)


def test_the_history_ends_in_the_state_of_the_trainer(tmp_path: Path) -> None:
    arguments = tiny.arguments(tmp_path, structure_target=0.85, structure_shrinkage=4.0, structure_learning_rate=1e-2)
    run = tiny.trainer("causal-lm", arguments, model=tiny.learning_llama())
    run.train()
    saved: Any = run.state.stateful_callbacks[StructureCallback.__name__]
    assert [entry["step"] for entry in saved["attributes"]["history"]] == [1, 2, 3, 4]
