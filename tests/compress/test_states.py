"""Where hidden states wait, and what a block is called on."""

from typing import Any

import pytest
import torch
from torch import nn

from small_networks import Block as DenseBlock
from small_networks import padding, sequences
from structmat.compress import states as states_module
from structmat.compress.states import Block, States
from structmat.network.masks import SHAPE_RULE, BatchMasks
from structmat.network.sites import find_sites


def call(block: nn.Module, state: Any, i: int) -> Any:
    return block(state)


def block_with(*masks: BatchMasks) -> Block:
    dense, xs = DenseBlock(12).eval(), sequences(2)
    return Block(
        "layers.0",
        dense,
        DenseBlock(12).eval(),
        States(xs, [x + 1 for x in xs], list(masks) or [BatchMasks()] * 2),
        call,
    )


def test_names_within_a_block() -> None:
    block = block_with()
    assert block.own_name("layers.0.up") == "up"
    whole = Block("", block.dense, block.working, block.states, call)
    assert whole.own_name("layers.0.up") == "layers.0.up"


@torch.no_grad()
@pytest.mark.parametrize("dense", [True, False])
def test_the_dense_block_reads_dense_states_and_the_copy_compressed_ones(dense: bool) -> None:
    block = block_with()
    module, states = (block.dense, block.states.dense) if dense else (block.working, block.states.compressed)
    assert torch.equal(block.output(1, dense=dense), module(states[1]))
    site = find_sites(module)["up"]
    read = block.captured(site, 12, 1, dense=dense, stop=False)
    assert read.shape == (states[1].shape[0] * states[1].shape[1], 12)
    assert torch.equal(read, block.captured(site, 12, 1, dense=dense, stop=True))


@torch.no_grad()
def test_masked_tokens_are_left_out() -> None:
    mask = padding().bool()
    block = block_with(BatchMasks(), BatchMasks({"attention_mask": mask}, default=SHAPE_RULE))
    assert len(block.captured(find_sites(block.dense)["up"], 12, 1, dense=True, stop=True)) == int(mask.sum())


@torch.no_grad()
def test_outputs_wait_in_the_memory_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states_module, "HOST", torch.device("meta"))  # tells where an output was sent
    assert block_with().output(0, dense=True).is_meta


def test_memory_counts_states_that_differ_once_more() -> None:
    xs = sequences(2)
    same = States(xs, xs, [BatchMasks()] * 2)
    assert not same.differ
    assert same.nbytes == sum(x.nbytes for x in xs)
    both = States(xs, [x.clone() for x in xs], [BatchMasks()] * 2)
    assert both.differ
    assert both.nbytes == 2 * same.nbytes
    assert States([{"x": xs[0]}], [{"x": xs[0]}], [None]).nbytes == 0
