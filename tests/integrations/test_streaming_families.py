"""Streaming of models whose layers differ from each other: the same as in memory, to the last bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from networks import same_state
from torch import Tensor
from transformers import (
    BambaConfig,
    FalconH1Config,
    Gemma3TextConfig,
    GptOssConfig,
    Lfm2Config,
    Mamba2Config,
    PreTrainedConfig,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
    ZambaConfig,
)

from structmat import LowRank, compress_, make_plan
from structmat.integrations.transformers.streaming import _one_example, compress_checkpoint, skeleton

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TEXT: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 8}
MAMBA: dict[str, Any] = {"mamba_d_state": 8, "mamba_n_heads": 8}

FAMILIES: dict[str, tuple[str, PreTrainedConfig, str]] = {
    "five sliding layers, one full": (
        "Gemma3ForCausalLM",
        Gemma3TextConfig(**TEXT, num_hidden_layers=6, sliding_window=4),
        r".*_proj",
    ),
    "layer types are a property": (
        "Mamba2ForCausalLM",
        Mamba2Config(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=8, head_dim=8, n_groups=2
        ),
        r".*(in|out)_proj",
    ),
    "attention beside a state space": (
        "FalconH1ForCausalLM",
        FalconH1Config(**TEXT, num_hidden_layers=2, mamba_d_ssm=64, mamba_d_head=8, **MAMBA),
        r".*_proj",
    ),
    "some layers attend": (
        "BambaForCausalLM",
        BambaConfig(
            **SIZES, num_key_value_heads=2, num_hidden_layers=4, attn_layer_indices=[1, 3], mamba_d_head=8, **MAMBA
        ),
        r".*_proj",
    ),
    "a list of the layers that attend": (
        "Lfm2ForCausalLM",
        Lfm2Config(**SIZES, num_key_value_heads=2, num_hidden_layers=3, full_attn_idxs=[1]),
        r".*(_proj|w\d)",
    ),
    "experts, every other layer sliding": (
        "GptOssForCausalLM",
        GptOssConfig(**TEXT, num_hidden_layers=3, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
        r".*_proj",
    ),
    "a list of the layers without experts": (
        "Qwen3MoeForCausalLM",
        Qwen3MoeConfig(**TEXT, num_hidden_layers=3, num_experts=4, mlp_only_layers=[0, 1, 2]),
        r".*_proj",
    ),
    "blocks that share a part": (
        "ZambaForCausalLM",
        ZambaConfig(
            **SIZES,
            num_key_value_heads=4,
            num_hidden_layers=7,
            attn_layer_period=3,
            attn_layer_offset=2,
            mamba_d_state=8,
            n_mamba_heads=2,
        ),
        r".*mamba\.(in|out)_proj",
    ),
    "a text model inside": (
        "SmolVLMForConditionalGeneration",
        SmolVLMConfig(
            text_config={"model_type": "llama", **TEXT, "num_hidden_layers": 3, "pad_token_id": 0},
            vision_config={**VISION, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16},
        ),
        r".*text_model.*_proj",
    ),
    "states that come from elsewhere": (
        "Qwen3VLForConditionalGeneration",
        Qwen3VLConfig(
            text_config={**TEXT, "num_hidden_layers": 3},
            vision_config={
                **VISION,
                "depth": 2,
                "num_heads": 2,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0],
            },
        ),
        r".*language_model.*_proj",
    ),
}
each_family = pytest.mark.parametrize("name", FAMILIES)


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 9, dtype=torch.long)
    return [{"input_ids": torch.randint(1, 60, (3, 9), generator=generator), "attention_mask": mask} for _ in range(2)]


@each_family
@pytest.mark.parametrize("given", [None, batches()], ids=["weights", "data"])
def test_it_is_bit_for_bit_what_compress_gives(name: str, given: list[Any] | None, tmp_path: Path) -> None:
    kind, config, layers = FAMILIES[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model_class(config).save_pretrained(tmp_path / "dense", max_shard_size="15KB")
    plan = make_plan(skeleton(tmp_path / "dense"), {layers: LowRank}, keep=0.6)
    compress_checkpoint(tmp_path / "dense", tmp_path / "out", plan, progress=False, batches=given)
    expected = model_class.from_pretrained(tmp_path / "dense")
    compress_(expected, plan, progress=False, batches=given)
    loaded = model_class.from_pretrained(tmp_path / "out")
    assert same_state(loaded, expected)


def test_blocks_that_share_all_are_refused(tmp_path: Path) -> None:
    kind, config, _ = FAMILIES["blocks that share a part"]
    getattr(transformers, kind)(config).save_pretrained(tmp_path / "dense")
    plan = make_plan(skeleton(tmp_path / "dense"), {r".*shared_transf.*_proj": LowRank}, keep=0.6)
    with pytest.raises(ValueError, match="expected every planned layer inside the blocks"):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", plan, progress=False)


def test_blocks_that_are_no_chain_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, config, layers = FAMILIES["five sliding layers, one full"]
    getattr(transformers, kind)(config).save_pretrained(tmp_path / "dense")
    plan = make_plan(skeleton(tmp_path / "dense"), {layers: LowRank}, keep=0.6)
    monkeypatch.setattr("structmat.network.chain._identical", lambda first, second: False)
    with (
        pytest.warns(UserWarning, match="cannot be called one by one"),
        pytest.raises(ValueError, match="expected every planned layer inside the blocks"),
    ):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", plan, progress=False, batches=batches())


def test_one_example_of_a_batch() -> None:
    one, two = torch.arange(6).view(3, 2), torch.arange(3)
    assert _one_example(one).tolist() == [[0, 1]]
    assert [value.tolist() for value in _one_example((one, two))] == [[[0, 1]], [0]]
    assert {name: value.tolist() for name, value in _one_example({"a": one, "b": two}).items()} == {
        "a": [[0, 1]],
        "b": [0],
    }
    for other in (torch.zeros(1, 2), None, [0], torch.tensor(1)):
        batch = {"a": one, "b": other}
        assert _one_example(batch) is batch
