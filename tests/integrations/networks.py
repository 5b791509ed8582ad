"""Small random networks of other libraries, and what several tests ask of them."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from structmat import Blast, LowRank, Monarch, Rule, compress_, make_plan

TEXT: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
"""Sizes that most text models name alike."""


def build(name: str, **options: Any) -> Any:
    """A model of transformers by class name, random and in evaluation mode."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**TEXT, "intermediate_size": 48}
    if name.startswith("GPT2"):
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    elif name.startswith("Bert"):
        sizes["num_labels"] = 3
    elif name.startswith("ViT"):
        sizes |= {"image_size": 16, "patch_size": 8, "num_labels": 3}
        del sizes["vocab_size"]
    elif name.startswith("Mixtral"):
        sizes |= {"num_key_value_heads": 2, "num_local_experts": 2}
    else:
        sizes |= {"num_key_value_heads": 2}
    kind = getattr(transformers, name)
    return kind(kind.config_class(**{**sizes, **options})).eval()


def inputs_of(model: nn.Module) -> Tensor:
    """A batch that the model takes."""
    generator = torch.Generator().manual_seed(1)
    if "ViT" in type(model).__name__:
        return torch.randn(2, 3, 16, 16, generator=generator)
    return torch.randint(1, 60, (2, 9), generator=generator)


@torch.no_grad()
def output_of(model: nn.Module) -> Tensor:
    """The first output for a batch, of a copy: products can differ in the last bit with a tensor's place in memory."""
    return copy.deepcopy(model)(inputs_of(model))[0]


def llama(block: str = "mlp") -> dict[Any, Any]:
    """Rules for the models that name their layers as Llama does."""
    rules = {r".*\.q_proj": LowRank, r".*\.o_proj": Rule(Blast, blocks=4)}
    return rules | (
        {rf".*\.{block}\.up_proj": Rule(Monarch, blocks=4), rf".*\.{block}\.down_proj": LowRank} if block else {}
    )


RULES: dict[str, dict[Any, Any]] = {
    "Llama": llama(),
    "Mistral": llama(),
    "Qwen2": llama(),
    "Mixtral": llama(""),
    "GPT2": {r".*c_attn": LowRank, r".*mlp\.c_proj": Rule(Blast, blocks=4), r".*c_fc": Rule(Monarch, blocks=4)},
    "Bert": {r".*query": LowRank, r".*\d\.output\.dense": Rule(Blast, blocks=4), r".*mediate\.dense": LowRank},
    "ViT": {r".*q_proj": LowRank, r".*fc1": Rule(Blast, blocks=4), r".*fc2": Rule(Monarch, blocks=4)},
}
"""What to make of which layers, by the first word of the model's class."""


def compressed(model: Any) -> Any:
    """The model with some layers structured, fitted to its weights."""
    rules = next(rules for name, rules in RULES.items() if type(model).__name__.startswith(name))
    compress_(model, make_plan(model, rules, keep=0.6), progress=False)
    return model


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Whether names and values of two state dicts are equal."""
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def files_of(folder: Path) -> dict[str, bytes]:
    """The weight files of a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}
