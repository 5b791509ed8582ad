"""Networks that are chains of blocks, and some that are none, for the tests of looking at and compressing them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small_networks import Stack


class Variant(Stack):
    """A stack whose blocks are called in another way."""

    def __init__(self, kind: str, depth: int = 3) -> None:
        super().__init__(depth=depth)
        self.kind = kind
        if kind == "one block many times":
            self.blocks = nn.ModuleList([self.blocks[0]] * depth)
        if kind == "shared weights":
            self.blocks[2].up.weight = self.blocks[0].up.weight
        if kind == "outweighed":
            self.others = nn.ModuleDict({str(k): nn.Linear(24, 24) for k in range(8)})

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        blocks = reversed(self.blocks) if self.kind == "backwards" else self.blocks
        first: Tensor | None = None
        for k, block in enumerate(blocks):
            if self.kind == "skips one" and k == 1:
                continue
            if self.kind == "changed between":
                x = x * 1.5
            if self.kind == "long skip" and k == 2:
                x = block(x, first)
                continue
            x = block(x=x) if self.kind == "by keyword" else block(x)
            first = x if first is None else first
        for other in self.others.values() if self.kind == "outweighed" else ():
            x = other(x)
        return self.head(x)


class Residual(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(width, width, 3, stride, 1), nn.Conv2d(width, width, 3, padding=1)
        self.short = nn.Conv2d(width, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(x) + self.second(self.first(x).relu())


class ResNet(nn.Module):
    """Stages of unlike blocks, none of which holds most layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        for k in range(3):
            setattr(self, f"stage{k}", nn.Sequential(Residual(8, 2), Residual(8, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.stage2(self.stage1(self.stage0(self.stem(x))))


def transformer(name: str) -> Any:
    """A tiny model of transformers by class name, random and in evaluation mode."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48}
    if name.startswith("GPT2"):
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    elif name.startswith("T5"):
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    elif name.startswith("Albert"):
        sizes |= {"embedding_size": 16}
    elif name.startswith("ViT"):
        del sizes["vocab_size"]
        sizes |= {"image_size": 16, "patch_size": 8}
    else:
        sizes |= {"num_key_value_heads": 2}
    kind = getattr(transformers, name)
    return kind(kind.config_class(**sizes)).eval()


def transformer_batch(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A batch that the model takes."""
    g = torch.Generator().manual_seed(seed)
    if "ViT" in type(model).__name__:
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=g)}
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    batch = {"input_ids": torch.randint(1, 60, (3, 9), generator=g), "attention_mask": mask}
    if "T5" in type(model).__name__:
        batch["decoder_input_ids"] = torch.randint(1, 60, (3, 5), generator=g)
    return batch
