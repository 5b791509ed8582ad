"""Benchmarks: how often and in which order, what is checked before, and what is refused; never how fast."""

import contextlib
import functools
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from structmat import Blast, BlockSparse, Gblr, LowRank, Monarch, Rule, StructuredLinear, autotune_
from structmat.bench import (
    IncorrectResultError,
    LayerBench,
    Timing,
    bench_layers,
    check_format,
    hardware,
    machine,
    measure_peak,
    stacks,
    time_in_turn,
    time_side_by_side,
)
from structmat.bench.machine import CPU_COLD_BYTES, cold_bytes
from structmat.bench.models import GenerationBench, ModelTime
from structmat.bench.plots import layer_speeds, model_speeds
from structmat.bench.timing import BUSY_BYTES, captured, clock_of
from structmat.bench.verify import check_layer, exact_weight

RULES = {"blast": Rule(Blast, 0.5, 4), "low-rank": Rule(LowRank, 0.5)}
CPU = torch.device("cpu")


def quick(rules: Any = RULES, **options: Any) -> LayerBench:
    """Of 32 x 48 matrices, one copy each, two rounds."""
    settings: dict[str, Any] = {"shapes": [(32, 48)], "tokens": [2], "rounds": 2, "cold": 0, "progress": False}
    return bench_layers(rules, **{**settings, **options})


def test_candidates_take_turns_after_warming_up() -> None:
    calls: list[str] = []
    times = time_side_by_side({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert "".join(calls) == "aabb" + "ab" * 3
    assert list(times) == ["a", "b"]
    assert all(seconds >= 0 for seconds in times.values())


def test_the_time_is_the_median() -> None:
    pauses = iter([0, 0, 0.02, 0.02, 0.5])  # two to warm up; one round of three is disturbed
    times = time_side_by_side({"pause": lambda: time.sleep(next(pauses))}, rounds=3)
    assert 0.02 <= times["pause"] < 0.4


def test_the_slower_one_takes_longer() -> None:
    times = time_side_by_side({"slow": lambda: time.sleep(0.01), "fast": lambda: None}, rounds=3)
    assert times["slow"] >= 0.01 > times["fast"]


def test_there_must_be_a_round() -> None:
    with pytest.raises(ValueError, match="rounds to be an integer of at least 1, got 0"):
        time_side_by_side({"a": lambda: None}, rounds=0)


def test_each_timed_call_follows_one_of_its_own() -> None:
    calls: list[str] = []
    time_side_by_side({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, settle=1)
    assert "".join(calls) == "aabb" + "aabb" * 2


def test_quartiles_and_spread() -> None:
    seconds = iter([9.0, 1.0, 5.0, 2.0, 3.0])
    found = time_in_turn({"a": lambda: None}, rounds=5, warmup=0, clock=lambda run: next(seconds))["a"]
    assert found == Timing(3.0, 2.0, 5.0, 5)
    assert found.spread == 1.0
    assert found.each(2) == Timing(1.5, 1.0, 2.5, 5)
    assert Timing.of([4.0]) == Timing(4.0, 4.0, 4.0, 1)


class Gpu:
    """Stands in for ``torch.cuda``: notes what is done, and plays it again when a graph is launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        for name in ("synchronize", "Stream", "CUDAGraph", "stream", "graph", "current_stream", "Event"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def note(self, what: str) -> None:
        self.done.append(what)

    def synchronize(self, *args: Any) -> None:
        self.note("wait")

    def Stream(self) -> Any:
        return self

    CUDAGraph = current_stream = Stream

    def wait_stream(self, other: Any) -> None:
        pass

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Any:
        yield

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Any:
        self.note("capture")
        yield
        self.note("captured")

    def replay(self) -> None:
        self.note("replay")

    def Event(self, enable_timing: bool) -> Any:
        return self

    def record(self) -> None:
        self.note("record")

    def elapsed_time(self, other: Any) -> float:
        return 2000.0


def test_graphs_are_captured_after_warming_up(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)

    def build() -> Any:
        gpu.note("build")
        return lambda: gpu.note("run")

    launch = captured(build)
    assert gpu.done == ["build", "run", "run", "run", "wait", "capture", "run", "captured", "wait"]
    gpu.done.clear()
    launch()
    assert gpu.done == ["replay"]


def test_gpus_are_timed_by_events_while_they_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    sizes: list[int] = []

    def ahead(size: int, **options: Any) -> Any:
        sizes.append(size)
        return type("Ahead", (), {"zero_": lambda self: gpu.note("fill")})()

    monkeypatch.setattr(torch, "empty", ahead)
    clock = clock_of(torch.device("cuda"))
    assert clock(lambda: gpu.note("run")) == 2.0
    assert gpu.done == ["wait", "fill", "record", "run", "record", "wait"]
    assert sizes == [BUSY_BYTES]


def test_the_machine_is_named() -> None:
    facts = hardware()
    assert facts["threads"] == str(torch.get_num_threads())
    assert facts["bf16_instructions"]
    assert cold_bytes(CPU) >= CPU_COLD_BYTES
    peak = measure_peak(torch.float32, CPU, large=False)
    assert peak.flops > 0
    assert peak.bytes > 0


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_named_where_there_is_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        names = ["-c", "user.name=me", "-c", "user.email=me@here", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *names, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    def facts() -> dict[str, str]:
        machine._checkout.cache_clear()
        return {name: value for name, value in hardware().items() if name in ("commit", "dirty")}

    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert facts() == {}
    git("init")
    assert facts() == {}  # without a commit
    for name in ("src", "benchmarks/results", "docs"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("first", encoding="utf-8")
    git("add", ".")
    git("commit", "-m", "first")
    assert facts() == {"commit": git("rev-parse", "HEAD"), "dirty": "no"}
    for name in ("benchmarks/results", "docs"):  # neither changes what is measured
        (tmp_path / name / "file").write_text("second", encoding="utf-8")
    assert facts()["dirty"] == "no"
    (tmp_path / "src" / "file").write_text("second", encoding="utf-8")
    assert facts()["dirty"] == "yes"
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert facts() == {}
    monkeypatch.undo()
    machine._checkout.cache_clear()


def test_layers_are_timed_beside_dense_ones() -> None:
    found = quick(tokens=[1, 3], dtypes=[torch.float32, torch.bfloat16], steps=["forward", "backward", "training"])
    settings = [(t.dtype, t.tokens, t.step, t.format, t.algorithm) for t in found.times]
    assert settings == [
        (dtype, tokens, step, format, "automatic")
        for dtype in ("float32", "bfloat16")
        for tokens in (1, 3)
        for step in ("forward", "backward", "training")
        for format in RULES
    ]
    assert all(t.seconds.rounds == 2 for t in found.times)
    first = found.times[0]
    assert first.speedup == first.dense_seconds.median / first.seconds.median
    assert first.limit_share == max(first.flop_share, first.byte_share)
    data = json.loads(found.to_json())
    assert data["hardware"] == hardware()
    assert set(data["peaks"]) == {"float32", "bfloat16"}
    assert data["layers"][0]["speedup"] == first.speedup
    assert data["settings"] == {"device": "cpu", "mode": "eager", "rounds": 2, "cold_bytes": 0}


def test_limits_are_those_of_the_counted_operations_and_bytes() -> None:
    found = quick({"low-rank": Rule(LowRank, 0.5)}, tokens=[5], steps=["forward", "training"])
    forward, training = found.times
    peak, R = found.peaks["float32"], LowRank.for_budget(32, 48, keep=0.5).rank
    assert forward.flop_limit == pytest.approx(2 * 5 * R * 80 / peak.flops)
    assert forward.byte_limit == pytest.approx(4 * (R * 80 + 5 * 80) / peak.bytes)
    assert forward.dense_flop_limit == pytest.approx(2 * 5 * 32 * 48 / peak.flops)
    assert forward.dense_byte_limit == pytest.approx(4 * (32 * 48 + 5 * 80) / peak.bytes)
    assert training.flop_limit == pytest.approx(3 * forward.flop_limit)
    assert training.byte_limit == pytest.approx(4 * (3 * R * 80 + 2 * 5 * 80 + 5 * 48) / peak.bytes)


def test_a_stack_is_larger_than_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    original = nn.Linear.forward

    def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        called.append(self.weight.data_ptr())
        return original(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    peaks = {"float32": measure_peak(torch.float32, CPU, large=False)}
    rank = LowRank.for_budget(32, 48, keep=0.5).rank
    found = quick({"low-rank": Rule(LowRank, 0.5)}, cold=5 * 4 * rank * 80 - 1, peaks=peaks)
    assert found.times[0].copies == 5
    assert len(set(called)) == 5
    assert len(called) == 5 * (2 + 2 * 2)  # warm-up, and rounds with one untimed run each
    assert quick(cold=1, peaks=peaks).times[0].copies == 2
    assert quick(cold=2**30, peaks=peaks, rounds=1).times[0].copies == stacks.MOST_COPIES


def test_chosen_algorithms_are_timed_too() -> None:
    def choose(model: nn.Module, tokens: Any) -> None:
        assert tuple(tokens) == (2, 5)
        layer = model[0]
        assert isinstance(layer, StructuredLinear)
        if isinstance(layer.format, Blast):
            layer.algorithms[8] = "whole"  # the bucket of 5 tokens

    found = quick(tokens=(2, 5), choose=choose)
    assert [(t.tokens, t.format, t.algorithm) for t in found.times] == [
        (2, "blast", "automatic"),
        (2, "low-rank", "automatic"),
        (5, "blast", "automatic"),
        (5, "blast", "whole"),
        (5, "low-rank", "automatic"),
    ]
    found = quick(algorithms=["vectors", "linear"])
    assert [t.algorithm for t in found.times] == ["automatic", "vectors", "automatic", "linear"]
    assert quick(choose=lambda model, tokens: autotune_(model, tokens=tokens, rounds=1)).times


def wrong_by(size: float, where: str = "") -> Any:
    """A product of BLAST matrices that is wrong in one entry, for some algorithm."""
    original = Blast.matmul

    def matmul(self: Blast, x: torch.Tensor, factors: Any, algorithm: str = "") -> torch.Tensor:
        y = original(self, x, factors, algorithm)
        if algorithm != where:
            return y
        change = torch.zeros_like(y)
        change[..., -1] = size
        return y + change

    return matmul


def test_nothing_is_timed_when_a_product_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("timed")

    monkeypatch.setattr(stacks, "time_in_turn", never)
    monkeypatch.setattr(Blast, "matmul", wrong_by(0.5))
    with pytest.raises(IncorrectResultError, match=r"the product of Blast\(M=84, N=108.* in float32 .*; please report"):
        quick()
    monkeypatch.setattr(Blast, "matmul", wrong_by(float("nan")))
    with pytest.raises(IncorrectResultError, match=r"deviates .* by inf as a whole and inf in"):
        quick()


def test_a_chosen_algorithm_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Blast.matmul
    broken = wrong_by(0.5, where="whole")
    monkeypatch.setattr(Blast, "matmul", broken)
    assert Blast.matmul is not original
    quick()
    with pytest.raises(IncorrectResultError, match="the product by 'whole' of Blast"):
        quick(algorithms=["whole"])


def test_gradients_are_checked_where_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LowRank.matmul

    def detached(self: LowRank, x: torch.Tensor, factors: Any, algorithm: str = "") -> torch.Tensor:
        y = original(self, x, factors, algorithm)
        return y + 0.5 * (y - y.detach())

    monkeypatch.setattr(LowRank, "matmul", detached)
    quick()
    with pytest.raises(IncorrectResultError, match="the gradient of the input of LowRank"):
        quick(steps=["backward"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_right_formats_pass(dtype: torch.dtype) -> None:
    for rule in (Rule(Blast, 0.5, (3, 5)), Rule(Monarch, 0.5, 3), Rule(BlockSparse, 0.5, 4), Rule(LowRank, 0.5)):
        check_format(rule.format_for(60, 60), dtype, CPU, [1, 6], gradients=True)


def test_the_layer_that_is_timed_is_checked_with_its_bias() -> None:
    layer = StructuredLinear(Gblr(12, 10, 3, (20, 20)))
    weight, x = exact_weight(layer), torch.randn(9, 10)
    check_layer(layer, x, weight)
    with pytest.raises(IncorrectResultError, match="the product of Gblr"):
        check_layer(layer, x, weight + 0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rules": {}}, "expected at least one of formats, got none"),
        ({"shapes": []}, "expected at least one of shapes, got none"),
        ({"tokens": [0]}, "expected tokens to be an integer of at least 1, got 0"),
        ({"steps": ["sideways"]}, "expected a step to be one of 'forward', 'backward', 'training', got 'sideways'"),
        ({"steps": []}, "expected a step to be one of .*, got ''"),
        ({"mode": "fast"}, "expected mode to be one of 'eager', 'graphs', 'compile', got 'fast'"),
        ({"mode": "graphs"}, "expected a CUDA device for the mode 'graphs', got the CPU"),
        ({"device": "meta"}, "expected the device's type to be one of 'cpu', 'cuda', got 'meta'"),
        ({"shapes": [(30, 48)]}, "expected a block count that divides the 30 rows, got 4"),
        ({"rules": {"blast": Rule(Blast, 0.5)}}, "expected blocks in the rule for Blast, got none"),
        ({"rules": {"low-rank": Rule(LowRank)}}, "expected a keep in the rule for LowRank, got none"),
    ],
)
def test_wrong_options_of_layers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_must_be_there() -> None:
    with pytest.raises(ValueError, match="expected a CUDA device that is there"):
        quick(device="cuda")


def test_compiled_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    # to trace alone needs no compiler
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    assert len(quick(mode="compile", steps=["forward", "training"]).times) == 4


def test_pictures() -> None:
    pytest.importorskip("matplotlib")
    found = quick(tokens=[1, 4], steps=["forward", "training"], algorithms=["whole"])
    figure = layer_speeds(found)
    assert [axes.get_title() for axes in figure.axes] == ["32 x 48, float32, forward", "32 x 48, float32, training"]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["blast", "blast, chosen", "low-rank"]
    figure = model_speeds(GenerationBench(tuple(model_times()), {}))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["prefill\n4", "decode\n1"]


def model_times() -> list[ModelTime]:
    seconds = Timing(1.0, 1.0, 1.0, 1)
    return [
        ModelTime(model, step, tokens, seconds, seconds)
        for step, tokens in (("prefill", 4), ("decode", 1))
        for model in ("dense", "blast")
    ]
