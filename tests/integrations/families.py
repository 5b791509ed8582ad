"""The families of models that are tested: what compression makes of each, as the documentation says it too."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

REASONS: dict[str, tuple[str, str]] = {
    "tied": (r"its weight is shared with .*embed|.*\.wte|.*shared", "tied to the embedding"),
    "small": (r"expected a keep of at least", "too small to save parameters"),
    "depthwise": (r"it is a convolution with \d+ groups", "one small filter for each channel"),
    "fused": (r".*held by a \w+Experts", "experts fused in one parameter"),
    "router": (r".*held by a \w+Router", "a router of its own class"),
    "computed": (r"it is a ParametrizedConv1d, a Conv1d that may use", "a convolution whose weight is computed"),
    "table": (r".*held by a", "a learned table"),
    "attention": (r".*MultiheadAttention|it is a NonDynamicallyQuantizableLinear", "part of `nn.MultiheadAttention`"),
    "own kind": (
        r"it is a \w+, a Linear that may use",
        "a subclass of `nn.Linear`, which may use its weight in other ways",
    ),
}
"""Why a matrix stays dense: what the message begins with, and how the documentation says it."""

ONE_BLOCK: dict[str, tuple[str | None, str]] = {
    "lists": (None, "its layers lie in several lists"),
    "once": (None, "one block is called many times"),
    "streams": (None, "its blocks hand on two hidden states"),
    "hooks": ("that raises IndexError", "the head reads the outputs of all blocks"),
    "borrowed": ("is called from outside too", "a layer of the first block is called again after the blocks"),
}
"""Why a network is one block: the warning, None for no warning, and how the documentation says it."""


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        layers: The kinds of layers that are compressed.
        dense: The kinds of matrices that stay dense, each with a key of ``REASONS``.
        run: The list of the blocks; or why the network is one block, a key of ``ONE_BLOCK``.
        lost: The layers in which padding counts too, since no mask fits their vectors: a regular expression.
        apart: The layers that read something else than tokens: a regular expression.
        quick: Whether the quick suite tests it.
    """

    layers: str
    dense: Mapping[str, str] = field(default_factory=dict)
    run: str = ""
    lost: str | None = None
    apart: str = ""
    quick: bool = False

    @property
    def is_chain(self) -> bool:
        """Whether the network is compressed block by block."""
        return bool(self.layers) and self.run not in ONE_BLOCK


def kind(name: str) -> str:
    """What a layer or a parameter is called within its block: the last part of its name, or two for a parameter."""
    parts = [part for part in name.split(".") if not part.isdigit() and part not in ("parametrizations", "original1")]
    return parts[-1] if parts[-1] != "weight" or len(parts) < 2 else ".".join(parts[-2:])


FAMILIES: dict[str, Family] = {
    "Llama": Family("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head", run="model.layers", quick=True),
    "Mistral, sliding window": Family(
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head", run="model.layers", quick=True
    ),
    "Qwen3": Family("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head", run="model.layers"),
    "Gemma 3": Family(
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
        dense={"lm_head": "tied"},
        run="model.layers",
        quick=True,
    ),
    "Phi-3": Family("o_proj qkv_proj gate_up_proj down_proj lm_head", run="model.layers"),
    "GPT-NeoX": Family("query_key_value dense dense_h_to_4h dense_4h_to_h lm_head", run="gpt_neox.layers"),
    "GPT-2": Family("c_attn c_proj c_fc", dense={"lm_head": "tied"}, run="transformer.h", quick=True),
    "OPT": Family(
        "k_proj v_proj q_proj out_proj fc1 fc2", dense={"lm_head": "tied"}, run="model.decoder.layers", quick=True
    ),
    "Falcon": Family(
        "",
        dense={
            "query_key_value": "own kind",
            "dense": "own kind",
            "dense_h_to_4h": "own kind",
            "dense_4h_to_h": "own kind",
            "lm_head": "tied",
        },
    ),
    "BLOOM": Family(
        "query_key_value dense dense_h_to_4h dense_4h_to_h", dense={"lm_head": "tied"}, run="transformer.h"
    ),
    "Mixtral": Family(
        "q_proj k_proj v_proj o_proj lm_head",
        dense={"gate.weight": "router", "gate_up_proj": "fused", "down_proj": "fused"},
        run="model.layers",
        quick=True,
    ),
    "Qwen2-MoE": Family(
        "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head",
        dense={"shared_expert_gate": "small", "gate.weight": "router", "gate_up_proj": "fused", "down_proj": "fused"},
        run="model.layers",
    ),
    "DeepSeek-V3": Family(
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj gate_proj up_proj down_proj lm_head",
        dense={"gate_up_proj": "fused", "down_proj": "fused", "gate.weight": "router"},
        run="model.layers",
    ),
    "Mamba 2": Family("in_proj out_proj lm_head", dense={"conv1d": "depthwise"}, run="backbone.layers"),
    "RWKV": Family("key value receptance output head", run="rwkv.blocks", quick=True),
    "BERT": Family("query key value dense", dense={"classifier": "small"}, run="bert.encoder.layer", quick=True),
    "RoBERTa": Family("query key value dense", dense={"decoder": "tied"}, run="roberta.encoder.layer"),
    "ELECTRA": Family(
        "embeddings_project query key value dense", dense={"dense_prediction": "small"}, run="electra.encoder.layer"
    ),
    "ALBERT": Family(
        "embedding_hidden_mapping_in query key value dense ffn ffn_output",
        dense={"decoder": "tied"},
        run="once",
        quick=True,
    ),
    "DistilBERT": Family(
        "q_lin k_lin v_lin out_lin lin1 lin2 vocab_transform",
        dense={"vocab_projector": "tied"},
        run="distilbert.transformer.layer",
    ),
    "DeBERTa-v2": Family(
        "query_proj key_proj value_proj pos_key_proj pos_query_proj dense",
        dense={"decoder": "tied"},
        run="deberta.encoder.layer",
        apart=r".*pos_\w+_proj",
        quick=True,
    ),
    "ModernBERT": Family("Wqkv Wo Wi dense", dense={"decoder": "tied"}, run="model.layers", quick=True),
    "T5": Family("q k v o wi wo", dense={"lm_head": "tied"}, run="lists"),
    "Switch Transformers": Family(
        "q k v o wi wo", dense={"classifier": "small", "lm_head": "tied"}, run="lists", lost=".*experts.*"
    ),
    "BART": Family("k_proj v_proj q_proj out_proj fc1 fc2", dense={"lm_head": "tied"}, run="lists"),
    "Whisper": Family(
        "conv1 conv2 k_proj v_proj q_proj out_proj fc1 fc2",
        dense={"proj_out": "tied"},
        run="lists",
    ),
    "wav2vec 2.0": Family(
        "conv projection k_proj v_proj q_proj out_proj intermediate_dense output_dense lm_head",
        dense={"conv": "computed"},
        run="wav2vec2.encoder.layers",
        lost=".*",
    ),
    "CLIP": Family(
        "k_proj v_proj q_proj out_proj fc1 fc2 patch_embedding visual_projection text_projection",
        run="lists",
        apart=r".*(vision|visual|projector).*",
    ),
    "SigLIP": Family(
        "k_proj v_proj q_proj out_proj fc1 fc2 head patch_embedding",
        dense={},
        run="lists",
        apart=r".*(vision|visual|projector).*",
        lost=r"text_model\.head",
    ),
    "LLaVA": Family(
        "patch_embedding k_proj v_proj q_proj out_proj fc1 fc2 linear_1 linear_2 o_proj gate_proj "
        "up_proj down_proj lm_head",
        run="lists",
        apart=r".*(vision|visual|projector).*",
        quick=True,
    ),
    "ViT": Family(
        "projection q_proj k_proj v_proj o_proj fc1 fc2 classifier",
        dense={"position_embeddings": "table"},
        run="vit.layers",
        quick=True,
    ),
    "DINOv2 with registers": Family(
        "projection q_proj k_proj v_proj o_proj fc1 fc2 classifier",
        dense={"position_embeddings": "table", "register_tokens": "table"},
        run="dinov2_with_registers.encoder.layer",
    ),
    "BEiT": Family("projection q_proj k_proj v_proj o_proj fc1 fc2 classifier", run="beit.layers"),
    "ViT-MAE": Family(
        "projection q_proj k_proj v_proj o_proj fc1 fc2 decoder_embed decoder_pred",
        dense={"position_embeddings": "table", "decoder_pos_embed": "table"},
        run="lists",
    ),
    "Swin": Family(
        "projection q_proj k_proj v_proj o_proj fc1 fc2 reduction classifier",
        dense={"relative_position_bias_table": "table"},
        run="swin.encoder.layers",
    ),
    "ConvNeXt": Family(
        "patch_embeddings pwconv1 pwconv2 downsampling_layer classifier",
        dense={"dwconv": "depthwise"},
        run="convnext.encoder.stages",
        quick=True,
    ),
    "SegFormer": Family(
        "proj q_proj k_proj v_proj o_proj sequence_reduction fc1 fc2 linear_fuse classifier",
        dense={"dwconv": "depthwise"},
        run="hooks",
    ),
    "DETR": Family(
        "convolution input_projection k_proj v_proj q_proj o_proj fc1 fc2 class_labels_classifier layers", run="lists"
    ),
    "ViT (timm)": Family("proj qkv fc1 fc2 head", dense={"pos_embed": "table"}, run="blocks", quick=True),
    "MLP-Mixer (timm)": Family("proj fc1 fc2 head", run="blocks"),
    "Swin (timm)": Family(
        "proj qkv fc1 fc2 reduction fc", dense={"relative_position_bias_table": "table"}, run="layers"
    ),
    "ResNet (timm)": Family("conv1 conv2 downsample fc", run="lists"),
    "DiT (diffusers)": Family(
        "proj linear_1 linear_2 linear to_q to_k to_v to_out net proj_out_1 proj_out_2", run="borrowed", quick=True
    ),
    "Stable Diffusion 3 (diffusers)": Family(
        "proj linear_1 linear_2 context_embedder linear to_q to_k to_v add_k_proj add_v_proj add_q_proj "
        "to_out to_add_out net proj_out",
        run="streams",
    ),
    "Flux (diffusers)": Family(
        "linear_1 linear_2 context_embedder x_embedder linear to_q to_k to_v to_out add_q_proj "
        "add_k_proj add_v_proj to_add_out proj net proj_mlp proj_out",
        run="lists",
    ),
    "Stable Diffusion U-Net (diffusers)": Family(
        "conv_in linear_1 linear_2 conv1 time_emb_proj conv2 conv proj_in to_q to_k to_v to_out proj "
        "net proj_out conv_shortcut conv_out",
        run="lists",
    ),
}


def table() -> str:
    """The families as the documentation shows them, a row for those that are alike."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name, family in FAMILIES.items():
        dense: dict[str, list[str]] = {}
        for one, reason in family.dense.items():
            dense.setdefault(REASONS[reason][1], []).append(one)
        stays = "; ".join(f"{quoted(ones)}: {reason}" for reason, ones in dense.items())
        blocks = f"one block: {ONE_BLOCK[family.run][1]}" if family.run in ONE_BLOCK else f"blocks of `{family.run}`"
        rows.setdefault((quoted(family.layers.split()), stays, blocks if family.run else ""), []).append(name)
    head = "| families | compressed | stays dense | in sequence |\n|---|---|---|---|\n"
    return head + "".join(
        f"| {'; '.join(names)} | {' | '.join(cell or 'nothing' for cell in cells)} |\n" for cells, names in rows.items()
    )


def quoted(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
