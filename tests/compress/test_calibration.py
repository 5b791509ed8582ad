"""Calibration: moments against the inputs themselves, and what is made of them."""

import math
import re
from collections import OrderedDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small_networks import Stack, Tied, mlp, padding, sequences
from structmat import BlockDiagonal, Dense, Format, LowRank, apply_plan_, calibrate
from structmat.compress.calibration import Calibration
from structmat.fit.moments import DEFAULT_RIDGE, HELD_OUT_EVERY, RIDGES, Moments, MomentSums
from structmat.formats import Format as AnyFormat


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def all_of(model: nn.Module) -> dict[str, AnyFormat]:
    """A plan for every linear layer and convolution."""
    layers = {name: m for name, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
    return {name: LowRank(*m.weight.flatten(1).shape, 1) for name, m in layers.items()}


def assert_moments(moments: Moments, x: Tensor, tolerance: float = 1e-12) -> None:
    """That the moments are those of ``x (T, N)``."""
    x = x.double()
    assert moments.tokens == len(x)
    assert moments.second_moment.dtype == moments.mean.dtype == torch.float64
    torch.testing.assert_close(moments.second_moment, x.mT @ x / len(x), rtol=0, atol=tolerance)
    torch.testing.assert_close(moments.mean, x.mean(0), rtol=0, atol=tolerance)
    assert moments.cross is moments.target_mean is None


# What is gathered


def test_moments_are_those_of_all_inputs_together() -> None:
    model, batches = mlp(), [randn(7, 24, seed=k) for k in range(3)] + [randn(2, 3, 24), randn(24)]
    found = calibrate(model, batches, all_of(model), progress=False)
    assert list(found) == ["0", "2", "4"]
    x = torch.cat([batch.reshape(-1, 24) for batch in batches])
    for name, layer in (("0", model[:0]), ("2", model[:2]), ("4", model[:4])):
        assert_moments(found[name], layer(x).detach(), 1e-5)
    assert_moments(found["0"], x)


class Cnn(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, **options)
        self.point = nn.Conv2d(8, 4, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.point(self.conv(x))


@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}, {"stride": (1, 2), "padding": (0, 2)}],
    ids=str,
)
def test_convolutions_read_unfolded_images(options: dict[str, Any]) -> None:
    model, batches = Cnn(**options).eval(), [randn(2, 3, 9, 8), randn(3, 3, 9, 8, seed=1)]
    found = calibrate(model, batches, all_of(model), progress=False)
    x = torch.cat(batches)
    settings = {"stride": 1, "padding": 0, "dilation": 1, **options}
    columns = nn.functional.unfold(x, 3, **settings)  # (B, N, L)
    assert_moments(found["conv"], columns.mT.reshape(-1, 27), 1e-6)
    hidden = model.conv(x).detach()[:, :, ::2, ::2]
    assert_moments(found["point"], hidden.permute(0, 2, 3, 1).reshape(-1, 8), 1e-6)


def test_a_convolution_called_without_a_batch() -> None:
    model, image = nn.Sequential(nn.Conv2d(3, 8, 3)), randn(3, 6, 6)
    found = calibrate(model, [image], all_of(model), progress=False)
    assert_moments(found["0"], nn.functional.unfold(image[None], 3)[0].mT, 1e-6)


def test_shared_weights_count_every_use() -> None:
    model, x = Tied(), randn(5, 24)
    plan = {"first": LowRank(24, 24, 3), "again": LowRank(24, 24, 3)}
    found = calibrate(model, [x], plan, progress=False)
    hidden = model.first(x)
    third = model.second(hidden)
    assert_moments(found["first"], torch.cat([x, hidden]).detach(), 1e-6)
    assert_moments(found["again"], torch.cat([third, model.again(third)]).detach(), 1e-6)


def test_padding_does_not_count() -> None:
    model, x, mask = Stack(), sequences(1)[0], padding()
    inputs: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: inputs.setdefault(name, []).append(args[0]))
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    ]
    model(x, mask)
    for handle in handles:
        handle.remove()
    found = calibrate(model, [{"x": x, "attention_mask": mask}], all_of(model), progress=False)
    for name, moments in found.items():
        assert moments.tokens == int(mask.sum()) < mask.numel()
        assert_moments(moments, inputs[name][0][mask.bool()].detach(), 1e-5)


@pytest.mark.parametrize("mask", [torch.ones(4, 9, 9), None, torch.ones(4, 3)], ids=["3-D", "none", "other length"])
def test_a_mask_of_another_form_leaves_nothing_out(mask: Tensor | None) -> None:
    class Ignores(nn.Sequential):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(x)

    model, x = Ignores(nn.Linear(12, 8)), sequences(1)[0]
    found = calibrate(model, [{"x": x, "attention_mask": mask}], {"0": LowRank(8, 12, 1)}, progress=False)
    assert_moments(found["0"], x.flatten(0, 1), 1e-5)


def test_layers_that_read_the_same_input_share_their_moments() -> None:
    model = Stack(depth=2)
    found = calibrate(model, sequences(2), all_of(model), progress=False)
    block = "blocks.0"
    assert found[f"{block}.query"] is found[f"{block}.key"] is found[f"{block}.value"]
    assert len({id(moments) for moments in found.values()}) == 2 + 2 * 4
    distinct = {id(moments): moments for moments in found.values()}.values()
    assert found.nbytes == sum(8 * (len(m.mean) + 1) * len(m.mean) for m in distinct)


def test_the_same_tensor_changed_in_place_is_another_input() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.first(x)
            x += 1
            return y + self.second(x)

    model, x = InPlace(), randn(5, 6)
    found = calibrate(model, [x], all_of(model), progress=False)
    assert_moments(found["first"], x, 1e-6)
    assert_moments(found["second"], x + 1, 1e-6)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.layer(x + y)


@pytest.mark.parametrize(
    "batch",
    [
        (randn(5, 6), randn(5, 6, seed=1)),
        [randn(5, 6), randn(5, 6, seed=1)],
        {"x": randn(5, 6), "y": randn(5, 6, seed=1)},
        OrderedDict(y=randn(5, 6, seed=1), x=randn(5, 6)),
    ],
    ids=["tuple", "list", "dict", "mapping"],
)
def test_forms_of_a_batch(batch: Any) -> None:
    found = calibrate(TwoInputs(), [batch], {"layer": LowRank(4, 6, 1)}, progress=False)
    assert_moments(found["layer"], randn(5, 6) + randn(5, 6, seed=1), 1e-6)


def test_batches_may_come_from_a_generator() -> None:
    model = mlp()
    found = calibrate(model, (randn(7, 24, seed=k) for k in range(3)), all_of(model), progress=False)
    assert found["0"].tokens == 21


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_sums_are_in_float64(dtype: torch.dtype) -> None:
    model, batches = mlp().to(dtype), [randn(50, 24, seed=k).to(dtype) for k in range(3)]
    found = calibrate(model, batches, all_of(model), progress=False)
    assert_moments(found["0"], torch.cat(batches))


def test_small_batches_count_beside_large_ones() -> None:
    large, small = torch.full((1, 1), 2.0**12), torch.ones(1, 1)
    sums = sums_of([large, *[small] * 7])
    assert float(sums.moments().second_moment) * 8 == 2**24 + 7  # a sum in single precision stays at 2^24


def test_layers_planned_as_dense_are_not_looked_at() -> None:
    model = mlp()
    plan: dict[str, Format] = {"0": LowRank(32, 24, 4), "2": Dense(32, 32), "1": Dense(32, 32)}
    found = calibrate(model, [randn(3, 24)], plan, progress=False)
    assert isinstance(found, Calibration)
    assert list(found) == ["0"]
    assert len(found) == 1
    assert "2" not in found


# What is left as it was


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_cache", [True, False, None])
def test_the_model_is_left_as_it_was(training: bool, use_cache: bool | None) -> None:
    pytest.importorskip("structmat.integrations.transformers")  # whose adapter knows of caches

    class Configured(nn.Sequential):
        seen: list[Any]

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append((self.config.use_cache, self.training, torch.is_grad_enabled()))
            return super().forward(x)

    model = Configured(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6))
    model.config, model.seen = SimpleNamespace(use_cache=use_cache), []
    model.train(training)
    model[2].eval()
    modes = [module.training for module in model.modules()]
    before = {name: p.clone() for name, p in model.named_parameters()}
    calibrate(model, [randn(5, 6)], all_of(model), progress=False)
    assert set(model.seen) == {(False if use_cache is not None else None, False, False)}
    assert [module.training for module in model.modules()] == modes
    assert model.config.use_cache is use_cache
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_error_leaves_no_hooks_and_the_mode() -> None:
    model = mlp()
    with pytest.raises(RuntimeError, match="shapes"):
        calibrate(model, [randn(3, 24), randn(3, 25)], all_of(model), progress=False)
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_progress_bar_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(mlp(), [randn(3, 24)], {"0": LowRank(32, 24, 4)}, progress=False)
    assert capsys.readouterr().err == ""
    calibrate(mlp(), [randn(3, 24)], {"0": LowRank(32, 24, 4)})
    assert "calibrate" in capsys.readouterr().err


# What is refused


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    ("make", "batches", "plan", "error", "message"),
    [
        (mlp, [], {"0": LowRank(32, 24, 4)}, ValueError, "expected at least one batch of calibration data, got none"),
        (mlp, [randn(3, 24)], {"1": LowRank(32, 24, 4), "9": LowRank(32, 24, 4)}, ValueError,
         "expected names of dense layers of the model, got ['1', '9']"),
        (Skips, [randn(3, 6)], {"used": LowRank(6, 6, 1), "unused": LowRank(6, 6, 1)}, ValueError,
         "the calibration data never reaches ['unused']; give data that does, or exclude these layers from the plan"),
        (mlp, [randn(3, 24), math.inf * randn(3, 24)], {"0": LowRank(32, 24, 4)}, FloatingPointError,
         "the input of layer '0' is not finite; check the calibration data and the dtype"),
        (lambda: nn.Sequential(mlp()), [math.nan * randn(3, 24)], {"0.2": LowRank(32, 32, 4)}, FloatingPointError,
         "the input of layer '0.2' is not finite"),
    ],
    ids=["no batches", "no such layer", "never called", "infinite input", "NaN on the way"],
)  # fmt: skip
def test_what_is_refused(
    make: Callable[[], nn.Module], batches: list[Tensor], plan: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        calibrate(make(), batches, plan, progress=False)


def test_a_structured_layer_is_no_dense_one() -> None:
    model = apply_plan_(mlp(), {"0": LowRank(32, 24, 4)})
    with pytest.raises(ValueError, match=r"expected names of dense layers of the model, got \['0'\]"):
        calibrate(model, [randn(3, 24)], {"0": LowRank(32, 24, 4)}, progress=False)


def test_masked_out_altogether() -> None:
    model, x = Stack(depth=2), sequences(1)[0]
    with pytest.raises(ValueError, match="expected at least one input vector, got none; every token is masked out"):
        calibrate(model, [{"x": x, "attention_mask": torch.zeros(4, 9)}], {"embed": LowRank(24, 12, 2)}, progress=False)


# The ridge


def sums_of(batches: list[Tensor], targets: list[Tensor] | None = None) -> MomentSums:
    sums = MomentSums()
    for k, batch in enumerate(batches):
        sums.add(batch, None if targets is None else targets[k])
    return sums


def correlated(tokens: int, N: int = 40, seed: int = 0) -> Tensor:
    """Inputs of which every other one follows from the rest, up to noise."""
    x = randn(tokens, N, seed=seed).double()
    mixing = randn(N // 2, N // 2, seed=77).double() / (N / 2) ** 0.5
    x[:, 1::2] = x[:, ::2] @ mixing + 0.5 * x[:, 1::2]
    return x


def test_many_tokens_need_a_small_ridge_and_few_a_large_one() -> None:
    ridges = [sums_of([correlated(size, seed=k) for k in range(10)]).moments().ridge for size in (2, 8, 2000)]
    assert ridges == sorted(ridges, reverse=True)
    assert ridges[0] >= 1e-1
    assert ridges[2] <= 1e-3
    assert set(ridges) <= set(RIDGES)


def test_the_ridge_is_the_one_that_predicts_held_out_data_best() -> None:
    batches = [correlated(12, N=10, seed=k) for k in range(2 * HELD_OUT_EVERY)]
    held = torch.cat([x for k, x in enumerate(batches) if k % HELD_OUT_EVERY == HELD_OUT_EVERY - 1])
    learnt = torch.cat([x for k, x in enumerate(batches) if k % HELD_OUT_EVERY != HELD_OUT_EVERY - 1])
    errors = []
    for ridge in RIDGES:
        known = learnt[:, ::2]
        penalty = torch.diag(ridge * known.square().sum(0))
        predictor = torch.linalg.solve(known.mT @ known + penalty, known.mT @ learnt[:, 1::2])
        rest = (held[:, 1::2] - held[:, ::2] @ predictor).square().sum(0)
        errors.append(float((rest / held[:, 1::2].square().sum(0)).sum()))
    assert sums_of(batches).moments().ridge == RIDGES[errors.index(min(errors))]


def test_without_a_second_part_the_ridge_is_the_default() -> None:
    for count in range(1, HELD_OUT_EVERY):
        assert sums_of([correlated(40, seed=k) for k in range(count)]).moments().ridge == DEFAULT_RIDGE
    assert sums_of([randn(9, 1, seed=k) for k in range(9)]).moments().ridge == DEFAULT_RIDGE  # nothing to predict from


@pytest.mark.parametrize("kind", ["zeros", "dead", "enormous", "constant"])
def test_hard_inputs_give_a_ridge(kind: str) -> None:
    batches = [correlated(20, seed=k) for k in range(10)]
    for x in batches:
        if kind == "zeros":
            x.zero_()
        elif kind == "dead":
            x[:, 3:8] = 0
        elif kind == "enormous":
            x[:, 4] *= 1e6
        else:
            x[:] = 1
    moments = sums_of(batches).moments()
    assert moments.ridge in RIDGES
    _, second_moment = moments.problem(randn(5, 40))
    assert torch.isfinite(second_moment).all()
    assert torch.linalg.eigvalsh(second_moment)[0] > 0


def test_held_out_batches_count_too() -> None:
    batches = [randn(6, 8, seed=k) for k in range(11)]
    assert_moments(sums_of(batches).moments(), torch.cat(batches))


def test_memory_is_counted() -> None:
    sums = sums_of([randn(9, 8)])
    assert sums.nbytes == 8 * (8 * 8 + 8 + 1)
    sums = sums_of([randn(9, 8)], [randn(9, 8)])
    assert sums.nbytes == 8 * (2 * (8 * 8 + 8) + 2)
    assert sums_of([randn(6, 8)]).nbytes == 8 * (8 * 8 + 8 + 1 + 6 * 8)  # the vectors too, while they are few
    other = sums_of([randn(9, 8)], [randn(9, 8, seed=1)])
    assert other.moments().nbytes == 8 * 2 * (8 * 8 + 8)


# The problem


def crossed(N: int = 10, tokens: int = 300) -> tuple[Tensor, Tensor, Moments]:
    """Inputs ``x``, the dense network's ``t``, both with means, and their moments without a ridge."""
    t = correlated(tokens, N) + 2
    x = t + 0.3 * randn(tokens, N, seed=8) @ randn(N, N, seed=9) - 1
    moments = sums_of([x], [t]).moments()
    return x, t, Moments(tokens, moments.second_moment, moments.mean, moments.cross, moments.target_mean, ridge=0.0)


def test_cross_moments_are_those_of_both_inputs() -> None:
    x, t, moments = crossed()
    assert moments.cross is not None
    assert moments.target_mean is not None
    torch.testing.assert_close(moments.cross, t.mT @ x / len(x))
    torch.testing.assert_close(moments.target_mean, t.mean(0))


@pytest.mark.parametrize("centred", [False, True])
def test_the_problem_is_least_squares_on_the_samples(centred: bool) -> None:
    x, t, moments = crossed()
    weight = randn(6, 10).double()
    y = t @ weight.mT
    design = torch.cat([x, torch.ones(len(x), 1).double()], 1) if centred else x
    expected = torch.linalg.lstsq(design, y).solution.mT
    target, second_moment = moments.problem(weight, centred=centred)
    torch.testing.assert_close(target, expected[:, :10], rtol=1e-6, atol=1e-8)
    if centred:
        bias = randn(6).double()
        torch.testing.assert_close(moments.bias(bias, weight, target), bias + expected[:, 10], rtol=1e-6, atol=1e-8)
    deviations = x - x.mean(0) if centred else x
    torch.testing.assert_close(second_moment, deviations.mT @ deviations / len(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_the_loss_of_any_approximation_is_that_of_the_problem_but_for_a_constant(centred: bool, same: bool) -> None:
    x, t, moments = crossed()
    if same:
        t = x
        moments = Moments(len(x), moments.second_moment, moments.mean, ridge=0.0)
    weight, bias = randn(6, 10).double(), randn(6).double()
    target, second_moment = moments.problem(weight, centred=centred)
    gaps = []
    for seed in range(3):
        approximation = weight + randn(6, 10, seed=seed).double()
        E = target - approximation
        own = moments.bias(bias, weight, approximation) if centred else bias
        rest = (t @ weight.mT + bias) - (x @ approximation.mT + own)
        gaps.append(float(rest.square().sum(1).mean() - torch.trace(E @ second_moment @ E.mT)))
    assert gaps == pytest.approx([gaps[0]] * 3, rel=1e-8, abs=1e-9)
    if same:
        assert gaps[0] == pytest.approx(0, abs=1e-9)
        assert target is weight


def test_the_bias_makes_the_mean_output_right() -> None:
    x, t, moments = crossed()
    weight, approximation, bias = randn(6, 10), randn(6, 10, seed=1), randn(6, seed=2)
    new = moments.bias(bias, weight, approximation)
    assert new.dtype == torch.float32
    wanted = (t @ weight.double().mT + bias).mean(0)
    torch.testing.assert_close((x @ approximation.double().mT + new).mean(0), wanted, rtol=0, atol=1e-5)


def test_directions_without_data_stay_as_they_are() -> None:
    x, t, _ = crossed()
    x[:, [2, 5]] = 0
    t[:, [2, 5]] = 0
    weight = randn(6, 10).double()
    target, second_moment = sums_of([x], [t]).moments().problem(weight)
    torch.testing.assert_close(target[:, [2, 5]], weight[:, [2, 5]])
    assert torch.linalg.eigvalsh(second_moment)[0] > 0


def test_the_target_keeps_the_dtype_of_the_weight() -> None:
    _, _, moments = crossed()
    target, second_moment = moments.problem(randn(6, 10).bfloat16())
    assert (target.dtype, second_moment.dtype) == (torch.bfloat16, torch.float64)


@pytest.mark.parametrize("constant", [1.0, 1e4, 1e6])
@pytest.mark.parametrize("ridge", [RIDGES[0], DEFAULT_RIDGE])
def test_a_constant_input_does_not_break_the_centred_problem(constant: float, ridge: float) -> None:
    x, t, _ = crossed()
    x[:, 4], t[:, 4], x[:, 5], t[:, 5] = constant, constant, constant, constant
    moments = sums_of([x], [t]).moments()
    moments = Moments(moments.tokens, moments.second_moment, moments.mean, moments.cross, moments.target_mean, ridge)
    weight = randn(6, 10).double()
    target, _ = moments.problem(weight, centred=True)
    assert torch.isfinite(target).all()
    design = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    best = torch.linalg.lstsq(design, t @ weight.mT, driver="gelsd").solution
    noise = (t @ weight.mT - design @ best).square().mean()
    rest = t @ weight.mT - x @ target.mT
    assert float(rest.var(0, correction=0).mean()) < 1.5 * float(noise) + 1e-3
    assert float(target.norm()) < 10 * float(weight.norm())


def test_formats_do_not_matter_to_calibration() -> None:
    model, x = mlp(), randn(5, 24)
    one, other = (
        calibrate(model, [x], {"2": f}, progress=False) for f in (LowRank(32, 32, 1), BlockDiagonal(32, 32, 4))
    )
    assert torch.equal(one["2"].second_moment, other["2"].second_moment)


def test_inputs_that_differ_by_rounding_alone_count_as_equal() -> None:
    x = randn(300, 10)
    for size, crossed_too in ((1e-6, False), (1e-2, True)):
        moments = sums_of([x], [x + size * randn(300, 10, seed=1)]).moments()
        assert (moments.cross is not None) == (moments.target_mean is not None) == crossed_too
