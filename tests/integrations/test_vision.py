"""Models of timm and torchvision, which have no configuration: save and load of the library itself."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from networks import same_state
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from structmat import (
    Blast,
    LowRank,
    Monarch,
    Rule,
    StructuredConv2d,
    compress_,
    densify_,
    load_model,
    make_plan,
    plan_of,
    save_model,
)
from structmat import report as report_on

SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 8, "num_classes": 10}


def mixer() -> nn.Module:
    return MlpMixer(**SIZES, num_blocks=2, embed_dim=32)


def vision_transformer() -> nn.Module:
    return VisionTransformer(**SIZES, embed_dim=32, depth=2, num_heads=4)


def timm_resnet() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=10)


def torchvision_resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


CASES: dict[str, Any] = {
    "mixer": (mixer, {r".*mlp_channels\.fc\d": Rule(Blast, blocks=4), r".*mlp_tokens\.fc2": LowRank}),
    "vit": (vision_transformer, {r".*attn\.qkv": Rule(Blast, blocks=(6, 4)), r".*fc1": Rule(Monarch, blocks=4)}),
    "timm resnet": (timm_resnet, {r"layer1\..*conv1": LowRank, r"layer2\..*conv2": Rule(Blast, blocks=4)}),
    "torchvision resnet": (torchvision_resnet, {r"layer1\..*conv1": LowRank, "fc": LowRank}),
}


@pytest.mark.parametrize(("make", "rules"), list(CASES.values()), ids=list(CASES))
def test_round_trip(make: Any, rules: dict[Any, Any], tmp_path: Path) -> None:
    model = make().eval()
    compress_(model, make_plan(model, rules, keep=0.6), progress=False)
    size = 32 if "ResNet" in type(model).__name__ else 16
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        before = model(images)
    save_model(model, tmp_path / "model.safetensors")
    torch.manual_seed(7)
    loaded = load_model(make().eval(), tmp_path / "model.safetensors")
    assert plan_of(loaded) == plan_of(model)
    assert same_state(loaded, model)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), before)
        torch.testing.assert_close(densify_(loaded)(images), before, rtol=1e-3, atol=1e-4)
    assert {type(m) for m in loaded.modules()} == {type(m) for m in make().modules()}
    save_model(loaded, tmp_path / "dense.safetensors")


def test_convolutions_of_a_resnet_are_structured() -> None:
    model = torchvision_resnet()
    compress_(model, make_plan(model, {r"layer1\.0\.conv1": LowRank}), progress=False)
    assert isinstance(model.get_submodule("layer1.0.conv1"), StructuredConv2d)


def test_position_tables_are_named() -> None:
    assert set(report_on(vision_transformer()).unseen) == {"pos_embed"}
