"""Surgery: layers are replaced, fitted and taken out again, and nothing else changes."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from structmat import (
    Blast,
    BlockDiagonal,
    BlockSparse,
    Dense,
    Fit,
    Format,
    Lee2024Blast,
    LowRank,
    Magnitude,
    Monarch,
    Plan,
    StructuredConv2d,
    StructuredLinear,
    TruncatedSvd,
    apply_plan_,
    compress_,
    densify_,
    make_plan,
)
from structmat import convert as convert_module
from structmat.fit import Progress


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 24))


class Tied(nn.Module):
    """Two layers of one weight with their own biases, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.second.weight = self.first.weight
        self.inner = nn.Sequential(nn.Linear(24, 24))
        self.again = self.inner[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.inner(self.second(self.first(x))))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that an operation that fails must leave as it was."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "parameters": [
            (name, id(p), p._version, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)
        ],
    }


def exact(weight: Tensor, rank: int) -> Tensor:
    """A weight of this rank and shape."""
    M, N = weight.shape
    return torch.randn(M, rank, generator=generator(1)) @ torch.randn(rank, N, generator=generator(2)) / N**0.5


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


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
    with pytest.raises(ValueError, match="layer '0' cannot be structured: it is a convolution with 2 groups"):
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


# compress_


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


def test_a_format_without_a_method_is_refused_before_anything_is_fitted() -> None:
    @dataclass(frozen=True)
    class Other(LowRank):
        name: ClassVar[str] = "other"

    with pytest.raises(ValueError, match="expected a format with a default method"):
        compress_(mlp(), {"0": Other(32, 24, 4)}, progress=False)


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


# Interrupts and the cache


@dataclass(frozen=True)
class Recorder(TruncatedSvd):
    """Notes how many weights it fits in each call, and can be interrupted at one."""

    fitted: ClassVar[list[int]] = []
    interrupt_at: ClassVar[list[int]] = []

    def fit_many(self, weights: Any, format: Any, *, names: Any = None, progress: Progress | None = None) -> list[Fit]:
        if weights:
            if len(self.fitted) in self.interrupt_at:
                raise KeyboardInterrupt
            self.fitted.append(len(weights))
        return super().fit_many(weights, format, names=names, progress=progress)


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
    monkeypatch.setattr(convert_module, "BATCH_BYTES", 2 * 4 * 24 * 24)
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


def test_a_partly_cached_batch_fits_the_rest(recorder: Recorder, tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(24, 24) for _ in range(3)])
    plan = make_plan(model, {nn.Linear: LowRank})
    compress_(copy.deepcopy(model), {"1": plan["1"]}, method=recorder, cache=tmp_path, progress=False)
    weights = [layer.weight.detach().clone() for layer in model]
    fits = compress_(model, plan, method=recorder, cache=tmp_path, progress=False)
    assert recorder.fitted == [1, 2]
    for weight, fit in zip(weights, fits.values(), strict=True):
        assert fit.error == pytest.approx(relative(fit.format.to_dense(fit.factors), weight), rel=1e-4)


def test_a_damaged_cache_is_an_error(tmp_path: Path) -> None:
    model, plan = mlp(), {"0": LowRank(32, 24, 4)}
    compress_(copy.deepcopy(model), plan, cache=tmp_path, progress=False)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"expected a safetensors file at '{re.escape(str(file))}'"):
        compress_(model, plan, cache=tmp_path, progress=False)
    assert snapshot(model) == before


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


@pytest.mark.parametrize("method", ["svd", lambda _: TruncatedSvd])
def test_what_is_no_method_is_refused(method: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a method such as TruncatedSvd\(\), or a function"):
        compress_(mlp(), {"0": LowRank(32, 24, 4)}, method=method, progress=False)


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


def test_factors_that_overflow_are_refused() -> None:
    model = nn.Sequential(nn.Linear(32, 32, dtype=torch.float16))
    with torch.no_grad():
        model[0].weight.fill_(6e4)
        model[0].weight[:2, :2] = -6e4
    with pytest.raises(FloatingPointError, match=r"the factors of '0' overflow torch\.float16"):
        compress_(model, {"0": BlockSparse(32, 32, ("10", "01"), 1)}, progress=False, method=Overflowing())


class Overflowing(Magnitude):
    """A method that gives factors twice as large as it should."""

    def _solve(self, weights: Tensor, format: Any, progress: Any) -> tuple[Any, Tensor]:
        factors, history = super()._solve(weights, format, progress)
        return {name: 2 * factor for name, factor in factors.items()}, history
