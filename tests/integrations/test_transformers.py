"""Structured models of transformers: saved by save_pretrained, loaded by from_pretrained, the same to the bit."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
import transformers
from networks import build, compressed, files_of, inputs_of, output_of, same_state
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from structmat import (
    Blast,
    BlockDiagonal,
    BlockSparse,
    LowRank,
    StructuredLinear,
    apply_plan_,
    compress_,
    densify_,
    make_plan,
    plan_of,
    report,
)
from structmat.formats import FORMATS, FactorSpec
from structmat.integrations.transformers.quantizer import StructuredConv1D
from structmat.network.sites import find_sites
from structmat.nn import StructuredModule

FAMILIES = [
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "GPT2LMHeadModel",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "ViTForImageClassification",
    "ViTModel",
    "MixtralForCausalLM",
]


def load(kind: Any, folder: Path, **options: Any) -> Any:
    """The loaded model, after checking that transformers has nothing to complain about."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert {key: value for key, value in info.items() if value} == {}
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = compressed(build(name))
    plan = plan_of(model)
    assert len(plan) >= 4
    model.save_pretrained(tmp_path / "first")
    loaded = load(type(model), tmp_path / "first")
    assert plan_of(loaded) == plan
    assert same_state(loaded, model)
    assert torch.equal(output_of(loaded), output_of(model))
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "second")
    assert files_of(tmp_path / "second") == files_of(tmp_path / "first")
    assert (tmp_path / "second/config.json").read_text() == (tmp_path / "first/config.json").read_text()


@pytest.mark.parametrize("name", FAMILIES)
def test_densified_models_are_dense_again_for_transformers(name: str, tmp_path: Path) -> None:
    model = compressed(build(name))
    before = output_of(model)
    types = {name: type(module) for name, module in build(name).named_modules()}
    densify_(model)
    assert {name: type(module) for name, module in model.named_modules()} == types
    torch.testing.assert_close(output_of(model), before, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(output_of(load(type(model), tmp_path)), output_of(model))


def test_other_formats_and_their_buffers(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    plan = {
        "model.layers.0.self_attn.q_proj": BlockSparse(32, 32, ("1001", "0110", "0110", "1001")),
        "model.layers.0.mlp.up_proj": BlockDiagonal(48, 32, 4),
    }
    compress_(model, plan, progress=False)
    model.save_pretrained(tmp_path)
    loaded = load(AutoModelForCausalLM, tmp_path)
    assert same_state(loaded, model)
    assert torch.equal(output_of(loaded), output_of(model))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "auto"},
        {"dtype": torch.float32},
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_ways_to_load(size: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert len(files_of(tmp_path)) > 3 if size == "20KB" else len(files_of(tmp_path)) == 1
    loaded = load(AutoModelForCausalLM, tmp_path, **options)
    assert same_state(loaded, model)
    assert torch.equal(output_of(loaded), output_of(model))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "ViTForImageClassification"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    build(name).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = compressed(load(getattr(transformers, name), tmp_path / "dense"))
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    loaded = load(type(model), tmp_path / "out", device_map="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    batch = inputs_of(model)
    batch = batch.bfloat16() if batch.is_floating_point() else batch
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(loaded)(batch).logits, copy.deepcopy(model)(batch).logits)
    single = load(type(model), tmp_path / "out", dtype=torch.float32)
    assert {p.dtype for p in single.parameters()} == {torch.float32}


def test_a_loaded_model_casts_generates_and_trains(tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    model.save_pretrained(tmp_path)
    loaded = load(AutoModelForCausalLM, tmp_path)
    start = inputs_of(model)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(start, **options), model.generate(start, **options))
    loaded(start, labels=start).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    assert {p.dtype for p in loaded.half().parameters()} == {torch.float16}
    assert {p.dtype for p in loaded.float().parameters()} == {torch.float32}
    quantizer = loaded.hf_quantizer
    assert quantizer.is_qat_trainable
    assert quantizer.is_trainable
    assert quantizer.is_compileable
    assert quantizer.is_serializable()
    assert not loaded.is_quantized


@pytest.mark.parametrize("dtype", [None, "bfloat16", torch.float32])
def test_dequantize(dtype: Any, tmp_path: Path) -> None:
    model = compressed(build("GPT2LMHeadModel"))
    model.save_pretrained(tmp_path)
    loaded = load(AutoModelForCausalLM, tmp_path)
    loaded.dequantize(dtype)
    assert not plan_of(loaded)
    assert type(loaded.transformer.h[0].attn.c_attn) is Conv1D
    assert not hasattr(loaded, "hf_quantizer")
    assert loaded.dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    if dtype is None:
        torch.testing.assert_close(output_of(loaded), output_of(model), rtol=1e-4, atol=1e-5)


# Names


def test_a_checkpoint_with_a_head_loads_without_and_back(tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    model.save_pretrained(tmp_path / "head")
    bare, info = cast("Any", AutoModel).from_pretrained(tmp_path / "head", output_loading_info=True)
    assert info["unexpected_keys"] == {"lm_head.weight"}
    assert not info["missing_keys"]
    assert same_state(bare, model.model)
    bare.save_pretrained(tmp_path / "bare")
    again, info = cast("Any", AutoModelForCausalLM).from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert not info["unexpected_keys"]
    assert same_state(again.model, bare)
    assert set(plan_of(again)) == set(plan_of(model))


def test_a_structured_head_stays_behind(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    apply_plan_(model, {"lm_head": LowRank(64, 32, 4), "model.layers.0.mlp.up_proj": LowRank(48, 32, 4)})
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    assert set(plan_of(bare)) == {"layers.0.mlp.up_proj"}
    assert same_state(bare, model.model)


def test_surgery_on_the_inner_model_is_saved_with_the_outer(tmp_path: Path) -> None:
    model = build("BertForMaskedLM")
    compressed(model.bert)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert same_state(loaded, model)


# Ties


def test_a_tied_head_is_refused_until_untied(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head.*shared with 'model.embed_tokens' \(Embedding\).*untie them first"):
        make_plan(model, {"lm_head": LowRank})
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    compress_(model, make_plan(model, {"lm_head": LowRank}), progress=False)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    loaded = load(AutoModelForCausalLM, tmp_path)
    assert isinstance(loaded.lm_head, StructuredLinear)
    assert same_state(loaded, model)
    assert torch.equal(output_of(loaded), output_of(model))
    model.tie_weights()
    assert isinstance(model.lm_head, StructuredLinear)


def test_tied_embeddings_stay_tied_beside_structured_layers(tmp_path: Path) -> None:
    model = compressed(build("Qwen2ForCausalLM", tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    loaded = load(AutoModelForCausalLM, tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(output_of(loaded), output_of(model))


def test_shared_factors_stay_shared(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    compress_(model, make_plan(model, {r".*up_proj": Blast, r".*down_proj": LowRank}, blocks=4), progress=False)
    assert first.up_proj.left is second.up_proj.left
    model.save_pretrained(tmp_path / "first")
    loaded = load(AutoModelForCausalLM, tmp_path / "first")
    one, other = (layer.mlp.up_proj for layer in loaded.model.layers)
    assert all(one.factors[name] is other.factors[name] for name in one.factors)
    assert same_state(loaded, model)
    assert torch.equal(output_of(loaded), output_of(model))
    loaded.save_pretrained(tmp_path / "second")
    assert files_of(tmp_path / "second") == files_of(tmp_path / "first")
    densify_(loaded)
    assert not any("left" in name for name in loaded.all_tied_weights_keys)


# GPT-2's transposed layers


def test_conv1d_is_a_kind_of_dense_layer() -> None:
    model = build("GPT2LMHeadModel")
    weight = model.transformer.h[0].attn.c_attn.weight
    site = find_sites(model)["transformer.h.0.attn.c_attn"]
    assert torch.equal(site.matrix, weight.T)
    compress_(model, make_plan(model, {Conv1D: LowRank}, keep=0.9), progress=False)
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, StructuredConv1D)
    assert layer.format == LowRank(96, 32, 21)
    assert layer.weight.shape == weight.shape
    torch.testing.assert_close(layer.weight + 0, layer.to_dense().T)
    densify_(model, ["transformer.h.0.attn.c_attn"])
    assert type(model.transformer.h[0].attn.c_attn) is Conv1D
    assert isinstance(model.transformer.h[1].attn.c_attn, StructuredConv1D)


def test_the_report_alone_knows_conv1d() -> None:
    assert {row.format for row in report(build("GPT2LMHeadModel")).rows} == {"dense"}
    assert len(report(build("GPT2LMHeadModel")).rows) == 9


# What no walker sees


def test_fused_experts_are_named() -> None:
    model = build("MixtralForCausalLM")
    unseen = report(model).unseen
    assert set(unseen) == {
        f"model.layers.{k}.mlp.{name}"
        for k in range(2)
        for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight")
    }
    assert unseen["model.layers.0.mlp.experts.down_proj"].startswith(
        "2 x 32 x 48, held by a MixtralExperts, which is no"
    )


def test_a_model_is_compressed_further(tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    model.save_pretrained(tmp_path / "first")
    loaded = load(LlamaForCausalLM, tmp_path / "first")
    compress_(loaded, make_plan(loaded, {r".*k_proj": LowRank}), progress=False)
    densify_(loaded, [name for name in plan_of(loaded) if name.endswith("q_proj")])
    loaded.save_pretrained(tmp_path / "second")
    again = load(LlamaForCausalLM, tmp_path / "second")
    assert plan_of(again) == plan_of(loaded)
    assert same_state(again, loaded)
    assert all(isinstance(layer.self_attn.k_proj, StructuredModule) for layer in again.model.layers)


@dataclass(frozen=True)
class Tagged(LowRank):
    """A format with a factor in single precision and a buffer of integers, as learned structures have them."""

    name: ClassVar[str] = "tagged"

    def factor_specs(self) -> dict[str, FactorSpec]:
        """Those of the base class and two more."""
        more = {"widths": FactorSpec((2, 3), dtype=torch.float32), "index": FactorSpec((3,), False, torch.int64)}
        return super().factor_specs() | more

    def init(self, **options: Any) -> dict[str, torch.Tensor]:
        """Random, with recognisable extras."""
        factors = LowRank(self.M, self.N, self.rank).init(**options)
        device = options["device"]
        widths = torch.full((2, 3), 1 / 3, dtype=torch.float32, device=device)
        return {**factors, "widths": widths, "index": torch.arange(3, device=device)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_keep_the_dtype_that_their_format_fixes(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, "tagged", Tagged)
    model = build("LlamaForCausalLM")
    apply_plan_(model, {"model.layers.0.mlp.up_proj": Tagged(48, 32, 4)})
    model.save_pretrained(tmp_path / "first")
    loaded = load(LlamaForCausalLM, tmp_path / "first", dtype=dtype)
    layer = loaded.model.layers[0].mlp.up_proj
    assert (layer.left.dtype, layer.widths.dtype, layer.index.dtype) == (dtype, torch.float32, torch.int64)
    assert torch.equal(layer.widths, torch.full((2, 3), 1 / 3))
    assert torch.equal(layer.index, torch.arange(3))
    loaded.save_pretrained(tmp_path / "second")
    assert same_state(load(LlamaForCausalLM, tmp_path / "second"), loaded)


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
def test_trainer_and_its_checkpoints(tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    model.save_pretrained(tmp_path / "start")
    loaded = load(LlamaForCausalLM, tmp_path / "start")
    data: Any = [{"input_ids": row, "labels": row} for row in inputs_of(model).repeat(2, 1)]
    options: dict[str, Any] = {"max_steps": 2, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = transformers.TrainingArguments(str(tmp_path / "out"), per_device_train_batch_size=2, **options)
    trainer = transformers.Trainer(model=loaded, args=arguments, train_dataset=data)
    trainer.train()
    again = load(LlamaForCausalLM, tmp_path / "out" / "checkpoint-2")
    assert same_state(again, loaded)
    assert not same_state(again, model)
