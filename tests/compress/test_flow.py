"""How long data takes to flow through a network."""

import copy
import dataclasses
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small_networks import Stack, mlp, sequences, snapshot
from structmat.compress.flow import Flow, Read, measure_flow, unit_count
from structmat.formats import LowRank

SHAPES = dict.fromkeys(("query", "key", "value", "out"), (24, 24)) | {"up": (48, 24), "down": (24, 48)}
PLANNED = {f"blocks.{k}.{name}": LowRank(*shape, 4) for k in range(3) for name, shape in SHAPES.items()}


def test_passes_in_sequence() -> None:
    reads = (Read(0.1, 1.0, (0.25, 0.5), ("query", "key")), Read(0.5, 2.0, (1.0, 3.0), ("down",)))
    flow = Flow(block=10.0, rest=7.0, names=("b.0", "b.1", "b.2", "b.3"), reads=reads)
    assert flow.forward == 47
    # b.0: dense, and compressed in three calls, each from half of what the two before computed; b.1: dense alone, twice
    # if states differ
    first = 10 + 1 * 0.25 + (10 * (0.5 - 0.1 / 2) + 2 * 3) + 10 * (1 - (0.1 + 0.5) / 2)
    assert flow.in_sequence(["b.0.query", "b.0.key", "b.0.down"]) == pytest.approx(first)
    assert flow.in_sequence(["b.0.query"]) == pytest.approx(10 + 0.25 + 10 * 0.95)
    assert flow.in_sequence(["b.1.down"], refined=4) == pytest.approx(10 + (1 + 4) * 10 + 2 * 1 + 10 * 0.75)
    assert flow.in_sequence(["b.0.query", "b.2.key"]) == pytest.approx(19.75 + 20 + 10 + 10 * 0.1 + 0.5 + 10 * 0.95)
    assert flow.in_sequence([]) == 0
    assert flow.moments(["b.0.query", "b.0.key", "b.3.down"]) == pytest.approx(0.25 + 2)
    slower = dataclasses.replace(flow, compressed=20.0)
    again = 20 * (0.5 - 0.1 / 2) + 20 * (1 - (0.1 + 0.5) / 2)
    assert slower.in_sequence(["b.0.query", "b.0.key", "b.0.down"]) == pytest.approx(10 + 0.25 + 2 * 3 + again)
    assert slower.in_sequence(["b.1.down"], refined=4) == pytest.approx(10 + (10 + 4 * 20) + 2 * 1 + 20 * 0.75)


def test_units_are_tokens_with_padding_or_examples() -> None:
    ids = torch.zeros(3, 5, dtype=torch.long)
    assert unit_count({"input_ids": ids, "attention_mask": ids}) == 15
    assert unit_count({"pixel_values": torch.zeros(3, 2, 4, 4)}) == 3
    assert unit_count((torch.zeros(2, 4), 1)) == 2
    assert unit_count(None) == 0


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("returns_tuple", [False, True])
def test_two_blocks_are_measured(meta: bool, returns_tuple: bool) -> None:
    model = Stack(depth=3, returns_tuple=returns_tuple)
    if meta:
        model = model.to("meta")
    before, blocks = snapshot(model), list(model.blocks)
    flow = measure_flow(model, PLANNED, sequences(1)[0])
    assert snapshot(model) == before
    assert list(model.blocks) == blocks
    assert flow is not None
    assert flow.names == ("blocks.0", "blocks.1", "blocks.2")
    assert [read.layers for read in flow.reads] == [("query", "key", "value"), ("out",), ("up",), ("down",)]
    assert [read.share for read in flow.reads] == sorted(read.share for read in flow.reads)
    assert 0 < flow.reads[0].share < flow.reads[-1].share < 1
    assert flow.block > 0
    assert flow.rest > 0
    assert flow.compressed is not None
    assert flow.compressed > 0
    example = sequences(1)[0]
    assert {read.vectors for read in flow.reads} == {example.numel() / example.shape[-1] / len(example)}


def test_the_blocks_that_have_planned_layers_are_called() -> None:
    model, called = Stack(depth=4), list[int]()
    for k, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, k=k: called.append(k))
    measure_flow(model, {f"blocks.{k}.up": PLANNED["blocks.0.up"] for k in (1, 2)}, sequences(1)[0])
    assert set(called) == {1, 2}


def test_a_network_without_blocks_is_one_block() -> None:
    flow = measure_flow(
        mlp(),
        {name: LowRank(*shape, 4) for name, shape in (("0", (32, 24)), ("2", (32, 32)), ("4", (24, 32)))},
        torch.randn(8, 24),
    )
    assert flow is not None
    assert flow.names == ("",)
    assert [read.layers for read in flow.reads] == [("0",), ("2",), ("4",)]
    assert flow.in_sequence(["0", "2"]) > flow.block


class Counting(Stack):
    """A network that cannot do without its third block."""

    def forward(self, x: Tensor, attention_mask: Any = None) -> Tensor:
        return self.blocks[2](super().forward(x))


def test_a_network_that_cannot_be_shortened_is_not_measured() -> None:
    model = Counting(depth=3)
    blocks = list(model.blocks)
    assert measure_flow(model, PLANNED, sequences(1)[0]) is None
    assert list(model.blocks) == blocks


def test_too_many_missing_weights_are_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("structmat.compress.flow.MOST_WEIGHTS", 100)
    assert measure_flow(Stack(depth=3).to("meta"), PLANNED, sequences(1)[0]) is None


@pytest.mark.slow
def test_the_time_of_a_call() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(512, 512), nn.ReLU()) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model, batch = Wide(), torch.randn(4096, 512)
    flow = measure_flow(
        copy.deepcopy(model).to("meta"), {f"blocks.{k}.0": LowRank(512, 512, 64) for k in range(6)}, batch
    )
    assert flow is not None
    model(batch)
    start = time.perf_counter()
    model(batch)
    took = time.perf_counter() - start
    assert took / 4 < flow.forward * len(batch) < 4 * took  # the machine may be busy with other things
