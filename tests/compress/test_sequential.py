"""Compression in sequence: against a plain reading of it that knows no blocks, and what happens on the way."""

import copy
import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from chains import ResNet, Variant, transformer, transformer_batch
from small_networks import Stack, Tied, mlp, padding, sequences, snapshot
from structmat import (
    Blast,
    Dense,
    Fit,
    Format,
    LowRank,
    Monarch,
    Plan,
    Refinement,
    StructuredLinear,
    calibrate,
    compress_,
    default_method,
    make_plan,
    report,
)
from structmat.compress import block as block_module
from structmat.fit import TruncatedSvd
from structmat.fit.moments import Moments, MomentSums
from structmat.network.calls import tensor_of
from structmat.network.chain import find_chain
from structmat.network.sites import find_sites
from structmat.network.surgery import put_fits_
from structmat.nn import unfolded


def call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def vectors_of(model: nn.Module, names: tuple[str, ...], batch: Any) -> Tensor:
    """What the layer of these names reads in one call, ``(T, N)``, padding left out; float64."""
    seen: list[Tensor] = []
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if x.ndim == 4:
            x = unfolded(module, x)[0]  # pyright: ignore
        counts = mask is not None and mask.shape == x.shape[:-1]
        seen.append(x[mask.bool()] if counts else x.flatten(0, -2))

    modules = {id(m): m for m in map(model.get_submodule, names)}
    handles = [module.register_forward_pre_hook(note) for module in modules.values()]
    call(model, batch)
    for handle in handles:
        handle.remove()
    return torch.cat(seen).double()


def order_of(model: nn.Module, names: Mapping[str, tuple[str, ...]], batch: Any) -> list[str]:
    """The layers in the order in which they are first called."""
    called: list[str] = []
    handles = [
        model.get_submodule(user).register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, users in names.items()
        for user in users
    ]
    call(model, batch)
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(called))


def output_error(target: Tensor, fit: Fit, moments: Moments, centred: bool) -> float:
    """The error of the output under the data itself, without a ridge."""
    second = moments.second_moment - centred * torch.outer(moments.mean, moments.mean)
    W, W_hat = target.detach().double(), fit.format.to_dense(fit.factors).detach().double()
    loss, energy = (((one @ second) * one).sum() for one in (W - W_hat, W))
    return float((loss.clamp_min(0) / energy).sqrt())


@torch.no_grad()
def naive(model: nn.Module, plan: Mapping[str, Format], batches: list[Any]) -> dict[str, Fit]:
    """Layer by layer in the whole network: each on what the compressed layers before it give, with the bias set."""
    model = model.eval()
    work = copy.deepcopy(model)
    sites = {name: site for site in find_sites(model).values() for name in site.names if name in plan}
    names = {name: site.names for name, site in sites.items() if not isinstance(plan[name], Dense)}
    fits: dict[str, Fit] = {}
    for name in order_of(model, names, batches[0]):
        sums = MomentSums()
        for batch in batches:
            x, t = (vectors_of(network, names[name], batch) for network in (work, model))
            sums.add(x, t)
        moments = sums.moments()
        site = sites[name]
        target, second_moment = moments.problem(site.matrix, centred=site.own_bias is not None)
        fit = default_method(plan[name])(target, plan[name], second_moment=second_moment)
        bias = site.own_bias
        if bias is not None:
            bias = moments.bias(bias, site.matrix, plan[name].to_dense(fit.factors))
        error = output_error(target, fit, moments, centred=site.own_bias is not None)
        fits[name] = Fit(plan[name], fit.factors, fit.error, output_error=error, bias=bias)
        # the copy's bias is its own, so that setting it leaves the dense network alone
        put_fits_(work, {name: fits[name]})
    return fits


def assert_same(model: nn.Module, fits: Mapping[str, Fit], expected: Mapping[str, Fit]) -> None:
    assert fits.keys() == expected.keys()
    for name, fit in fits.items():
        wanted = expected[name].format.to_dense(expected[name].factors)
        layer = model.get_submodule(name)
        size = float(wanted.abs().max())
        torch.testing.assert_close(layer.to_dense(), wanted, rtol=0, atol=5e-3 * size)
        assert fit.output_error == pytest.approx(expected[name].output_error, rel=1e-2, abs=1e-4)
        if expected[name].bias is not None:
            torch.testing.assert_close(fit.bias, expected[name].bias, rtol=0, atol=5e-3)
            torch.testing.assert_close(layer.bias, fit.bias)
        else:
            assert fit.bias is None


def low_rank_plan(model: nn.Module, keep: float = 0.6) -> Plan:
    """Low rank for every layer that can have it."""
    return make_plan(model, {r".*": LowRank}, keep=keep)


def chain_exists(model: nn.Module, batch: Any) -> bool:
    with torch.no_grad():
        names = {name: site.names for name, site in find_sites(model).items() if site.problem is None}
        return find_chain(model.eval(), names, batch) is not None


def masked(count: int) -> list[dict[str, Tensor]]:
    return [{"x": x, "attention_mask": padding()} for x in sequences(count)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("returns_tuple", [True, False])
def test_a_chain_is_compressed_as_the_plain_reading_says(bias: bool, returns_tuple: bool) -> None:
    model, batches = Stack(depth=2, returns_tuple=returns_tuple, bias=bias).double(), masked(6)
    batches = [{**batch, "x": batch["x"].double()} for batch in batches]
    assert chain_exists(model, batches[0])
    plan = low_rank_plan(model)
    assert {"embed", "blocks.0.query", "head"} <= set(plan)
    expected = naive(copy.deepcopy(model), plan, batches)
    assert_same(model, compress_(model, plan, batches=batches, progress=False), expected)


NOT_CHAINS = {
    "perceptron": (mlp, lambda: [torch.randn(20, 24) for _ in range(6)]),
    "tied": (Tied, lambda: [torch.randn(20, 24) for _ in range(6)]),
    "residual": (ResNet, lambda: [torch.randn(2, 3, 8, 8) for _ in range(6)]),
    "long skip": (lambda: Variant("long skip"), lambda: sequences(6)),
}


@pytest.mark.parametrize(("make", "data"), list(NOT_CHAINS.values()), ids=list(NOT_CHAINS))
def test_what_is_no_chain_is_compressed_as_the_plain_reading_says(make: Any, data: Any) -> None:
    model = make().double()
    batches = [x.double() for x in data()]
    assert not chain_exists(model, batches[0])
    plan = low_rank_plan(model)
    expected = naive(copy.deepcopy(model), plan, batches)
    assert_same(model, compress_(model, plan, batches=batches, progress=False), expected)


def test_a_block_that_is_called_many_times() -> None:
    model, batches = Variant("one block many times").double(), [x.double() for x in sequences(6)]
    assert not chain_exists(model, batches[0])
    # not the layers that read one input: the plain reading would see what compressing the first does in the next call
    plan = {"embed": LowRank(24, 12, 4), "blocks.0.out": LowRank(24, 24, 4), "blocks.0.down": LowRank(24, 48, 6)}
    expected = naive(copy.deepcopy(model), plan, batches)
    assert_same(model, compress_(model, plan, batches=batches, progress=False), expected)


@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        "GPT2LMHeadModel",
        "BertForSequenceClassification",
        "ViTForImageClassification",
        "AlbertForMaskedLM",
        "T5ForConditionalGeneration",
    ],
)
def test_models_of_transformers_are_compressed_as_the_plain_reading_says(name: str) -> None:
    model = transformer(name).double()
    batches = [transformer_batch(model, seed) for seed in range(4)]
    batches = [{n: t.double() if t.is_floating_point() else t for n, t in batch.items()} for batch in batches]
    plan = make_plan(model, {r".*(proj|attn|query|value|ffn|wi|wo|SelfAttention\.[qo]|dense)": LowRank}, keep=0.6)
    assert len(plan) >= 4
    config = copy.deepcopy(model.config)
    expected = naive(copy.deepcopy(model), plan, batches)
    assert_same(model, compress_(model, plan, batches=batches, progress=False), expected)
    assert getattr(model.config, "use_cache", None) == getattr(config, "use_cache", None)


def test_several_formats_and_layers_that_stay() -> None:
    model, batches = Stack(depth=2), masked(5)
    formats = {r".*\.(query|up)": Monarch, r".*\.(value|down)": Blast, r".*\.out": LowRank}
    plan = dict(make_plan(model, formats, blocks=2, keep=0.6)) | {"blocks.1.key": Dense(24, 24)}
    kept = [model.embed, model.blocks[0].key, model.blocks[1].key, model.head]
    fits = compress_(model, plan, batches=batches, progress=False)
    assert list(fits) == [name for name in plan if name != "blocks.1.key"]
    for name, fit in fits.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, StructuredLinear)
        assert layer.format == plan[name]
        assert all(torch.equal(layer.factors[n], factor) for n, factor in fit.factors.items())
        assert fit.bias is not None
        assert torch.equal(layer.bias, fit.bias)  # pyright: ignore
        assert fit.output_error is not None
        assert 0 < fit.output_error < 1
    assert kept == [model.embed, model.blocks[0].key, model.blocks[1].key, model.head]


def test_blocks_without_planned_layers_are_passed() -> None:
    model, batches = Stack(depth=3), masked(5)
    plan = {f"blocks.2.{name}": LowRank(24, 24, 4) for name in ("query", "out")}
    expected = naive(copy.deepcopy(model), plan, batches)
    assert_same(model, compress_(model, plan, batches=batches, progress=False), expected)


def test_no_data_flows_behind_the_last_planned_block() -> None:
    model, batches, called = Stack(depth=4), masked(5), list[int]()
    reference = copy.deepcopy(model)
    plan = {"blocks.1.up": LowRank(48, 24, 4)}
    for k, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, k=k: called.append(k))
    fits = compress_(model, plan, batches=batches, progress=False)
    assert called.count(0) >= called.count(3) + len(batches)  # to find the chain, all blocks are called
    assert called.count(2) == called.count(3) < len(batches)
    assert_same(model, fits, naive(reference, plan, batches))


@pytest.mark.parametrize("kept", [0, 10**12], ids=["computed again", "kept"])
def test_memory_does_not_change_the_result(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = Stack(depth=2), masked(5)
    plan = low_rank_plan(model)
    expected = compress_(copy.deepcopy(model), plan, batches=batches, progress=False)
    monkeypatch.setattr(block_module, "KEPT_BYTES", kept)
    fits = compress_(model, plan, batches=batches, progress=False)
    for name, fit in fits.items():
        assert all(torch.equal(factor, expected[name].factors[n]) for n, factor in fit.factors.items())


def test_how_data_is_cut_into_batches_matters_only_for_the_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("structmat.fit.moments"), "RIDGES", (1e-2,))
    model, x = Stack(depth=2).double(), torch.cat(sequences(12)).double()
    plan, outputs = low_rank_plan(model), []
    for size in (4, 12, 48):
        work = copy.deepcopy(model)
        compress_(work, plan, batches=list(x.split(size)), progress=False)
        outputs.append(work(x[:5]).detach())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "form", [lambda x, mask: (x, mask), lambda x, mask: [x, mask], lambda x, mask: {"x": x, "attention_mask": mask}]
)
def test_forms_of_a_batch(form: Any) -> None:
    model, ones = Stack(depth=2), torch.ones(4, 9).long()
    plan = low_rank_plan(model)
    expected = compress_(copy.deepcopy(model), plan, batches=sequences(3), progress=False)
    fits = compress_(model, plan, batches=(form(x, ones) for x in sequences(3)), progress=False)
    for name, fit in fits.items():
        assert fit.output_error == pytest.approx(expected[name].output_error, rel=1e-3)


# What it is for


def redundant(depth: int = 4) -> Stack:
    """A network whose weights have a spectrum that decays."""
    model = Stack(depth=depth)
    with torch.no_grad():
        for layer in model.modules():
            if type(layer) is nn.Linear:
                U, S, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
                layer.weight.copy_(3 * U * S.max() * torch.arange(1, len(S) + 1).pow(-0.7) @ Vh)
    return model.eval()


@torch.no_grad()
def final_error(model: nn.Module, dense: nn.Module, batches: list[Any]) -> float:
    outputs, targets = (
        torch.cat([tensor_of(call(m, batch)).flatten(0, -2) for batch in batches]) for m in (model, dense)
    )
    return float((outputs - targets).norm() / targets.norm())


def test_each_step_is_better_than_the_one_before() -> None:
    dense, batches, fresh = redundant(), sequences(40), sequences(10, seed=1)
    plan = low_rank_plan(dense, 0.4)
    plain, aware, sequential, tuned = (copy.deepcopy(dense) for _ in range(4))
    compress_(plain, plan, progress=False)
    compress_(aware, plan, calibration=calibrate(dense, batches, plan, progress=False), progress=False)
    compress_(sequential, plan, batches=batches, progress=False)
    compress_(tuned, plan, batches=batches, refine=Refinement(steps=60, learning_rate=1e-2), progress=False)
    errors = [final_error(model, dense, fresh) for model in (plain, aware, sequential, tuned)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.97 * errors[1]
    assert errors[3] < 0.998 * errors[2]  # little is left where every layer has its best fit


def test_moments_of_all_layers_at_once_give_fits_and_biases() -> None:
    model, batches = Stack(depth=2), masked(5)
    plan = low_rank_plan(model)
    moments = calibrate(model, batches, plan, progress=False)
    dense = copy.deepcopy(model)
    fits = compress_(model, plan, calibration=moments, progress=False)
    assert list(fits) == list(plan)
    for name, fit in fits.items():
        weight, bias = dense.get_submodule(name).weight, dense.get_submodule(name).bias
        target, second_moment = moments[name].problem(weight, centred=True)
        expected = TruncatedSvd()(target, plan[name], second_moment=second_moment)
        assert fit.output_error == pytest.approx(output_error(target, expected, moments[name], True), rel=1e-3)
        E = (weight - model.get_submodule(name).to_dense()).detach()
        torch.testing.assert_close(fit.bias, bias + E @ moments[name].mean.float(), rtol=0, atol=1e-4)
        assert torch.equal(model.get_submodule(name).bias, fit.bias)
        assert fit.error == pytest.approx(float(E.norm() / weight.detach().norm()), rel=1e-4)


# What is left as it was


@dataclass(frozen=True)
class Counting(TruncatedSvd):
    """Counts the weights that it fits, and can be interrupted at one of its calls."""

    calls: ClassVar[list[int]] = []
    interrupt_at: ClassVar[list[int]] = []

    def fit_many(self, weights: Any, format: Any, **options: Any) -> list[Fit]:
        if len(self.calls) in self.interrupt_at:
            raise KeyboardInterrupt
        self.calls.append(len(weights))
        return super().fit_many(weights, format, **options)


@pytest.fixture
def counting() -> Counting:
    Counting.calls.clear()
    Counting.interrupt_at.clear()
    return Counting()


REFINE = Refinement(steps=3)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal_states(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("at", [0, 1, 3, 6, 9])
@pytest.mark.parametrize("kind", ["chain", "whole"])
def test_an_interrupt_leaves_everything_as_it_was(counting: Counting, at: int, kind: str) -> None:
    model = (Stack(depth=2) if kind == "chain" else Variant("long skip")).train()
    model.blocks[1].eval()
    model.config = SimpleNamespace(use_cache=True, other="x")
    before, values = snapshot(model), state(model)
    counting.interrupt_at.append(at)
    with pytest.raises(KeyboardInterrupt):
        compress_(model, low_rank_plan(model), method=counting, batches=masked(3), refine=REFINE, progress=False)
    assert len(counting.calls) == at
    assert snapshot(model) == before
    assert equal_states(state(model), values)
    assert vars(model.config) == {"use_cache": True, "other": "x"}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForSequenceClassification"])
def test_an_interrupt_leaves_the_configuration_of_transformers(counting: Counting, name: str) -> None:
    model = transformer(name)
    config, values = model.config.to_dict(), state(model)
    plan = make_plan(model, {r".*(q_proj|mlp.*|query|intermediate\.dense)": LowRank}, keep=0.5)
    counting.interrupt_at.append(3)
    with pytest.raises(KeyboardInterrupt):
        compress_(model, plan, method=counting, batches=[transformer_batch(model)], progress=False)
    assert model.config.to_dict() == config
    assert equal_states(state(model), values)


def test_an_input_that_is_not_finite_is_named_by_its_full_name() -> None:
    model = Stack(depth=2)
    with torch.no_grad():
        model.blocks[1].value.weight.mul_(1e20)
        model.blocks[1].value.weight[0, 0] = 3e38
    before, values = snapshot(model), state(model)
    bad = [100 * x for x in sequences(2)]
    plan = {f"blocks.1.{name}": LowRank(24, 24, 4) for name in ("query", "out")}
    plan |= {f"blocks.0.{name}": LowRank(24, 24, 4) for name in ("query", "key", "value", "out")}
    with pytest.raises(FloatingPointError, match=re.escape("the input of layer 'blocks.1.out' is not finite")):
        compress_(model, plan, batches=bad, progress=False)
    assert snapshot(model) == before
    assert equal_states(state(model), values)


def test_a_layer_in_a_block_that_is_never_called_is_named_by_its_full_name() -> None:
    model = Stack(depth=2)
    model.blocks[1].spare = nn.Linear(24, 24)
    plan = low_rank_plan(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"the calibration data never reaches \['blocks\.1\.spare'\]"):
        compress_(model, plan, batches=sequences(2), progress=False)
    assert snapshot(model) == before


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_carries_over(training: bool) -> None:
    model = Stack(depth=2).train(training)
    compress_(model, low_rank_plan(model), batches=sequences(2), refine=REFINE, progress=False)
    assert {module.training for module in model.modules()} == {training}
    assert all(p.requires_grad for p in model.parameters())


# The cache


@pytest.mark.parametrize("refine", [None, REFINE], ids=["fitted", "refined"])
@pytest.mark.parametrize("kind", ["chain", "whole"])
def test_a_second_run_takes_everything_from_the_cache(
    counting: Counting, tmp_path: Path, refine: Refinement | None, kind: str
) -> None:
    dense = Stack(depth=2) if kind == "chain" else Variant("long skip")
    plan, models = low_rank_plan(dense), [copy.deepcopy(dense) for _ in range(3)]
    options: dict[str, Any] = {"batches": masked(3), "refine": refine, "progress": False}
    without = compress_(models[0], plan, method=TruncatedSvd(), **options)
    first = compress_(models[1], plan, method=counting, cache=tmp_path, **options)
    count = len(counting.calls)
    assert count > 0
    second = compress_(models[2], plan, method=counting, cache=tmp_path, **options)
    assert len(counting.calls) == count
    assert equal_states(state(models[1]), state(models[0]))
    assert equal_states(state(models[2]), state(models[1]))
    for name, fit in second.items():
        assert (fit.error, fit.output_error) == (first[name].error, first[name].output_error)
        assert fit.error == without[name].error


@pytest.mark.parametrize("at", [1, 5, 9])
def test_an_interrupted_run_goes_on_to_the_same_bits(counting: Counting, tmp_path: Path, at: int) -> None:
    dense, batches = Stack(depth=2), masked(3)
    plan, whole, resumed = low_rank_plan(dense), copy.deepcopy(dense), copy.deepcopy(dense)
    compress_(whole, plan, method=TruncatedSvd(), batches=batches, refine=REFINE, progress=False)
    counting.interrupt_at.append(at)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            compress_(resumed, plan, method=counting, batches=batches, refine=REFINE, cache=tmp_path, progress=False)
    counting.interrupt_at.clear()
    compress_(resumed, plan, method=counting, batches=batches, refine=REFINE, cache=tmp_path, progress=False)
    assert equal_states(state(resumed), state(whole))
    reference = len(counting.calls)
    counting.calls.clear()
    compress_(copy.deepcopy(dense), plan, method=counting, batches=batches, progress=False)
    assert reference == len(counting.calls)  # nothing was fitted twice


@pytest.mark.parametrize("change", ["data", "mask", "weight"])
def test_the_cache_knows_what_a_fit_depends_on(counting: Counting, tmp_path: Path, change: str) -> None:
    dense, batches = Stack(depth=2), masked(3)
    plan = low_rank_plan(dense)
    options: dict[str, Any] = {"method": counting, "cache": tmp_path, "progress": False}
    one, other = copy.deepcopy(dense), copy.deepcopy(dense)
    compress_(one, plan, batches=batches, refine=REFINE, **options)
    counting.calls.clear()
    if change == "data":
        batches[1]["x"] = batches[1]["x"] + 1e-2
    elif change == "mask":
        batches[1]["attention_mask"] = torch.ones(4, 9).long()
    else:
        with torch.no_grad():
            dense.blocks[1].up.weight[0, 0] += 1
            other.blocks[1].up.weight[0, 0] += 1
    compress_(other, plan, batches=batches, refine=REFINE, **options)
    expected = copy.deepcopy(dense)
    compress_(expected, plan, method=TruncatedSvd(), batches=batches, refine=REFINE, progress=False)
    assert equal_states(state(other), state(expected))
    assert not equal_states(state(other), state(one))
    assert counting.calls


# Reports, dtypes, and what is refused


def test_a_report_of_the_fits() -> None:
    model = Stack(depth=2)
    fits = compress_(model, low_rank_plan(model), batches=masked(3), progress=False)
    assert "blocks.1.up" in str(report(model, fits=fits))


def test_bfloat16() -> None:
    dense, batches = redundant(2).bfloat16(), [x.bfloat16() for x in sequences(10)]
    plan = low_rank_plan(dense)
    aware, plain = copy.deepcopy(dense), copy.deepcopy(dense)
    fits = compress_(aware, plan, batches=batches, progress=False)
    compress_(plain, plan, progress=False)
    assert {p.dtype for p in aware.parameters()} == {torch.bfloat16}
    assert {fit.bias.dtype for fit in fits.values() if fit.bias is not None} == {torch.bfloat16}
    assert final_error(aware.float(), dense.float(), sequences(5)) < final_error(plain.float(), dense, sequences(5))


@pytest.mark.parametrize("make", [mlp, lambda: Stack(depth=2)], ids=["whole", "chain"])
def test_an_empty_plan_changes_nothing(make: Any) -> None:
    model = make()
    batches = sequences(2) if isinstance(model, Stack) else [torch.randn(3, 24)] * 2
    before = snapshot(model)
    for plan in (Plan({}), {next(n for n, m in model.named_modules() if type(m) is nn.Linear): None}):
        plan = Plan({n: Dense(*model.get_submodule(n).weight.shape) for n in plan})
        assert compress_(model, plan, batches=batches, refine=REFINE, progress=False) == {}
    assert snapshot(model) == before


def test_a_progress_bar_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    model = Stack(depth=2)
    compress_(copy.deepcopy(model), low_rank_plan(model), batches=sequences(2), progress=False)
    assert capsys.readouterr().err == ""
    compress_(model, low_rank_plan(model), batches=sequences(2), refine=REFINE)
    shown = capsys.readouterr().err
    assert "compress: 100%" in shown


PLAN = {"0": LowRank(32, 24, 4), "2": LowRank(32, 32, 4)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": {}, "batches": []},
         "expected calibration or batches, got both; a calibration is of all layers at once, batches in sequence"),
        ({"refine": REFINE},
         "expected batches to refine on, got none; pass batches=, a list of the network's inputs"),
        ({"refine": REFINE, "calibration": {}}, "expected batches to refine on, got none"),
        ({"calibration": {}},
         "expected the moments of every planned layer in the calibration, but those of ['0', '2'] are missing"),
        ({"batches": []}, "expected at least one batch of calibration data, got none"),
        ({"batches": [torch.zeros(3, 24)], "refine": REFINE},
         "expected at least 2 batches to refine on, those of one step held out, got 1"),
    ],
    ids=["both", "refine alone", "refine on moments", "missing moments", "no batches", "one batch"],
)  # fmt: skip
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        compress_(model, PLAN, progress=False, **options)
    assert snapshot(model) == before


def test_a_layer_that_the_data_never_reaches() -> None:
    model = Variant("skips one")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"the calibration data never reaches \['blocks\.1\.up'\]"):
        compress_(
            model,
            {"blocks.0.up": LowRank(48, 24, 4), "blocks.1.up": LowRank(48, 24, 4)},
            batches=sequences(2),
            progress=False,
        )
    assert snapshot(model) == before
