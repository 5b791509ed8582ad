"""Refinement: what it minimises, that it never makes things worse, and what it leaves alone."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_sequential import low_rank_plan
from torch import Tensor, nn

from small_networks import Block, Stack, padding, sequences, snapshot
from structmat import Blast, Fit, LowRank, Refinement, compress_
from structmat.compress.refinement import refined
from structmat.compress.states import Block as CompressedBlock
from structmat.compress.states import States
from structmat.compress.store import FitStore
from structmat.compress.tasks import FitBar
from structmat.fit import TruncatedSvd
from structmat.network.masks import SHAPE_RULE, BatchMasks
from structmat.network.surgery import put_fits_

WIDTH = 12
LIVELY = Refinement(steps=60, learning_rate=1e-2)


class Case:
    """A block with room for refinement: all its layers are fitted to their weights alone."""

    def __init__(self, *, bias: bool = True, masked: bool = False, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.dense = Block(WIDTH, bias=bias).to(dtype).requires_grad_(False).eval()
        self.compressed = copy.deepcopy(self.dense)
        self.fits: dict[str, Fit] = {}
        for name in ("query", "value", "out", "up", "down"):
            layer = self.dense.get_submodule(name)
            weight, own = layer.get_parameter("weight"), layer.bias
            fit = TruncatedSvd()(weight, LowRank(*weight.shape, 3))
            keeps = name == "up" or own is None  # one layer whose bias is to stay
            self.fits[name] = Fit(
                fit.format, fit.factors, fit.error, output_error=0.5, bias=None if keeps else own.detach().clone()
            )
        put_fits_(self.compressed, self.fits)
        self.inputs = [x.to(dtype) for x in sequences(20)]
        self.masks = [padding().bool() if masked else None for _ in self.inputs]
        self.targets = [self.dense(x) for x in self.inputs]
        self.calls = 0

    def forward(self, block: nn.Module, x: Tensor, i: int) -> Any:
        self.calls += 1
        return block(x)

    def refined(self, settings: Refinement = LIVELY, store: FitStore | None = None) -> dict[str, Fit]:
        with torch.no_grad(), FitBar({"refinement": 1.0}, show=False) as bar:
            kept = [{} if mask is None else {"attention_mask": mask} for mask in self.masks]
            batch_masks = [BatchMasks(one, default=SHAPE_RULE) for one in kept]
            states = States(self.inputs, self.inputs, batch_masks)
            block = CompressedBlock("", self.dense, self.compressed, states, self.forward)
            return refined(block, self.fits, {i: [t] for i, t in enumerate(self.targets)}, settings, store, bar)

    @torch.no_grad()
    def held_out_error(self, fits: Mapping[str, Fit], settings: Refinement = LIVELY) -> float:
        """Mean squared error over mean energy, held-out batch by batch, in float32."""
        block = copy.deepcopy(self.compressed).float()
        for name, fit in fits.items():
            module = block.get_submodule(name)
            for key, factor in fit.factors.items():
                module.get_parameter(key).copy_(factor)
            if fit.bias is not None:
                module.get_parameter("bias").copy_(fit.bias)
        losses = []
        for i in settings.split(len(self.inputs))[1]:
            counts = torch.ones(self.inputs[i].shape[:2], dtype=torch.bool) if self.masks[i] is None else self.masks[i]
            target = self.targets[i].float()[counts]
            output = block(self.inputs[i].float())[counts]
            losses.append(float((output - target).square().sum() / target.square().sum()))
        return (sum(losses) / len(losses)) ** 0.5


def equal(one: Mapping[str, Fit], other: Mapping[str, Fit]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(factor, other[name].factors[n]) for name, fit in one.items() for n, factor in fit.factors.items()
    )


@pytest.mark.parametrize("masked", [False, True])
def test_it_improves_where_there_is_room(masked: bool) -> None:
    case = Case(masked=masked)
    fits = case.refined()
    assert case.held_out_error(fits) < 0.8 * case.held_out_error(case.fits)
    for name, fit in fits.items():
        start = case.fits[name]
        assert fit.format == start.format
        assert not any(torch.equal(factor, start.factors[n]) for n, factor in fit.factors.items())
        assert not any(factor.requires_grad for factor in fit.factors.values())
        assert (fit.error, fit.output_error) == (start.error, start.output_error)


@pytest.mark.parametrize("rate", [1e-6, 1e-4, 1e-2, 0.3, 10.0, 1e6])
def test_it_is_never_worse_than_the_start(rate: float) -> None:
    case = Case()
    settings = Refinement(steps=12, learning_rate=rate)
    fits = case.refined(settings)
    assert case.held_out_error(fits, settings) <= case.held_out_error(case.fits, settings) * (1 + 1e-5)
    if rate >= 10:
        assert equal(fits, case.fits)


def test_biases_that_fits_bring_are_tuned_and_others_stay() -> None:
    case = Case()
    fits = case.refined()
    for name, fit in fits.items():
        if name == "up":
            assert fit.bias is None
        else:
            assert fit.bias is not None
            assert fit.bias.shape == case.fits[name].bias.shape  # pyright: ignore
            assert not torch.equal(fit.bias, case.fits[name].bias)  # pyright: ignore
            assert not fit.bias.requires_grad
    assert not any(fit.bias is not None for fit in Case(bias=False).refined(Refinement(steps=3)).values())


def test_the_block_and_the_fits_are_left_alone() -> None:
    case = Case()
    before, values = snapshot(case.compressed), copy.deepcopy(case.compressed.state_dict())
    factors = {name: copy.deepcopy(fit.factors) for name, fit in case.fits.items()}
    fits = case.refined()
    assert snapshot(case.compressed) == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in case.compressed.state_dict().items())
    for name, fit in case.fits.items():
        assert all(torch.equal(factor, factors[name][n]) for n, factor in fit.factors.items())
        assert not any(torch.equal(factor, factors[name][n]) for n, factor in fits[name].factors.items())


def test_padding_does_not_count() -> None:
    case, other = Case(masked=True), Case(masked=True)
    for target in other.targets:
        target[~padding().bool()] = 1e3
    assert equal(case.refined(Refinement(steps=10)), other.refined(Refinement(steps=10)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_precisions(dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    fits = case.refined()
    assert {factor.dtype for fit in fits.values() for factor in fit.factors.values()} == {dtype}
    assert {fit.bias.dtype for fit in fits.values() if fit.bias is not None} == {dtype}
    assert case.held_out_error(fits) < 0.9 * case.held_out_error(case.fits)


def test_a_seed_decides_the_order_and_so_the_bits() -> None:
    one, same, other = (Case().refined(Refinement(steps=9, learning_rate=1e-2, seed=seed)) for seed in (0, 0, 1))
    assert equal(one, same)
    assert not equal(one, other)


def test_the_random_state_of_the_caller_is_left_alone() -> None:
    case = Case()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    case.refined(Refinement(steps=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_store_keeps_what_was_refined(tmp_path: Path) -> None:
    store, settings = FitStore(tmp_path), Refinement(steps=5, learning_rate=1e-2)
    first = Case().refined(settings, store)
    again = Case()
    second = again.refined(settings, store)
    assert again.calls == 0
    assert equal(first, second)
    for name, fit in first.items():
        kept = second[name].bias
        assert (fit.bias is None and kept is None) or torch.equal(fit.bias, kept)  # pyright: ignore
    for change in ("settings", "target", "weight", "input"):
        case = Case()
        if change == "target":
            case.targets[3] = case.targets[3] + 1e-3
        elif change == "weight":
            case.compressed.norms[0].weight[0] += 1e-3
        elif change == "input":
            case.inputs[2] = case.inputs[2] + 1e-3
        case.refined(Refinement(steps=6, learning_rate=1e-2) if change == "settings" else settings, store)
        assert case.calls > 0


def test_an_interrupt_leaves_nothing_in_the_store(tmp_path: Path) -> None:
    class Interrupted(Case):
        def forward(self, block: nn.Module, x: Tensor, i: int) -> Any:
            if self.calls > 10:
                raise KeyboardInterrupt
            return super().forward(block, x, i)

    with pytest.raises(KeyboardInterrupt):
        Interrupted().refined(store=FitStore(tmp_path))
    assert list(tmp_path.iterdir()) == []


# Within compress_


class Attention(nn.Module):
    """Attention that hands the mask as it is to the fused operator, which wants it in its own dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (layer(x)[:, None] for layer in (self.query, self.key, self.value))
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, bias)[:, 0])


class Masked(nn.Module):
    """Blocks that get an additive mask in the network's dtype."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 24)
        blocks = [Attention() for _ in range(2)]
        self.blocks = nn.ModuleList([blocks[0]] * 2 if shared else blocks)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(x)
        bias = torch.where(attention_mask.bool(), 0.0, -1e4).to(x.dtype)[:, None, None]
        for block in self.blocks:
            x = block(x, bias)
        return x


@pytest.mark.parametrize("kind", ["chain", "whole"])
@pytest.mark.parametrize("form", ["mapping", "tuple"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_network_of_another_precision_with_a_mask_of_its_dtype(kind: str, form: str, dtype: torch.dtype) -> None:
    model = Masked(shared=kind == "whole").to(dtype)
    pairs = [(x.to(dtype), padding()) for x in sequences(4)]
    batches = [{"x": x, "attention_mask": mask} if form == "mapping" else (x, mask) for x, mask in pairs]
    fits = compress_(model, low_rank_plan(model), batches=batches, refine=Refinement(steps=3), progress=False)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(torch.isfinite(factor).all() for fit in fits.values() for factor in fit.factors.values())


def test_errors_are_measured_again() -> None:
    dense = Stack(depth=2)
    model = copy.deepcopy(dense)
    fits = compress_(model, low_rank_plan(dense), batches=sequences(8), refine=LIVELY, progress=False)
    for name, fit in fits.items():
        weight = dense.get_submodule(name).get_parameter("weight").detach()
        matrix = model.get_submodule(name).to_dense().detach()  # pyright: ignore
        assert fit.error == pytest.approx(float((weight - matrix).norm() / weight.norm()), rel=1e-4)


def test_put_fits_replaces_layers_and_biases() -> None:
    model = Stack(depth=2)
    kept = model.head.bias
    formats = {"embed": LowRank(24, 12, 4), "blocks.0.up": Blast(48, 24, 4, 4), "head": LowRank(16, 24, 4)}
    fits = {
        name: Fit(format, format.init(), 0.0, bias=None if name == "head" else torch.full((format.M,), 0.5))
        for name, format in formats.items()
    }
    put_fits_(model, fits)
    for name, format in formats.items():
        layer = model.get_submodule(name)
        assert layer.format == format
        assert all(torch.equal(f, fits[name].factors[n]) for n, f in layer.factors.items())  # pyright: ignore
    assert model.head.bias is kept
    assert torch.equal(model.embed.bias, torch.full((24,), 0.5))


# The settings


@given(st.integers(2, 300), st.floats(0.001, 0.999))
def test_batches_are_split_into_two_parts(count: int, share: float) -> None:
    learn, held = Refinement(held_out=share).split(count)
    assert sorted(learn + held) == list(range(count))
    assert held
    assert learn
    assert len(held) == pytest.approx(share * count, abs=1)


def test_held_out_batches_are_spread_evenly() -> None:
    assert Refinement(held_out=0.1).split(20)[1] == [5, 15]
    assert Refinement(held_out=0.5).split(6)[1] == [1, 3, 5]
    assert Refinement().split(2) == ([0], [1])


@pytest.mark.parametrize("count", [0, 1])
def test_it_needs_two_batches(count: int) -> None:
    Refinement().check_batches(2)
    with pytest.raises(
        ValueError, match=f"expected at least 2 batches to refine on, those of one step held out, got {count}"
    ):
        Refinement().check_batches(count)
    Refinement(batches=3).check_batches(4)
    with pytest.raises(ValueError, match="expected at least 4 batches to refine on, those of one step held out, got 3"):
        Refinement(batches=3).check_batches(3)


@pytest.mark.parametrize("masked", [False, True])
def test_a_step_on_several_batches_is_one_on_all_of_their_rows(masked: bool) -> None:
    case, other = Case(masked=masked), Case(masked=masked)
    for k, x in enumerate(case.inputs):
        x *= 1 + k  # so that the energies differ
    case.targets = [case.dense(x) for x in case.inputs]
    other.inputs = [torch.cat(case.inputs[k : k + 4]) for k in range(0, 20, 4)]
    other.targets = [other.dense(x) for x in other.inputs]
    other.masks = [torch.cat([padding().bool()] * 4) if masked else None for _ in other.inputs]
    settings = Refinement(steps=12, learning_rate=1e-2)
    fits = case.refined(Refinement(steps=12, learning_rate=1e-2, batches=4))
    expected = other.refined(settings)
    assert not equal(expected, other.fits)
    for name, fit in fits.items():
        for key, factor in fit.factors.items():
            torch.testing.assert_close(factor, expected[name].factors[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "expected steps to be an integer of at least 1, got 0"),
        ({"batches": 0}, "expected batches to be an integer of at least 1, got 0"),
        ({"learning_rate": 0.0}, "expected a positive learning_rate, got 0.0"),
        ({"learning_rate": float("nan")}, "expected a positive learning_rate, got nan"),
        ({"held_out": 0.0}, "expected held_out to be in (0, 1), got 0.0"),
        ({"held_out": 1.0}, "expected held_out to be in (0, 1), got 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Refinement(**settings)
