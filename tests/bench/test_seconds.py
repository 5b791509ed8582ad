"""Seconds as the unit of a budget."""

import pytest
import torch
from torch import nn

import structmat as sm
from structmat.bench import Seconds
from structmat.formats import Dense


def test_a_format_of_less_work_takes_less_time() -> None:
    seconds = Seconds(tokens=[256], rounds=5)
    small, large = seconds(sm.LowRank(1024, 1024, rank=16)), seconds(sm.LowRank(1024, 1024, rank=512))
    assert 0 < small < large
    assert small < seconds(Dense(1024, 1024))


def test_each_format_is_measured_once_and_numbers_of_tokens_add_up() -> None:
    seconds = Seconds(tokens=[1, 64], rounds=1)
    format = sm.Blast(64, 64, blocks=(4, 4), rank=8)
    first = seconds(format)
    assert seconds(format) == first
    assert seconds(sm.Blast(64, 64, blocks=(4, 4), rank=8)) == first
    dense = seconds(Dense(64, 64))
    assert dense == seconds(Dense(64, 64))
    assert dense == pytest.approx(sum(seconds._dense[64, 64]))


def test_an_allocation_takes_it_as_its_unit() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    seconds = Seconds(tokens=[64], rounds=3)
    data = [torch.randn(256, 512) for _ in range(4)]
    plan = sm.allocate(model, data, keep=0.7, structures="low_rank", unit=seconds, progress=False)
    assert sum(map(seconds, plan.values())) <= 0.7 * 2 * seconds(Dense(512, 512)) * (1 + 1e-9)
    assert plan.unit == "seconds"
    assert any(format.replaces for format in plan.values())
    assert "seconds kept" in plan.why()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one number of tokens"):
        Seconds(tokens=[])
    with pytest.raises(ValueError, match="tokens"):
        Seconds(tokens=[0])
