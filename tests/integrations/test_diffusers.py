"""Structured models and pipelines of diffusers."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from networks import same_state
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from structmat import Blast, LowRank, Rule, StructuredLinear, apply_plan_, compress_, densify_, make_plan, plan_of
from structmat.integrations.diffusers import quantizer as integration

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


def dit(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8}
    return DiTTransformer2DModel(**{**sizes, "num_embeds_ada_norm": 1000, "out_channels": 4, **options}).eval()


def compressed() -> Any:
    model = dit()
    rules = {r".*to_[qk]": LowRank, r".*ff\.net.*": Rule(Blast, blocks=4), r".*norm1\.linear": Rule(Blast, blocks=2)}
    compress_(model, make_plan(model, rules), progress=False)
    return model


@torch.no_grad()
def output_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 4, 8, 8, generator=generator)
    return model(noise, timestep=torch.tensor([3, 7]), class_labels=torch.tensor([1, 1000]))[0]


def load(kind: Any, folder: Path, **options: Any) -> Any:
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values())
    return model.eval()


@pytest.mark.parametrize("size", ["5GB", "10KB"])
@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}], ids=str)
@pytest.mark.parametrize("kind", [DiTTransformer2DModel, diffusers.AutoModel])
def test_round_trip(kind: Any, options: dict[str, Any], size: str, tmp_path: Path) -> None:
    model = compressed()
    model.save_pretrained(tmp_path / "first", max_shard_size=size)
    loaded = kind.from_pretrained(str(tmp_path / "first"), **options).eval()
    assert plan_of(loaded) == plan_of(model)
    assert same_state(loaded, model)
    torch.testing.assert_close(output_of(loaded), output_of(model), rtol=1e-5, atol=1e-6)
    loaded.save_pretrained(tmp_path / "second", max_shard_size=size)
    names = sorted(file.name for file in (tmp_path / "first").glob("*.safetensors"))
    assert len(names) == 1 or size == "10KB"
    for name in names:
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_nothing_is_missing_or_left_over(tmp_path: Path) -> None:
    compressed().save_pretrained(tmp_path)
    loaded = load(DiTTransformer2DModel, tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for name, p in loaded.named_parameters() if "left" in name} == {torch.bfloat16}
    assert {p.dtype for p in loaded.float().parameters()} == {torch.float32}
    quantizer = loaded.hf_quantizer
    assert (quantizer.is_serializable, quantizer.is_trainable, quantizer.is_compileable) == (True, True, True)
    assert "StructmatDiffusersConfig" in repr(quantizer.quantization_config)


def test_densified_models_are_dense_for_diffusers(tmp_path: Path) -> None:
    compressed().save_pretrained(tmp_path / "structured")
    loaded = load(DiTTransformer2DModel, tmp_path / "structured")
    before = output_of(loaded)
    densify_(loaded)
    torch.testing.assert_close(output_of(loaded), before, rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert same_state(load(DiTTransformer2DModel, tmp_path / "dense"), loaded)


@pytest.mark.parametrize("all_of_them", [False, True])
def test_the_record_is_of_what_is_saved(all_of_them: bool, tmp_path: Path) -> None:
    model = compressed()
    for name in list(plan_of(model))[: None if all_of_them else 2]:
        structured = model.get_submodule(name)
        dense = nn.Linear(structured.in_features, structured.out_features)
        dense.load_state_dict({"weight": structured.to_dense(), "bias": structured.bias})
        model.set_submodule(name, dense)
    model.save_pretrained(tmp_path)
    loaded = load(DiTTransformer2DModel, tmp_path)
    assert plan_of(loaded) == plan_of(model)
    assert same_state(loaded, model)


def test_a_layer_that_was_put_in_by_hand_is_recorded(tmp_path: Path) -> None:
    model = dit()
    model.transformer_blocks[0].attn1.to_q = StructuredLinear(LowRank(16, 16, 3))
    model.save_pretrained(tmp_path)
    loaded = load(DiTTransformer2DModel, tmp_path)
    assert list(plan_of(loaded)) == ["transformer_blocks.0.attn1.to_q"]
    assert same_state(loaded, model)


def test_dequantize(tmp_path: Path) -> None:
    compressed().save_pretrained(tmp_path)
    loaded = load(DiTTransformer2DModel, tmp_path)
    loaded.dequantize()
    assert not plan_of(loaded)
    assert "quantization_config" not in loaded.config
    assert not hasattr(loaded, "hf_quantizer")


def test_shared_factors_cannot_be_saved(tmp_path: Path) -> None:
    model = dit()
    first, second = (block.attn1 for block in model.transformer_blocks)
    second.to_q.weight = first.to_q.weight
    apply_plan_(model, {"transformer_blocks.0.attn1.to_q": LowRank(16, 16, 4)})
    assert second.to_q.left is first.to_q.left
    with pytest.raises(RuntimeError, match="share memory"):
        model.save_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_whole_pipeline(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    pipeline = DiTPipeline(transformer=compressed(), vae=vae, scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.transformer.transformer_blocks[0].attn1.to_q, StructuredLinear)
    images = [
        p([3], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for p in (pipeline, loaded)
    ]
    torch.testing.assert_close(*map(torch.from_numpy, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["delete", "rename"])
def test_a_missing_or_misnamed_factor_is_named(change: str, tmp_path: Path) -> None:
    compressed().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensor = tensors.pop("transformer_blocks.1.attn1.to_q.left")
    if change == "rename":
        tensors["transformer_blocks.1.attn1.to_q.lefts"] = tensor
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"has none for \['transformer_blocks.1.attn1.to_q.left'\]"):
        DiTTransformer2DModel.from_pretrained(tmp_path)


def test_without_the_library_loading_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed().save_pretrained(tmp_path)
    monkeypatch.delitem(integration.auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "structmat")
    monkeypatch.delitem(integration.auto.AUTO_QUANTIZER_MAPPING, "structmat")
    with pytest.raises(ValueError, match="Unknown quantization type, got structmat"):
        DiTTransformer2DModel.from_pretrained(tmp_path)


def test_a_model_that_is_quantized_otherwise_says_so() -> None:
    model = dit()
    model.register_to_config(quantization_config=diffusers.BitsAndBytesConfig(load_in_8bit=True))
    with pytest.warns(
        UserWarning, match="has the quantization_config BitsAndBytesConfig, and a model can have but one"
    ):
        apply_plan_(model, {"transformer_blocks.0.attn1.to_q": LowRank(16, 16, 4)})
    integration.write_down(dit())
