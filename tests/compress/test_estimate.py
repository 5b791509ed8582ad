"""How long a compression is expected to take."""

import time
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from structmat import Blast, Dense, LowRank, allocate, compress_
from structmat.compress.estimate import DataSize, Estimate, duration, estimate, fit_seconds, product_seconds
from structmat.compress.flow import Flow, Read, measure_flow, unit_count
from structmat.fit import GradientFit, Lee2024Blast, TruncatedSvd

SMALL = Blast.for_budget(64, 64, keep=0.6, blocks=4)


def test_layers_alike_take_as_many_times_as_long() -> None:
    one = estimate({"0": SMALL})
    ten = estimate({str(k): SMALL for k in range(10)})
    assert one.passes == ten.passes == 0
    assert one.fits < ten.fits < 100 * one.fits
    assert estimate({"0": Dense(64, 64)}).seconds == 0


def test_data_takes_time() -> None:
    plan = {"0": LowRank(64, 64, 8)}
    few, many = (estimate(plan, data=DataSize(tokens)) for tokens in (1000, 1_000_000))
    assert many.passes > 50 * few.passes > 0
    refined = estimate(plan, data=DataSize(1_000_000), refined=40.0)
    assert refined.passes > 2 * many.passes


@pytest.mark.slow
@pytest.mark.parametrize("aware", [False, True])
def test_few_repetitions_tell_the_time_of_all(aware: bool) -> None:
    method = Lee2024Blast(sweeps=30, metric_iterations=20)
    expected = fit_seconds(method, SMALL, aware=aware, device="cpu")
    start = time.perf_counter()
    method(torch.randn(64, 64), SMALL, second_moment=torch.eye(64) + 0.5 if aware else None)
    took = time.perf_counter() - start
    assert took / 8 < expected < 8 * took  # the machine may be busy with other things


@pytest.mark.slow
def test_large_layers_are_measured_smaller() -> None:
    large = Blast.for_budget(16384, 16384, keep=0.5, blocks=16)
    start = time.perf_counter()
    seconds = fit_seconds(Lee2024Blast(), large, aware=False, device="cpu")
    assert seconds > 60
    assert time.perf_counter() - start < seconds / 2


@pytest.mark.parametrize(("format", "method"), [(LowRank(32, 48, 4), TruncatedSvd()), (SMALL, GradientFit(steps=2))])
def test_every_kind_of_method(format: LowRank | Blast, method: TruncatedSvd | GradientFit) -> None:
    assert 0 < fit_seconds(method, format, aware=False, device="cpu") < 30
    assert 0 < product_seconds(format, "cpu") < 1e-6


def test_the_flow_tells_the_time_of_the_passes() -> None:
    plan = {f"b.{k}.up": LowRank(64, 64, 8) for k in range(2)}
    flow = Flow(2.0, 1.0, ("b.0", "b.1"), (Read(0.5, 1.0, (0.25, 0.75), ("up",)),))
    found = estimate(plan, data=DataSize(80, 100, flow, held_out=10, batches=5))
    # the first block: dense, a moment, and compressed but for a part that is known; the second one: dense, up to
    # the layer, a moment, and compressed like the first
    assert found.passes == pytest.approx(100 * ((2 + 0.25 + 1.5) + (2 + 0.5 * 2 + 0.75 + 1.5)) + 5 * (2 * 10 + 2 * 20))
    assert found.sharing == 0


def test_sharing_the_budget_takes_time() -> None:
    plan = {f"b.{k}.up": SMALL for k in range(2)}
    flow = Flow(2e-3, 1e-3, ("b.0", "b.1"), (Read(0.5, 1.0, (1e-4, 3e-4), ("up",)),))
    alone = estimate(plan, data=DataSize(4096, 4096, flow))
    shared = estimate(plan, data=DataSize(4096, 4096, flow), shared=True)
    # gradients take 2.5 passes through the whole network and moments one, on all tokens since there are few
    gathered = 4096 * (2.5 * 5e-3 + 5e-3 + 2 * 1e-4)
    assert alone.sharing == 0
    assert gathered < shared.sharing < gathered + 60
    assert shared.passes == alone.passes
    assert Estimate(1.0, 2.0, 4.0, 8.0).seconds == 15


def test_an_allocation_takes_whole_batches() -> None:
    data = DataSize(tokens=12000, units=15000, batches=3)
    assert data.about(4000) == 5000
    assert data.about(4001) == data.about(8000) == 10000
    assert data.about(10**6) == 15000


@dataclass(frozen=True)
class Descending(Lee2024Blast):
    """A fit that takes 2 s, 3 s for each sweep, and 5 s for each iteration, if there are enough sweeps before those."""

    def seconds(self) -> float:
        return 2.0 + 3 * self.sweeps + 5 * self.metric_iterations * (self.sweeps >= 4)


def test_a_descent_is_timed_behind_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A descent from factors that fit nothing ends at once, so that its time would be taken for nothing."""
    timed: list[float] = []

    def note(method: Descending, *_: object) -> float:
        timed.append(method.seconds())
        return timed[-1]

    monkeypatch.setattr("structmat.compress.estimate._time", note)
    found = fit_seconds(Descending(sweeps=50, metric_iterations=100), SMALL, aware=True, device="cpu")
    assert found == pytest.approx(5 + 49 * 3 + 99 * 5)
    assert sum(timed) < 2 * found


@pytest.mark.slow
@pytest.mark.parametrize("data", [False, True])
def test_the_time_of_a_compression(data: bool) -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    plan = {str(k): Blast.for_budget(256, 256, keep=0.6, blocks=8) for k in range(4)}
    expected = estimate(plan, data=DataSize(4096) if data else None)
    start = time.perf_counter()
    compress_(model, plan, batches=[torch.randn(1024, 256) for _ in range(4)] if data else None, progress=False)
    took = time.perf_counter() - start
    assert took / 4 < expected.seconds < 4 * took


@pytest.mark.slow
def test_the_time_of_an_allocation() -> None:
    blocks = [nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(4)]
    model, batches = nn.Sequential(nn.Sequential(*blocks), nn.Linear(256, 8)), list(torch.randn(16, 1024, 256))
    plan = {f"0.{k}.0": Blast.for_budget(256, 256, keep=0.6, blocks=8) for k in range(4)}
    units = sum(map(unit_count, batches))
    flow = measure_flow(model, plan, batches[0])
    expected = estimate(plan, data=DataSize(units, units, flow), shared=True)
    start = time.perf_counter()
    allocate(model, batches, keep=0.6, blocks=8, layers=list(plan), progress=False)
    took = time.perf_counter() - start
    assert took / 4 < expected.sharing < 4 * took


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (7.4, "7 s"), (44, "40 s"), (100, "2 min"), (3600, "60 min"), (9000, "2.5 h")],
)
def test_times_are_rounded(seconds: float, text: str) -> None:
    assert duration(seconds) == text
