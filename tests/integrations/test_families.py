"""Every family of models that was tried: what is compressed, and block by block as if the network were one block."""

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, ONE_BLOCK, REASONS, Family, kind, table
from family_models import BATCHES, MODELS, Sizes, captioned, pairs, texts, with_image_tokens
from torch import Tensor, nn

from structmat import LowRank, Plan, calibrate, compress_, make_plan
from structmat.compress import api, sequential
from structmat.fit import Fit, TruncatedSvd
from structmat.network.calls import call, evaluating, tensors_of
from structmat.network.chain import Chain, list_of_blocks
from structmat.network.masks import masks_of
from structmat.network.sites import find_sites
from structmat.network.staying import unseen_weights
from structmat.nn import SplitModule

PAGE = Path(__file__).parents[2] / "docs" / "compression.md"
FEW = "the calibration data gives fewer vectors"
LOST = re.compile(r"the vectors of \[(.*)\] depend on padding, but no mask of the batch fits")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


def each_of(names: Iterable[str]) -> pytest.MarkDecorator:
    """Run a test for these families; the quick suite leaves most of them out."""
    marks = {name: () if FAMILIES[name].quick else pytest.mark.slow for name in names}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, mark in marks.items()])


each_family = each_of(FAMILIES)
each_padded_family = each_of(
    name
    for name, (_, batch) in MODELS.items()
    if FAMILIES[name].layers and batch in (texts, pairs, captioned, with_image_tokens)
)


def built(name: str) -> tuple[nn.Module, list[Any], Plan]:
    """A random model of a family, its batches, and a plan for everything that can be low-rank."""
    make, batch = MODELS[name]
    torch.manual_seed(0)
    model = make(Sizes.of(name)).eval()
    batches = [batch(number) for number in range(BATCHES)]
    return model, batches, make_plan(model, LowRank, keep=0.5, misfits="skip")


def fitted(model: nn.Module, plan: Plan, batches: list[Any]) -> dict[str, Fit]:
    return compress_(model, plan, method=TruncatedSvd(), batches=batches, progress=False)


@torch.no_grad()
def outputs_of(model: nn.Module, batches: list[Any]) -> list[list[Tensor]]:
    outputs = []
    for number, batch in enumerate(batches):
        torch.manual_seed(number)  # for networks that draw in evaluation mode too
        with evaluating(model):
            outputs.append(tensors_of(call(model, batch)))
    return outputs


# What is compressed, and what stays dense


@each_family
def test_what_is_compressed_and_what_stays_dense(name: str) -> None:
    family = FAMILIES[name]
    model, _, plan = built(name)
    assert {kind(layer) for layer in plan} == set(family.layers.split())
    stays = {**plan.skipped, **unseen_weights(model)}
    assert {kind(one) for one in stays} == set(family.dense)
    assert {one: reason for one, reason in stays.items() if not explains(family, one, reason)} == {}
    assert set(plan) | set(plan.skipped) == set(find_sites(model))


def explains(family: Family, one: str, reason: str) -> bool:
    return re.match(REASONS[family.dense[kind(one)]][0], reason) is not None


# In sequence


@each_family
def test_blocks_in_sequence_are_the_network_as_one_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    model, batches, plan = built(name)
    outputs_of(model, batches)  # a few networks prepare themselves in their first call
    before, given = state_of(model), copy.deepcopy(batches)
    by_blocks, as_one = copy.deepcopy(model), copy.deepcopy(model)
    with watched(monkeypatch, before) as chains, noted() as said:
        fits = fitted(by_blocks, plan, batches)
    assert_said(family, said)
    assert_chain(family, model, plan, chains)
    assert_same(given, batches)
    assert all(torch.isfinite(one).all() for tensors in outputs_of(by_blocks, batches) for one in tensors)
    monkeypatch.setattr(sequential, "find_chain", lambda *_: None)
    with noted():
        assert_same_fits(fits, fitted(as_one, plan, batches))


def assert_chain(family: Family, model: nn.Module, plan: Plan, chains: list[Chain | None]) -> None:
    """That the blocks are those of the table, or that the network is one block for the reason in the table."""
    if not family.layers:
        assert chains == []
        return
    (chain,) = chains
    if family.is_chain:
        assert chain is not None
        assert chain.names == tuple(f"{family.run}.{k}" for k, _ in model.get_submodule(family.run).named_children())
        return
    assert chain is None
    planned = {name: site.names for name, site in find_sites(model).items() if name in plan}
    assert bool(list_of_blocks(model, planned)) == (family.run not in ("lists", "once"))


def assert_said(family: Family, said: list[str]) -> None:
    """That the warnings are those which the table foretells: of blocks that are none, and of padding that counts."""
    expected = ONE_BLOCK[family.run][0] if family.run in ONE_BLOCK else None
    assert len([one for one in said if "cannot be called one by one" in one and expected and expected in one]) == (
        expected is not None
    )
    lost = [LOST.match(one) for one in said]
    names = [name for found in lost if found for name in re.findall(r"'([^']+)'", found[1])]
    assert bool(names) == (family.lost is not None)
    assert [name for name in names if not re.fullmatch(family.lost or "", name)] == []
    assert len(said) == bool(expected) + bool(names)


def assert_same_fits(fits: Mapping[str, Fit], others: Mapping[str, Fit]) -> None:
    """That all fits are equal to the last bit."""
    assert fits.keys() == others.keys()
    assert [name for name, fit in fits.items() if not same_fit(fit, others[name])] == []


def same_fit(fit: Fit, other: Fit) -> bool:
    parts, others = ({**one.factors, "bias": one.bias} for one in (fit, other))
    return fit.format == other.format and parts.keys() == others.keys() and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b
        for a, b in zip(parts.values(), others.values(), strict=True)
    )  # fmt: skip


def assert_same(given: Any, found: Any) -> None:
    """That no call wrote into a batch."""
    for a, b in zip(given, found, strict=True):
        if isinstance(a, Mapping):
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)
        else:
            assert torch.equal(a, b)


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything in a network that a call might change: tensors, modes, and configurations."""
    tensors = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    kinds = {f"{name} is": (type(module), module.training) for name, module in model.named_modules()}
    configs = {
        f"{name}.{own}": repr(vars(module)[own])
        for name, module in model.named_modules()
        for own in ("config", "generation_config", "_internal_dict")
        if own in vars(module)
    }
    return {**tensors, **kinds, **configs}


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, before: dict[str, Any]) -> Iterator[list[Chain | None]]:
    """Note the chains that are found, and see that the network does not change until its layers are replaced.

    Modules that hold several matrices are split meanwhile, on the same memory, so that they have other names.
    """
    chains: list[Chain | None] = []
    find, put = sequential.find_chain, api.put_fits_

    def finding(*args: Any) -> Chain | None:
        chains.append(find(*args))
        return chains[-1]

    def putting(model: nn.Module, fits: Mapping[str, Fit]) -> None:
        split = tuple(name for name, module in model.named_modules() if isinstance(module, SplitModule))
        now, old = (
            {name: value for name, value in state.items() if not (split and name.startswith(split))}
            for state in (state_of(model), before)
        )
        assert now.keys() == old.keys()
        changed = [n for n, b in old.items() if not (torch.equal(b, now[n]) if isinstance(b, Tensor) else b == now[n])]
        assert changed == []
        put(model, fits)

    with monkeypatch.context() as patch:
        patch.setattr(sequential, "find_chain", finding)
        patch.setattr(api, "put_fits_", putting)
        yield chains


@contextmanager
def noted() -> Iterator[list[str]]:
    """Collect the warnings, but for that of few vectors."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield said
    said += [str(one.message) for one in found if FEW not in str(one.message)]


# How good it is


@each_family
def test_weights_of_low_rank_are_found_again(name: str) -> None:
    model, batches, plan = built(name)
    sites = find_sites(model)
    with torch.no_grad():
        for layer, format in plan.items():
            U, S, Vh = torch.linalg.svd(sites[layer].matrix, full_matrices=False)
            sites[layer].matrix.copy_((U[:, : format.rank] * S[: format.rank]) @ Vh[: format.rank])
    dense = outputs_of(model, batches)
    with noted():
        fits = fitted(model, plan, batches)
    assert {layer: fit.error for layer, fit in fits.items() if fit.error > 1e-3} == {}
    for expected, found in zip(dense, outputs_of(model, batches), strict=True):
        for a, b in zip(expected, found, strict=True):
            assert (a - b).norm() <= 1e-3 * a.norm()


@each_padded_family
def test_padding_does_not_count(name: str) -> None:
    family = FAMILIES[name]
    model, batches, plan = built(name)
    masks = [masks_of(batch) for batch in batches]
    with noted():
        moments = calibrate(model, batches, plan, progress=False)
    tokens = {sum(int(mask[key].sum()) for mask in masks) for key in masks[0]}
    times = range(1, Sizes.of(name).layers + 1)  # that a layer may be called
    right = {many * count for many in times for count in tokens} | {3 * BATCHES}  # or once for each text
    wrong = [layer for layer, one in moments.items() if one.tokens not in right]
    apart = f"{family.lost or ''}|{family.apart}"
    assert [layer for layer in wrong if not re.fullmatch(apart, layer)] == []


# What the documentation says


def test_the_documentation_shows_the_table() -> None:
    assert table() in PAGE.read_text(encoding="utf-8")


def test_every_family_has_a_model() -> None:
    assert FAMILIES.keys() == MODELS.keys()
