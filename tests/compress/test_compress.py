"""Compression: what is planned is fitted, replaced only when all is there, and kept in a cache."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from small_networks import Tied, exact, generator, mlp, relative, snapshot
from structmat import (
    Blast,
    BlockSparse,
    Fit,
    LowRank,
    Monarch,
    Plan,
    StructuredConv2d,
    StructuredLinear,
    compress_,
    densify_,
    make_plan,
)
from structmat._digests import digests, sealed
from structmat.compress import tasks
from structmat.fit import Lee2024Blast, Magnitude, TruncatedSvd


def test_compress_fits_every_layer_by_its_method() -> None:
    model = mlp()
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in "024"}
    plan = make_plan(model, {"0": LowRank, "2": Blast, "4": Monarch}, blocks=4)
    fits = compress_(model, plan, progress=False)
    assert list(fits) == ["0", "2", "4"]
    for name, fit in fits.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, StructuredLinear)
        assert layer.format == plan[name] == fit.format
        assert fit.error == pytest.approx(relative(layer.to_dense(), weights[name]), rel=1e-4)
        assert 0.1 < fit.error < 0.9
        assert all(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("method", [Lee2024Blast.published(sweeps=3), lambda _: Lee2024Blast.published(sweeps=3)])
def test_a_method_may_be_given(method: Any) -> None:
    fits = compress_(mlp(), {"0": Blast(32, 24, 4, 4)}, method=method, progress=False)
    assert len(fits["0"].history) == 3


def test_a_function_of_the_format_may_leave_the_choice() -> None:
    fits = compress_(mlp(), {"0": Blast(32, 24, 4, 4)}, method=lambda _: None, progress=False)  # pyright: ignore
    assert len(fits["0"].history) == Lee2024Blast().sweeps


def test_a_method_must_fit_the_format() -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"expected a format that TruncatedSvd can fit \(LowRank\), got Monarch"):
        compress_(model, {"0": LowRank(32, 24, 4), "2": Monarch(32, 32, 4, 2)}, method=TruncatedSvd(), progress=False)
    assert snapshot(model) == before


def test_a_method_is_an_instance() -> None:
    with pytest.raises(TypeError, match=r"[Mm]ethod"):
        compress_(mlp(), {"0": LowRank(32, 24, 4)}, method=TruncatedSvd, progress=False)  # pyright: ignore


def test_a_format_without_a_method_of_its_own_is_fitted_by_gradient_descent() -> None:
    @dataclass(frozen=True)
    class Other(LowRank):
        name: ClassVar[str] = "other"

    model = mlp()
    weight = model[0].weight.detach().clone()
    fit = compress_(model, {"0": Other(32, 24, 4)}, progress=False)["0"]
    assert len(fit.history) > 0
    assert fit.error < 1.05 * TruncatedSvd()(weight, LowRank(32, 24, 4)).error


def test_non_finite_weights_are_named_by_layer() -> None:
    model = mlp()
    with torch.no_grad():
        model[4].weight[0, 0] = torch.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match="the weight of layer '4' to be finite, got 1 NaN or infinite of 768 entries"):
        compress_(model, {"0": LowRank(32, 24, 4), "4": LowRank(24, 32, 4)}, progress=False)
    assert snapshot(model) == before


def test_a_network_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(ValueError, match="meta"):
        compress_(model, {"0": LowRank(32, 24, 4)}, progress=False)


def test_frozen_layers_stay_frozen() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    compress_(model, make_plan(model, {nn.Linear: LowRank}), progress=False)
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"0.left", "0.right", "0.bias"}


def test_bfloat16_network() -> None:
    model = mlp().bfloat16()
    x = torch.randn(5, 24).bfloat16()
    with torch.no_grad():
        for k in (0, 2, 4):
            model[k].weight.copy_(exact(model[k].weight, 2))
        before = model(x)
        fits = compress_(model, make_plan(model, {nn.Linear: LowRank}, keep=0.3), progress=False)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert max(fit.error for fit in fits.values()) < 0.01
        assert relative(model(x).float(), before.float()) < 0.05


def test_tied_weights_are_fitted_once() -> None:
    model = Tied()
    with torch.no_grad():
        for layer in (model.first, model.again):
            layer.weight.copy_(exact(layer.weight, 2))
    x = torch.randn(3, 24)
    before = model(x)
    fits = compress_(model, make_plan(model, {nn.Linear: LowRank}, keep=0.3), progress=False)
    assert list(fits) == ["first", "inner.0"]
    assert model.first.left is model.second.left
    assert model.again is model.inner[0]
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


CONVOLUTIONS = {
    "plain": {},
    "strided": {"stride": (2, 1), "padding": (1, 2)},
    "dilated": {"dilation": 2, "padding": "same"},
    "reflecting": {"padding": 1, "padding_mode": "reflect", "bias": False},
    "valid": {"padding": "valid"},
}


@pytest.mark.parametrize("options", list(CONVOLUTIONS.values()), ids=list(CONVOLUTIONS))
def test_convolutions_compute_the_same(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, **options))
    with torch.no_grad():
        model[0].weight.copy_(exact(model[0].weight.flatten(1), 2).view(8, 4, 3, 3))
    x = torch.randn(2, 4, 9, 8)
    before = model(x)
    dense = copy.deepcopy(model[0])
    fits = compress_(model, {"0": LowRank(8, 36, 2)}, progress=False)
    assert isinstance(model[0], StructuredConv2d)
    assert fits["0"].error < 1e-5
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    densify_(model)
    assert type(model[0]) is nn.Conv2d
    assert repr(model[0]) == repr(dense)
    torch.testing.assert_close(model[0].weight, dense.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def lengths_mask() -> Tensor:
    return torch.arange(7)[None, :] >= torch.tensor([7, 4, 2])[:, None]  # True where there is padding


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("stacked", [False, True], ids=["layer", "stack"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder_in_eval_mode(padded: bool, stacked: bool, activation: str) -> None:
    def encoder() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation=activation)
        return (nn.TransformerEncoder(layer, 2) if stacked else nn.Sequential(layer)).eval()

    model = encoder()
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert len(names) == (4 if stacked else 2)
    plan = {}
    with torch.no_grad():
        for name in names:
            weight = model.get_submodule(name).get_parameter("weight")
            weight.copy_(exact(weight, 2))
            plan[name] = LowRank(*weight.shape, 2)
        x = torch.randn(3, 7, 16, generator=generator())
        mask = lengths_mask() if padded else None
        real = ~lengths_mask() if padded else torch.ones(3, 7, dtype=torch.bool)

        def call() -> Tensor:
            module = model if stacked else model[0]  # pyright: ignore
            return module(x, src_key_padding_mask=mask)[real]

        before = call()
        compress_(model, plan, progress=False)
        torch.testing.assert_close(call(), before, rtol=1e-4, atol=1e-4)
        for name in names:  # and it is the structured layers that ran
            model.get_submodule(name).get_parameter("left").mul_(2)
        assert relative(call(), before) > 0.01


@pytest.mark.parametrize("method", ["svd", lambda _: TruncatedSvd])
def test_what_is_no_method_is_refused(method: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a method such as TruncatedSvd\(\), or a function"):
        compress_(mlp(), {"0": LowRank(32, 24, 4)}, method=method, progress=False)


def test_factors_that_overflow_are_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 32, dtype=torch.float16))
    with torch.no_grad():
        model[0].weight.fill_(6e4)
        model[0].weight[:2, :2] = -6e4
    with pytest.raises(FloatingPointError, match=r"the factors of '0' overflow torch\.float16"):
        compress_(model, {"0": BlockSparse(32, 32, ("10", "01"), 1)}, progress=False, method=Overflowing())


class Overflowing(Magnitude):
    """A method that gives one factor that is far too large, and another that makes up for it."""

    def _solve(self, weights: Tensor, metric: Any, format: Any, progress: Any) -> tuple[Any, Tensor]:
        factors, history = super()._solve(weights, metric, format, progress)
        return {**factors, "left": 1e6 * factors["left"], "right": 1e-6 * factors["right"]}, history


# Interrupts and the cache


@dataclass(frozen=True)
class Recorder(TruncatedSvd):
    """Notes how many weights it fits in each call, and can be interrupted at one."""

    fitted: ClassVar[list[int]] = []
    interrupt_at: ClassVar[list[int]] = []

    def fit_many(self, weights: Any, format: Any, **options: Any) -> list[Fit]:
        if len(self.fitted) in self.interrupt_at:
            raise KeyboardInterrupt
        self.fitted.append(len(weights))
        return super().fit_many(weights, format, **options)


@pytest.fixture
def recorder() -> Recorder:
    Recorder.fitted.clear()
    Recorder.interrupt_at.clear()
    return Recorder()


SVD_PLAN = {"0": LowRank(32, 24, 4), "2": LowRank(32, 32, 4), "4": LowRank(24, 32, 4)}


def test_weights_of_one_shape_are_fitted_together(recorder: Recorder) -> None:
    model = nn.Sequential(*[nn.Linear(24, 24) for _ in range(3)], nn.Linear(24, 32))
    weights = [layer.weight.detach().clone() for layer in model]
    fits = compress_(model, make_plan(model, {nn.Linear: LowRank}), method=recorder, progress=False)
    assert recorder.fitted == [3, 1]
    for layer, weight, fit in zip(model, weights, fits.values(), strict=True):
        assert fit.error == pytest.approx(relative(layer.to_dense(), weight), rel=1e-4)


def test_batches_are_of_bounded_memory(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "BATCH_BYTES", 2 * 4 * 24 * 24)
    model = nn.Sequential(*[nn.Linear(24, 24) for _ in range(5)])
    fits = compress_(model, make_plan(model, {nn.Linear: LowRank}), method=recorder, progress=False)
    assert recorder.fitted == [2, 2, 1]
    assert list(fits) == ["0", "1", "2", "3", "4"]


def test_an_interrupt_leaves_the_network_and_a_cache_goes_on(recorder: Recorder, tmp_path: Path) -> None:
    model = mlp()
    expected = compress_(copy.deepcopy(model), SVD_PLAN, method=TruncatedSvd(), progress=False)
    before = snapshot(model)
    recorder.interrupt_at.append(2)
    with pytest.raises(KeyboardInterrupt):
        compress_(model, SVD_PLAN, method=recorder, cache=tmp_path / "fits", progress=False)
    assert snapshot(model) == before
    assert recorder.fitted == [1, 1]

    recorder.interrupt_at.clear()
    fits = compress_(model, SVD_PLAN, method=recorder, cache=tmp_path / "fits", progress=False)
    assert recorder.fitted == [1, 1, 1]
    assert list(fits) == list(SVD_PLAN)
    for name, fit in fits.items():
        assert fit.error == expected[name].error
        assert all(torch.equal(fit.factors[n], f) for n, f in expected[name].factors.items())
        assert torch.equal(model.get_submodule(name).to_dense(), fit.format.to_dense(fit.factors))


def test_a_cache_holds_everything_of_a_fit(tmp_path: Path) -> None:
    model, plan = mlp(), {"0": Blast(32, 24, 4, 4)}
    method = Lee2024Blast(sweeps=3)
    first, second = (
        compress_(copy.deepcopy(model), plan, method=method, cache=tmp_path, progress=False)["0"] for _ in range(2)
    )
    assert (first.format, first.error, first.history, first.seconds) == (
        second.format, second.error, second.history, second.seconds
    )  # fmt: skip
    assert all(torch.equal(factor, second.factors[name]) for name, factor in first.factors.items())


@pytest.mark.parametrize("change", ["weight", "format", "method", "dtype"])
def test_a_cache_knows_what_a_fit_depends_on(recorder: Recorder, tmp_path: Path, change: str) -> None:
    model, rank, method = nn.Sequential(nn.Linear(24, 32)), 4, recorder
    compress_(copy.deepcopy(model), {"0": LowRank(32, 24, 4)}, method=method, cache=tmp_path, progress=False)
    if change == "weight":
        with torch.no_grad():
            model[0].weight[0, 0] += 1
    elif change == "format":
        rank = 5
    elif change == "method":
        method = Recorder(randomized=True)
    else:
        model.double()
    compress_(model, {"0": LowRank(32, 24, rank)}, method=method, cache=tmp_path, progress=False)
    assert Recorder.fitted == [1, 1]


def test_a_partly_cached_batch_is_fitted_as_a_whole(recorder: Recorder, tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(24, 24) for _ in range(3)])
    plan = make_plan(model, {nn.Linear: LowRank})
    expected = compress_(copy.deepcopy(model), plan, method=TruncatedSvd(), progress=False)
    compress_(copy.deepcopy(model), {"1": plan["1"]}, method=recorder, cache=tmp_path, progress=False)
    for _ in range(2):  # the second time everything is there
        fits = compress_(copy.deepcopy(model), plan, method=recorder, cache=tmp_path, progress=False)
        assert recorder.fitted == [1, 3]  # so that the result does not depend on what an earlier run finished
        for name, fit in fits.items():
            assert all(torch.equal(factor, expected[name].factors[n]) for n, factor in fit.factors.items())


def _cut(file: Path, _: dict[str, Tensor], __: dict[str, str]) -> None:
    file.write_bytes(file.read_bytes()[:20])


def _flip(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["left"].view(torch.int32)[1, 1] ^= 1
    save_file(tensors, file, metadata)


def _swap(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    save_file({"left": tensors["right"], "right": tensors["left"]}, file, metadata)


def _without_facts(file: Path, tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    save_file(tensors, file, {"format": "pt"})


def _other_facts(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    facts = {**json.loads(metadata["fit"]), "error": "none"}
    save_file(tensors, file, {**metadata, "fit": json.dumps(facts)})


def _not_finite(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["left"][0, 0] = torch.nan
    facts = json.loads(metadata["fit"])
    save_file(tensors, file, {**metadata, "digests": json.dumps(sealed(facts, digests(tensors)))})


@pytest.mark.parametrize("damage", [_cut, _flip, _swap, _without_facts, _other_facts, _not_finite])
def test_a_damaged_entry_of_a_cache_is_made_again_and_told(
    damage: Callable[[Path, dict[str, Tensor], dict[str, str]], None], tmp_path: Path
) -> None:
    model, plan = nn.Sequential(nn.Linear(24, 24)), {"0": LowRank(24, 24, 4)}
    expected = compress_(copy.deepcopy(model), plan, cache=tmp_path, progress=False)["0"]
    (file,) = tmp_path.iterdir()
    with safe_open(file, "pt") as opened:
        tensors, metadata = {name: opened.get_tensor(name).clone() for name in ("left", "right")}, opened.metadata()
    damage(file, tensors, metadata)
    with pytest.warns(UserWarning, match=f"the finished fit in '{re.escape(str(file))}' is damaged and is made again"):
        fit = compress_(copy.deepcopy(model), plan, cache=tmp_path, progress=False)["0"]
    assert all(torch.equal(factor, expected.factors[name]) for name, factor in fit.factors.items())
    compress_(model, plan, cache=tmp_path, progress=False)  # the new entry is whole: no warning


def test_a_progress_bar_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    compress_(mlp(), {"0": LowRank(32, 24, 4)}, progress=False)
    assert capsys.readouterr().err == ""
    compress_(mlp(), {"0": LowRank(32, 24, 4)})
    assert "compress" in capsys.readouterr().err


def test_an_empty_plan_changes_nothing() -> None:
    model = mlp()
    before = snapshot(model)
    assert compress_(model, Plan({}), progress=False) == {}
    assert snapshot(model) == before
