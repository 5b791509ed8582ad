"""Adapters by ``target_modules`` beside structured layers: they train, are merged exactly, and taken back exactly."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build, compressed, inputs_of, output_of
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import structmat as sm
from structmat.formats import Merged, plus_low_rank
from structmat.nn.adaptable import Adaptable, AdaptableLinear
from structmat.ops.factoring import low_rank_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = ["0", "2", "4", "6"]


def network(structure: str, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(4, 8, 3, padding=1), nn.Flatten(2), nn.Conv1d(8, 8, 3, padding=1)]
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Unflatten(1, (4, 2, 2)), *convolutions)
    return sm.apply_plan_(model, sm.make_plan(model, structure, keep=0.5, misfits="skip", **options))  # type: ignore


def trained(model: nn.Module, x: Tensor, **options: Any) -> Any:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, lora_alpha=8, **options))  # type: ignore
    optimizer = torch.optim.SGD([one for one in adapted.parameters() if one.requires_grad], 0.05)
    for _ in range(4):
        (adapted(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.eval()


@pytest.mark.parametrize(
    ("structure", "options", "merged"),
    [
        ("low_rank", {}, sm.LowRank),
        ("blast", {"blocks": 2}, sm.Blast),
        ("monarch", {"blocks": 2}, Merged),
        ("block_diagonal", {}, Merged),
        ("block_sparse", {"blocks": 4}, Merged),
    ],
)
def test_trained_merged_and_taken_back(structure: str, options: dict[str, Any], merged: Any, tmp_path: Path) -> None:
    model, x = network(structure, **options), torch.randn(5, 16)
    before, formats = model(x).detach(), list(sm.plan_of(model).values())
    assert sm.prepare_for_lora(model) is model
    assert torch.equal(model(x), before)
    adapted = trained(model, x)
    after = adapted(x).detach()
    assert (after - before).abs().max() > 1e-3
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x), after, rtol=1e-5, atol=1e-6)
    adapted.unmerge_adapter()
    assert torch.equal(adapted(x), after)
    assert list(sm.plan_of(model).values()) == formats
    for safe in (False, True):
        plain = copy.deepcopy(adapted).merge_and_unload(safe_merge=safe)
        torch.testing.assert_close(plain(x), after, rtol=1e-5, atol=1e-6)
        assert all(isinstance(format, merged) for format in sm.plan_of(plain).values())
    sm.save_model(plain, tmp_path / "merged.safetensors")
    fresh = sm.densify_(network(structure, **options))
    loaded = sm.load_model(fresh, tmp_path / "merged.safetensors")
    saved = plain.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(loaded(x), plain(x), rtol=1e-5, atol=1e-6)
    assert not any(isinstance(module, Adaptable) for module in loaded.modules())


def test_a_change_that_is_not_of_low_rank_is_refused() -> None:
    model = sm.prepare_for_lora(network("low_rank"))
    layer = model[0]
    assert isinstance(layer, AdaptableLinear)
    assert isinstance(layer, nn.Linear)
    with pytest.raises(ValueError, match=r"expected a change of low rank for LowRank.*, got one of rank 16"):
        layer.weight.data += torch.randn(32, 16)
    with pytest.raises(RuntimeError, match="expected the weight of a structured layer to be read only, got 'mul_'"):
        layer.weight.data.mul_(2)
    wanted = layer.to_dense().detach() + torch.outer(torch.arange(32.0), torch.ones(16))
    layer.weight.data = wanted
    torch.testing.assert_close(layer.to_dense(), wanted, rtol=1e-5, atol=1e-4)


def test_networks_that_cannot_be_prepared() -> None:
    with pytest.raises(ValueError, match="expected a network with structured layers, got none"):
        sm.prepare_for_lora(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="expected layers inside the model, but it is one layer itself"):
        sm.prepare_for_lora(sm.StructuredLinear(sm.LowRank(8, 8, 2)))
    learning = sm.apply_plan_(nn.Sequential(nn.Linear(16, 16)), {"0": sm.GaudiGblr(16, 16, 8)})
    with pytest.raises(ValueError, match="expected layers with a final structure, but '0' still learns; harden_ it"):
        sm.prepare_for_lora(learning)
    tied = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    tied[1].weight = tied[0].weight
    sm.apply_plan_(tied, {"0": sm.LowRank(16, 16, 2)})
    with pytest.raises(ValueError, match="expected layers with factors of their own, but '0' and '1' share them"):
        sm.prepare_for_lora(tied)
    adapted = trained(sm.prepare_for_lora(network("low_rank")), torch.randn(5, 16))
    with pytest.raises(ValueError, match="expected a network without an adapter, got one with; prepare it before"):
        sm.prepare_for_lora(adapted)


def test_a_language_model_is_adapted_merged_saved_and_loaded(tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(sm.prepare_for_lora(model), LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    after = output_of(adapted.eval())
    adapted.save_pretrained(tmp_path / "adapter")
    base = sm.prepare_for_lora(type(model).from_pretrained(tmp_path / "base"))
    torch.testing.assert_close(output_of(PeftModel.from_pretrained(base, tmp_path / "adapter").eval()), after)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(output_of(merged), after, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    loaded = type(model).from_pretrained(tmp_path / "merged")
    assert torch.equal(output_of(loaded), output_of(merged))
    assert inputs_of(loaded) is not None


def test_what_the_merged_format_refuses() -> None:
    base = sm.Monarch(8, 8, blocks=2, rank=1)
    with pytest.raises(ValueError, match=r"expected a base of shape \(8, 9\)"):
        Merged(8, 9, base, 1)
    with pytest.raises(ValueError, match=r"expected a base with a final structure.*it has a low-rank term already"):
        Merged(8, 8, Merged(8, 8, base, 1), 1)
    with pytest.raises(ValueError, match=r"expected a base with a final structure.*harden_ the network first"):
        Merged(8, 8, sm.GaudiGblr(8, 8, 4), 1)
    with pytest.raises(ValueError, match=r"expected a rank of at most min\(M, N\) = 8, got 9"):
        Merged(8, 8, base, 9)


@pytest.mark.parametrize("format", [sm.LowRank(6, 9, 2), sm.Blast(6, 9, (2, 3), 2), sm.Monarch(6, 9, (2, 3), 1)])
def test_a_low_rank_matrix_is_added_exactly(format: sm.Format) -> None:
    factors = format.init()
    total = format.to_dense(factors)
    for _ in range(4):  # beyond what a low-rank matrix and its term can hold
        left, right = torch.randn(6, 2), torch.randn(2, 9)
        total = total + left @ right
        format, factors = plus_low_rank(format, factors, left, right)
        format.check_factors(factors)
        torch.testing.assert_close(format.to_dense(factors), total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "rank"), [((40, 90), 3), ((200, 300), 33), ((8, 5), 5), ((20, 20), 0)])
def test_the_rank_of_a_matrix_is_found(shape: tuple[int, int], rank: int) -> None:
    matrix = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    left, right = low_rank_of(matrix, 1e-5 * float(matrix.norm()))
    assert left.shape == (shape[0], rank)
    assert (left @ right - matrix).norm() <= 1e-5 * matrix.norm()
