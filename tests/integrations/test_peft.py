"""Adapters on a structured network: they train, save, load and merge, or say why not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build, compressed, inputs_of, output_of
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear

from structmat import StructuredLinear, plan_of
from structmat.integrations.peft import factor_targets
from structmat.nn import StructuredModule

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def trained(model: Any, config: LoraConfig) -> Any:
    """The model with an adapter after a few steps."""
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    start = inputs_of(model)
    losses = []
    for _ in range(4):
        loss = adapted(start, labels=start).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return adapted.eval()


def on_factors(model: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=[], target_parameters=factor_targets(model, ".*(q_proj|o_proj|up_proj)"))


def test_an_adapter_trains_saves_and_loads(tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    model.save_pretrained(tmp_path / "base")
    before = output_of(model)
    adapted = trained(model, on_factors(model))
    after = output_of(adapted)
    assert (after - before).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    base = type(model).from_pretrained(tmp_path / "base")
    assert torch.equal(output_of(base), before)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(output_of(loaded), after)


def test_an_adapter_on_the_factors_merges_exactly() -> None:
    model = compressed(build("LlamaForCausalLM"))
    plan = plan_of(model)
    adapted = trained(model, on_factors(model))
    after = output_of(adapted)
    merged = adapted.merge_and_unload()
    assert plan_of(merged) == plan
    assert all(type(m) is StructuredLinear for m in merged.modules() if isinstance(m, StructuredModule))
    torch.testing.assert_close(output_of(merged), after, rtol=1e-4, atol=1e-5)


def test_an_adapter_beside_a_structured_layer_is_refused() -> None:
    model = compressed(build("LlamaForCausalLM"))
    with pytest.raises(ValueError, match=r"Target module StructuredLinear.*is not supported"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_an_adapter_that_was_registered_beside_one_cannot_be_merged() -> None:
    model = compressed(build("LlamaForCausalLM"))
    config = LoraConfig(r=2, target_modules=["q_proj"])
    config._register_custom_module({StructuredLinear: LoraLinear})
    adapted = trained(model, config)
    after = output_of(adapted)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(RuntimeError, match="expected the weight of a structured layer to be read only"):
            merge()
    assert torch.equal(output_of(adapted), after)


def test_names_of_factors() -> None:
    model = compressed(build("GPT2LMHeadModel"))
    assert factor_targets(model, r"transformer\.h\.0\.attn\.c_attn") == [
        "transformer.h.0.attn.c_attn.left",
        "transformer.h.0.attn.c_attn.right",
    ]
    with pytest.raises(
        ValueError, match=r"expected 'nothing' to pick a structured layer, but it picks none; there are: tr"
    ):
        factor_targets(model, "nothing")
    with pytest.raises(ValueError, match="there are: none"):
        factor_targets(build("GPT2LMHeadModel"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=factor_targets(model)))
    with pytest.raises(ValueError, match="expected a network without an adapter, got one with"):
        factor_targets(adapted)
