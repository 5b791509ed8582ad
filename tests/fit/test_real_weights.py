"""Trained weights: what the structures make of a real network."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from structmat import Blast, BlockDiagonal, Format, LowRank, Monarch, default_method

pytestmark = pytest.mark.slow

LAYERS = [
    "model.layers.0.self_attn.q_proj", "model.layers.2.self_attn.o_proj", "model.layers.3.mlp.gate_proj",
    "model.layers.5.mlp.down_proj",
]  # fmt: skip


@pytest.fixture(scope="module")
def weights(data_folder: Path) -> dict[str, Tensor]:
    tensors = load_file(data_folder / "stories3M-llama" / "model.safetensors")
    return {name: tensors[f"{name}.weight"].float() for name in LAYERS}


def error(weight: Tensor, format: type[Format], **options: int) -> float:
    M, N = weight.shape
    member = format.for_budget(M, N, keep=0.5, **options)
    assert 0.45 < member.keep <= 0.5
    return default_method(member)(weight, member).error


@pytest.mark.parametrize("layer", LAYERS)
def test_blast_beats_every_structure_that_it_contains(weights: dict[str, Tensor], layer: str) -> None:
    weight = weights[layer]
    blast = error(weight, Blast, blocks=8)
    assert blast < 0.97 * error(weight, LowRank)
    assert blast < 0.97 * error(weight, Monarch, blocks=8)
    assert blast < 0.97 * error(weight, BlockDiagonal)


@pytest.mark.parametrize("layer", LAYERS)
def test_more_blocks_are_better(weights: dict[str, Tensor], layer: str) -> None:
    errors = [error(weights[layer], Blast, blocks=blocks) for blocks in (2, 4, 8)]
    assert errors == sorted(errors, reverse=True)


def test_bfloat16_costs_little(weights: dict[str, Tensor]) -> None:
    weight = weights[LAYERS[0]]
    assert error(weight.to(torch.bfloat16), Blast, blocks=8) == pytest.approx(error(weight, Blast, blocks=8), rel=0.02)
