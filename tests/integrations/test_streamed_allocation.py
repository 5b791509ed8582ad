"""One budget for a checkpoint that is read block by block: the same plan as for the model in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build
from transformers import AutoModelForCausalLM

from structmat import allocate
from structmat.compress.allocate import AllocationSettings
from structmat.fit import Lee2024Blast
from structmat.formats import Blast
from structmat.integrations.transformers.streamed_allocation import allocate_checkpoint


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return [
        {"input_ids": torch.randint(1, 60, (3, 9), generator=generator), "attention_mask": mask} for _ in range(count)
    ]


def short(format: Any) -> Any:
    return Lee2024Blast(sweeps=3, metric_iterations=2) if isinstance(format, Blast) else None


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_findings_and_plan_are_those_of_the_model_in_memory(tmp_path: Path, name: str) -> None:
    build(name).save_pretrained(tmp_path / "dense")
    settings: dict[str, Any] = {"keep": 0.6, "blocks": 2, "effort": "quick", "method": short, "progress": False}
    streamed = allocate_checkpoint(tmp_path / "dense", batches(), AllocationSettings(**settings))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    whole = allocate(model, batches(), layers=[*streamed.choices], **settings)
    assert list(streamed.choices) == list(whole.choices)
    assert not any("lm_head" in layer for layer in streamed.choices)
    for layer, choice in whole.choices.items():
        assert streamed.choices[layer].sensitivity == pytest.approx(choice.sensitivity, rel=1e-3)
        found = [effect for _, _, effect in streamed.choices[layer].considered]
        expected = [effect for _, _, effect in choice.considered]
        assert found == pytest.approx(expected, rel=0.02, abs=1e-9)
    assert dict(streamed) == dict(whole)
    assert streamed.effect == "KL divergence"


def test_a_loss_of_ones_own_and_chosen_layers(tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path / "dense")

    def loss(batch: Any, returned: Any) -> torch.Tensor:
        return returned.logits[..., :5].square().mean()

    settings: dict[str, Any] = {"keep": 0.7, "structures": "low_rank", "effect": loss, "progress": False}
    streamed = allocate_checkpoint(
        tmp_path / "dense", batches(), AllocationSettings(**settings), layers=r".*mlp.*", cache=tmp_path / "fits"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    whole = allocate(model, batches(), layers=r".*mlp.*", **settings)
    assert dict(streamed) == dict(whole)
    assert all(".mlp." in layer for layer in streamed)


def test_another_budget_reads_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path / "dense")
    options: dict[str, Any] = {"structures": "low_rank", "progress": False}
    first = AllocationSettings(keep=0.7, **options)
    plan = allocate_checkpoint(tmp_path / "dense", batches(), first, cache=tmp_path / "fits")
    monkeypatch.setattr("structmat.compress.backward.NetworkInBlocks.statistics", None)  # calling it would fail
    again = allocate_checkpoint(tmp_path / "dense", batches(), first, cache=tmp_path / "fits")
    smaller = allocate_checkpoint(
        tmp_path / "dense", batches(), AllocationSettings(keep=0.5, **options), cache=tmp_path / "fits"
    )
    assert dict(again) == dict(plan)
    assert smaller.kept <= 0.5 < plan.kept


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="inside the blocks of a chain"):
        allocate_checkpoint(tmp_path / "dense", batches(), layers=r"lm_head|.*q_proj")
    with pytest.raises(ValueError, match="at least one batch"):
        allocate_checkpoint(tmp_path / "dense", [])
