"""The record in config.json: what the model is made of when it is saved, whoever made it so and however."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build, compressed, inputs_of, output_of
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from structmat import Blast, LowRank, StructuredLinear, apply_plan_, compress_, densify_, make_plan, plan_of
from structmat.integrations.peft import factor_targets
from structmat.network.splitting import put_module

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"
ADAPTER = LoraConfig(r=2, target_modules=["q_proj"])


def returns(model: Any, folder: Path) -> Any:
    """Save the model and load it again; what comes back is the same, to the bit."""
    before = output_of(model)
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert plan_of(loaded) == plan_of(model)
    assert set(loaded.state_dict()) == set(model.state_dict())
    assert torch.equal(output_of(loaded), before)
    return loaded


def dense_by_hand(model: Any) -> None:
    structured = model.get_submodule(UP)
    dense = nn.Linear(structured.in_features, structured.out_features, bias=False)
    dense.weight.data.copy_(structured.to_dense())
    put_module(model, UP, dense)


def all_dense_by_hand(model: Any) -> None:
    for name in list(plan_of(model)):
        structured = model.get_submodule(name)
        dense = nn.Linear(structured.in_features, structured.out_features, bias=False)
        dense.weight.data.copy_(structured.to_dense())
        model.set_submodule(name, dense)


def another_structure(model: Any) -> None:
    M, N = model.get_submodule(UP).format.shape
    model.set_submodule(UP, StructuredLinear(Blast(M, N, (4, 4), 5), bias=False))


def one_more(model: Any) -> None:
    model.model.layers[1].self_attn.k_proj = StructuredLinear(LowRank(16, 32, 3), bias=False)


def blocks_swapped(model: Any) -> None:
    layers = model.model.layers
    layers[0].mlp.up_proj, layers[1].mlp.up_proj = layers[1].mlp.up_proj, layers[0].mlp.up_proj
    layers[0].self_attn.k_proj = StructuredLinear(LowRank(16, 32, 3), bias=False)
    layers[0], layers[1] = layers[1], layers[0]
    for i, layer in enumerate(layers):
        layer.self_attn.layer_idx = i


def part_densified(model: Any) -> None:
    densify_(model.model.layers[0])  # a block, not the model


def one_tied(model: Any) -> None:
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    for name in first.factors:
        setattr(second, name, getattr(first, name))


CHANGES: list[Callable[[Any], None]] = [
    dense_by_hand,
    all_dense_by_hand,
    another_structure,
    one_more,
    blocks_swapped,
    part_densified,
    one_tied,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_layers_that_were_changed_without_surgery(change: Callable[[Any], None], tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    change(model)
    again = returns(model, tmp_path / "one")
    all_dense_by_hand(again)
    returns(again, tmp_path / "two")


def test_a_layer_that_was_put_into_a_dense_model_by_hand(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    model.set_submodule(UP, StructuredLinear(LowRank(48, 32, 5), bias=False))
    returns(model, tmp_path)


def test_a_copy_that_goes_its_own_way(tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    twin = copy.deepcopy(model)
    dense_by_hand(twin)
    returns(model, tmp_path / "model")
    returns(twin, tmp_path / "twin")
    assert plan_of(model) != plan_of(twin)


def test_a_body_under_another_head(tmp_path: Path) -> None:
    model, other = compressed(build("LlamaForCausalLM")), build("LlamaForCausalLM")
    other.model = model.model
    returns(other, tmp_path / "other")
    compress_(other.model, make_plan(other.model, {r".*k_proj": LowRank}, keep=0.5), progress=False)
    returns(other, tmp_path / "again")
    returns(model, tmp_path / "model")


def test_an_inner_model_is_saved_under_its_own_names(tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    model.model.save_pretrained(tmp_path / "body")
    body = type(model.model).from_pretrained(tmp_path / "body")
    assert torch.equal(output_of(body), output_of(model.model))
    returns(model, tmp_path / "whole")


@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
def test_after_an_adapter_is_gone(leave: str, tmp_path: Path) -> None:
    model = get_peft_model(build("LlamaForCausalLM"), ADAPTER)
    compress_(model, make_plan(model, {r".*(k_proj|up_proj)": LowRank}, keep=0.5), progress=False)
    returns(getattr(model, leave)(), tmp_path)


def test_after_an_adapter_beside_a_layer_that_was_compressed_then(tmp_path: Path) -> None:
    model = get_peft_model(build("LlamaForCausalLM"), ADAPTER)
    compress_(model, make_plan(model, {r".*base_layer": LowRank}, keep=0.9), progress=False)
    base = model.unload()
    assert list(plan_of(base)) == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    returns(base, tmp_path)


@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
def test_after_an_adapter_on_the_factors_is_gone(leave: str, tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=factor_targets(model)))
    returns(getattr(adapted, leave)(), tmp_path)


def test_adapters_are_not_saved_as_a_part_of_the_model(tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["k_proj"]))
    for part in (model, model.model):
        with pytest.raises(
            ValueError, match=r"expected a structured model without adapters.* save the adapter with sa"
        ):
            part.save_pretrained(tmp_path / "base")
    assert not (tmp_path / "base").exists()
    adapted.save_pretrained(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").glob("*.safetensors")) == ["adapter_model.safetensors"]
    returns(adapted.merge_and_unload(), tmp_path / "merged")


def test_an_adapter_of_transformers_itself_is_saved_alone(tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    model.save_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    expected = model(inputs_of(model))[0]
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(loaded(inputs_of(model))[0], expected)


def test_surgery_after_a_change_by_hand(tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    dense_by_hand(model)
    apply_plan_(model, {UP: LowRank(48, 32, 4)})
    returns(model, tmp_path)
