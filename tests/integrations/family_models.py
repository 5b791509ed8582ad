"""Families of models of transformers, timm and diffusers: how to build a tiny one, and what compression makes of it.

Sizes are random: another value of the environment variable ``STRUCTMAT_FAMILIES_SEED`` gives other models.
"""

import importlib
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TOKENS = 9
BATCHES = 3
PAD = 1


@dataclass(frozen=True)
class Sizes:
    """The sizes of one tiny model."""

    width: int
    inner: int
    layers: int

    @classmethod
    def of(cls, family: str) -> "Sizes":
        """Random sizes, the same each time for a family."""
        draw = random.Random(f"{family} {os.environ.get('STRUCTMAT_FAMILIES_SEED', '0')}")
        return cls(draw.choice((32, 48)), draw.choice((40, 56, 64)), draw.choice((2, 3)))

    @property
    def common(self) -> dict[str, Any]:
        """What most configurations of transformers name alike."""
        return {
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 4,
        }

    @property
    def text(self) -> dict[str, Any]:
        """What most configurations of text models name alike."""
        return {**self.common, "vocab_size": 64, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 2}

    @property
    def image(self) -> dict[str, Any]:
        """What most configurations of image models name alike."""
        return {**self.common, "image_size": 16, "patch_size": 8}

    @property
    def halves(self) -> dict[str, Any]:
        """What most configurations of an encoder with a decoder name alike."""
        names = ("encoder_ffn_dim", "decoder_ffn_dim"), ("encoder_layers", "decoder_layers")
        names += (("encoder_attention_heads", "decoder_attention_heads"),)
        values = (self.inner, self.layers, 4)
        return {"d_model": self.width} | {name: v for pair, v in zip(names, values, strict=True) for name in pair}


# What the models are called on


def ids(count: int, tokens: int = TOKENS) -> Tensor:
    return torch.randint(5, 60, (count, tokens))


def mask(number: int, tokens: int = TOKENS) -> Tensor:
    """Padding on the right in the first batch, on the left in the second, and none in the third."""
    mask = torch.ones(3, tokens, dtype=torch.long)
    mask[1, tokens - 3 :], mask[2, tokens - 1 :] = 0, 0
    return (mask, mask.flip(1), torch.ones_like(mask))[number]


def texts(number: int) -> dict[str, Tensor]:
    counted = mask(number)
    return {"input_ids": ids(3).where(counted.bool(), PAD), "attention_mask": counted}


def pairs(number: int) -> dict[str, Tensor]:
    """Texts for an encoder, and shorter ones for a decoder."""
    counted = mask(number, 6)
    decoder = {"decoder_input_ids": ids(3, 6).where(counted.bool(), PAD), "decoder_attention_mask": counted}
    return {**texts(number), **decoder}


def images(number: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(3, 3, 16, 16)}


def large_images(number: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


def captioned(number: int) -> dict[str, Tensor]:
    """Texts, each with the largest token at its end, from which CLIP takes the features; and images."""
    given = texts(number)
    left = given["attention_mask"].flip(1).cumsum(1).flip(1)  # how many tokens there are from each one on
    last = (left == 1) & given["attention_mask"].bool()
    return {**given, "input_ids": given["input_ids"].masked_fill(last, 63), **images(number)}


def with_image_tokens(number: int) -> dict[str, Tensor]:
    """Texts that begin with the places of the four patches of an image; padding is on the right alone."""
    counted = torch.cat([torch.ones(3, 4, dtype=torch.long), mask(2 if number == 1 else number)], 1)
    tokens = torch.cat([torch.full((3, 4), 4), ids(3)], 1)
    return {"input_ids": tokens.where(counted.bool(), PAD), "attention_mask": counted, **images(number)}


def spectra(number: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(3, 16, 20), "decoder_input_ids": ids(3, 6)}


def waves(number: int) -> dict[str, Tensor]:
    counted = torch.ones(3, 320, dtype=torch.long)
    if number < 2:
        counted[1, 200:] = 0
    return {"input_values": torch.randn(3, 320) * counted, "attention_mask": counted}


def plain_images(number: int) -> Tensor:
    return torch.randn(3, 3, 16, 16)


def plain_large_images(number: int) -> Tensor:
    return torch.randn(2, 3, 32, 32)


def noisy_classes(number: int) -> dict[str, Tensor]:
    times = torch.randint(0, 900, (3,))
    return {"hidden_states": torch.randn(3, 4, 8, 8), "timestep": times, "class_labels": torch.randint(0, 9, (3,))}


def noisy_prompts(number: int) -> dict[str, Tensor]:
    prompts = {"encoder_hidden_states": torch.randn(2, 5, 16), "pooled_projections": torch.randn(2, 16)}
    return {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.randint(0, 900, (2,)), **prompts}


def noisy_sequences(number: int) -> dict[str, Tensor]:
    places = {"img_ids": torch.randint(0, 4, (16, 3)).float(), "txt_ids": torch.zeros(5, 3)}
    prompts = {"encoder_hidden_states": torch.randn(2, 5, 16), "pooled_projections": torch.randn(2, 16)}
    return {"hidden_states": torch.randn(2, 16, 4), "timestep": torch.rand(2), **prompts, **places}


def noisy_images(number: int) -> dict[str, Tensor]:
    return {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.randint(0, 900, (2,)),
        "encoder_hidden_states": torch.randn(2, 5, 16),
    }


# The models


def hf(name: str, options: Callable[[Sizes], Mapping[str, Any]]) -> Callable[[Sizes], nn.Module]:
    """The maker of a model of transformers."""

    def make(sizes: Sizes) -> nn.Module:
        kind = getattr(pytest.importorskip("transformers"), name)
        return kind(kind.config_class(**options(sizes)))

    return make


def other(path: str, options: Callable[[Sizes], Mapping[str, Any]]) -> Callable[[Sizes], nn.Module]:
    """The maker of a model of another library, by the path of its class."""
    module, _, name = path.rpartition(".")

    def make(sizes: Sizes) -> nn.Module:
        pytest.importorskip(module.partition(".")[0])
        return getattr(importlib.import_module(module), name)(**options(sizes))

    return make


def gpt2(s: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": 64,
        "n_embd": s.width,
        "n_layer": s.layers,
        "n_head": 4,
        "n_positions": 32,
        "n_inner": s.inner,
    }


def deepseek(s: Sizes) -> dict[str, Any]:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    experts |= {"moe_intermediate_size": 24, "first_k_dense_replace": 1}
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    return {**s.text, **experts, **heads, "num_key_value_heads": 4}


def t5(s: Sizes) -> dict[str, Any]:
    sizes = {"d_model": s.width, "d_kv": 8, "d_ff": s.inner, "num_layers": s.layers, "num_heads": 4}
    return {**sizes, "vocab_size": 64, "pad_token_id": PAD, "decoder_start_token_id": 2}


def switch(s: Sizes) -> dict[str, Any]:
    experts = {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    return {**t5(s), **experts, "num_layers": 2, "num_decoder_layers": 2}


def pair_of_towers(s: Sizes) -> dict[str, Any]:
    text = {**s.text, "max_position_embeddings": 16}
    return {"text_config": text, "vision_config": s.image}


def llava(s: Sizes) -> dict[str, Any]:
    text = {"model_type": "llama", **s.text, "num_key_value_heads": 2}
    vision = {"model_type": "clip_vision_model", **s.image}
    return {"text_config": text, "vision_config": vision, "image_token_index": 4}


def deberta(s: Sizes) -> dict[str, Any]:
    return {**s.text, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}


def swin(s: Sizes) -> dict[str, Any]:
    return {"embed_dim": s.width // 2, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}


def detr(s: Sizes) -> dict[str, Any]:
    backbone = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    backbone |= {"layer_type": "basic", "out_features": ["stage2"]}
    return {**s.halves, "backbone_config": backbone, "num_queries": 5, "num_labels": 3}


def vit_mae(s: Sizes) -> dict[str, Any]:
    decoder = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**s.image, "patch_size": 4, **{f"decoder_{name}": value for name, value in decoder.items()}}


def rwkv(s: Sizes) -> dict[str, Any]:
    return {"vocab_size": 64, "hidden_size": s.width, "intermediate_size": s.inner, "num_hidden_layers": s.layers}


def wav2vec2(s: Sizes) -> dict[str, Any]:
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (8, 4)}
    return {**s.text, **convolutions, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}


def timm_resnet(s: Sizes) -> nn.Module:
    resnet = pytest.importorskip("timm").models.resnet
    return resnet.ResNet(resnet.BasicBlock, layers=(1, 1, 1, 1), channels=(8, 12, 16, 24), stem_width=8, num_classes=10)


def dit(s: Sizes) -> dict[str, Any]:
    sizes = {"attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4, "out_channels": 4, "sample_size": 8}
    return {**sizes, "num_layers": s.layers, "num_embeds_ada_norm": 10}


def sd3(s: Sizes) -> dict[str, Any]:
    sizes = {"attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4, "out_channels": 4, "sample_size": 8}
    prompts = {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16}
    return {**sizes, **prompts, "num_layers": 3, "pos_embed_max_size": 8}


def flux(s: Sizes) -> dict[str, Any]:
    sizes = {"attention_head_dim": 8, "num_attention_heads": 2, "in_channels": 4, "axes_dims_rope": (2, 2, 4)}
    prompts = {"joint_attention_dim": 16, "pooled_projection_dim": 16}
    return {**sizes, **prompts, "num_layers": 2, "num_single_layers": s.layers}


def unet(s: Sizes) -> dict[str, Any]:
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    sizes = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1, "attention_head_dim": 4}
    return {**sizes, "down_block_types": down, "up_block_types": up, "cross_attention_dim": 16, "sample_size": 8}


MODELS: dict[str, tuple[Callable[[Sizes], nn.Module], Callable[[int], Any]]] = {
    "Llama": (hf("LlamaForCausalLM", lambda s: {**s.text, "num_key_value_heads": 2}), texts),
    "Mistral, sliding window": (
        hf("MistralForCausalLM", lambda s: {**s.text, "num_key_value_heads": 2, "sliding_window": 4}),
        texts,
    ),
    "Qwen3": (hf("Qwen3ForCausalLM", lambda s: {**s.text, "num_key_value_heads": 2, "head_dim": 8}), texts),
    "Gemma 3": (
        hf(
            "Gemma3ForCausalLM",
            lambda s: {
                **s.text,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"][: s.layers],
            },
        ),
        texts,
    ),
    "Phi-3": (hf("Phi3ForCausalLM", lambda s: {**s.text, "num_key_value_heads": 2}), texts),
    "GPT-NeoX": (hf("GPTNeoXForCausalLM", lambda s: {**s.text, "rotary_pct": 0.5}), texts),
    "GPT-2": (hf("GPT2LMHeadModel", gpt2), texts),
    "OPT": (hf("OPTForCausalLM", lambda s: {**s.text, "ffn_dim": s.inner, "word_embed_proj_dim": s.width}), texts),
    "Falcon": (hf("FalconForCausalLM", lambda s: s.text), texts),
    "BLOOM": (hf("BloomForCausalLM", lambda s: {**s.text, "n_layer": s.layers, "n_head": 4}), texts),
    "Mixtral": (
        hf("MixtralForCausalLM", lambda s: {**s.text, "num_key_value_heads": 2, "num_local_experts": 4}),
        texts,
    ),
    "Qwen2-MoE": (
        hf(
            "Qwen2MoeForCausalLM",
            lambda s: {
                **s.text,
                "num_key_value_heads": 2,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 24,
                "shared_expert_intermediate_size": 40,
            },
        ),
        texts,
    ),
    "DeepSeek-V3": (hf("DeepseekV3ForCausalLM", deepseek), texts),
    "Mamba 2": (
        hf(
            "Mamba2ForCausalLM",
            lambda s: {**s.text, "state_size": 8, "num_heads": s.width // 4, "head_dim": 8, "n_groups": 2},
        ),
        texts,
    ),
    "RWKV": (hf("RwkvForCausalLM", rwkv), texts),
    "BERT": (hf("BertForSequenceClassification", lambda s: s.text), texts),
    "RoBERTa": (hf("RobertaForMaskedLM", lambda s: s.text), texts),
    "ELECTRA": (hf("ElectraForPreTraining", lambda s: {**s.text, "embedding_size": 16}), texts),
    "ALBERT": (hf("AlbertForMaskedLM", lambda s: {**s.text, "embedding_size": 16}), texts),
    "DistilBERT": (
        hf(
            "DistilBertForMaskedLM",
            lambda s: {"vocab_size": 64, "dim": s.width, "hidden_dim": s.inner, "n_layers": s.layers, "n_heads": 4},
        ),
        texts,
    ),
    "DeBERTa-v2": (hf("DebertaV2ForMaskedLM", deberta), texts),
    "ModernBERT": (
        hf(
            "ModernBertForMaskedLM",
            lambda s: {
                **s.text,
                "local_attention": 4,
                "global_attn_every_n_layers": 2,
                "cls_token_id": 2,
                "sep_token_id": 3,
            },
        ),
        texts,
    ),
    "T5": (hf("T5ForConditionalGeneration", t5), pairs),
    "Switch Transformers": (hf("SwitchTransformersForConditionalGeneration", switch), pairs),
    "BART": (
        hf("BartForConditionalGeneration", lambda s: {**s.text, **s.halves, "max_position_embeddings": 16}),
        pairs,
    ),
    "Whisper": (
        hf(
            "WhisperForConditionalGeneration",
            lambda s: {
                **s.halves,
                "vocab_size": 64,
                "num_mel_bins": 16,
                "max_source_positions": 10,
                "pad_token_id": PAD,
                "max_target_positions": 16,
                "bos_token_id": 2,
                "eos_token_id": 2,
                "decoder_start_token_id": 2,
            },
        ),
        spectra,
    ),
    "wav2vec 2.0": (hf("Wav2Vec2ForCTC", wav2vec2), waves),
    "CLIP": (hf("CLIPModel", lambda s: {**pair_of_towers(s), "projection_dim": 16}), captioned),
    "SigLIP": (hf("SiglipModel", pair_of_towers), captioned),
    "LLaVA": (hf("LlavaForConditionalGeneration", llava), with_image_tokens),
    "ViT": (hf("ViTForImageClassification", lambda s: {**s.image, "num_labels": 3}), images),
    "DINOv2 with registers": (
        hf("Dinov2WithRegistersForImageClassification", lambda s: {**s.image, "mlp_ratio": 2, "num_labels": 3}),
        images,
    ),
    "BEiT": (hf("BeitForImageClassification", lambda s: {**s.image, "num_labels": 3}), images),
    "ViT-MAE": (hf("ViTMAEForPreTraining", vit_mae), images),
    "Swin": (
        hf(
            "SwinForImageClassification",
            lambda s: {**swin(s), "image_size": 32, "patch_size": 4, "num_labels": 3},
        ),
        large_images,
    ),
    "ConvNeXt": (
        hf(
            "ConvNextForImageClassification",
            lambda s: {
                "hidden_sizes": [s.width // 2, s.width],
                "depths": [2, 2],
                "num_stages": 2,
                "num_labels": 3,
                "layer_scale_init_value": 0.5,
            },
        ),
        large_images,
    ),
    "SegFormer": (
        hf(
            "SegformerForSemanticSegmentation",
            lambda s: {
                "num_encoder_blocks": 2,
                "depths": [2, 1],
                "sr_ratios": [2, 1],
                "hidden_sizes": [16, s.width],
                "patch_sizes": [7, 3],
                "strides": [4, 2],
                "num_attention_heads": [2, 4],
                "mlp_ratios": [2, 2],
                "decoder_hidden_size": 32,
                "num_labels": 3,
            },
        ),
        large_images,
    ),
    "DETR": (hf("DetrForObjectDetection", detr), large_images),
    "ViT (timm)": (
        other(
            "timm.models.vision_transformer.VisionTransformer",
            lambda s: {
                "img_size": 16,
                "patch_size": 8,
                "num_classes": 10,
                "embed_dim": s.width,
                "depth": s.layers,
                "num_heads": 4,
            },
        ),
        plain_images,
    ),
    "MLP-Mixer (timm)": (
        other(
            "timm.models.mlp_mixer.MlpMixer",
            lambda s: {
                "img_size": 16,
                "patch_size": 4,
                "num_classes": 10,
                "embed_dim": s.width,
                "num_blocks": s.layers,
            },
        ),
        plain_images,
    ),
    "Swin (timm)": (
        other(
            "timm.models.swin_transformer.SwinTransformer",
            lambda s: {
                **swin(s),
                "img_size": 32,
                "patch_size": 4,
                "num_classes": 10,
                "depths": (2, 2),
                "num_heads": (2, 4),
            },
        ),
        plain_large_images,
    ),
    "ResNet (timm)": (timm_resnet, plain_large_images),
    "DiT (diffusers)": (other("diffusers.DiTTransformer2DModel", dit), noisy_classes),
    "Stable Diffusion 3 (diffusers)": (other("diffusers.SD3Transformer2DModel", sd3), noisy_prompts),
    "Flux (diffusers)": (other("diffusers.FluxTransformer2DModel", flux), noisy_sequences),
    "Stable Diffusion U-Net (diffusers)": (other("diffusers.UNet2DConditionModel", unet), noisy_images),
}
"""How each family's model is built, and its batches."""
