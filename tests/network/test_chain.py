"""The blocks of a network: which lists are found, and what passes through them."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chains import ResNet, Variant, transformer, transformer_batch
from small_networks import Block, Stack, mlp, padding, sequences
from structmat.network.adapters import ADAPTERS, Adapter
from structmat.network.calls import tensor_of
from structmat.network.chain import Chain, Relay, find_chain
from structmat.network.sites import find_sites


def planned(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every layer that can be structured."""
    return {name: site.names for name, site in find_sites(model).items() if site.problem is None}


@torch.no_grad()
def chain_of(model: nn.Module, batch: Any) -> Chain | None:
    return find_chain(model.eval(), planned(model), batch)


# What is a chain


@pytest.mark.parametrize("returns_tuple", [False, True])
def test_a_list_of_blocks_is_found(returns_tuple: bool) -> None:
    chain = chain_of(Stack(returns_tuple=returns_tuple), sequences(1)[0])
    assert chain == Chain(("blocks.0", "blocks.1", "blocks.2"), returns_tuple, ("embed",))
    assert chain.outside(["embed", "blocks.1.up", "head", "blocks.2.down"]) == (["embed"], ["head"])


def test_a_sequential_of_blocks_is_found() -> None:
    model = nn.Sequential(nn.Linear(12, 24), nn.Sequential(Block(24), Block(24)), nn.Linear(24, 4))
    assert chain_of(model, sequences(1)[0]) == Chain(("1.0", "1.1"), False, ("0",))


def test_the_longest_list_is_taken() -> None:
    stages = nn.Sequential(*[nn.Sequential(Block(12), Block(12)) for _ in range(3)])
    chain = chain_of(stages, sequences(1)[0])
    assert chain is not None
    assert chain.names == ("0", "1", "2")


NO_CHAINS = (
    "one block many times", "shared weights", "backwards", "skips one", "changed between", "long skip", "by keyword",
    "outweighed",
)  # fmt: skip


@pytest.mark.parametrize("kind", NO_CHAINS)
def test_what_is_no_chain(kind: str) -> None:
    assert chain_of(Variant("plain"), sequences(1)[0]) is not None
    assert chain_of(Variant(kind), sequences(1)[0]) is None


def test_a_residual_network_is_no_chain() -> None:
    assert chain_of(ResNet(), torch.randn(2, 3, 8, 8)) is None


def test_a_chain_of_bare_layers_is_none_of_blocks() -> None:
    assert chain_of(mlp(), torch.randn(3, 24)) is None
    assert chain_of(nn.Sequential(nn.Linear(6, 6)), torch.randn(3, 6)) is None


@pytest.mark.parametrize(
    ("name", "blocks", "before"),
    [
        ("LlamaForCausalLM", "model.layers", ()),
        ("MistralForCausalLM", "model.layers", ()),
        ("GPT2LMHeadModel", "transformer.h", ()),
        ("BertForSequenceClassification", "bert.encoder.layer", ()),
        ("ViTForImageClassification", "vit.layers", ("vit.embeddings.patch_embeddings.projection",)),
        ("AlbertForMaskedLM", None, None),
        ("T5ForConditionalGeneration", None, None),
    ],
)
def test_models_of_transformers(name: str, blocks: str | None, before: tuple[str, ...] | None) -> None:
    model = transformer(name)
    chain = chain_of(model, transformer_batch(model))
    if blocks is None:
        assert chain is None
    else:
        assert chain is not None
        assert chain.names == tuple(f"{blocks}.{k}" for k in range(len(model.get_submodule(blocks))))  # pyright: ignore
        assert chain.before == before


class Borrows(Stack):
    """A stack that calls a layer of its first block again after the blocks."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, attention_mask) + self.head(self.blocks[0].up(self.embed(x))[..., :24])


def test_a_layer_that_is_called_from_outside_of_its_block_makes_a_warning() -> None:
    model, batch = Borrows().eval(), sequences(1)[0]
    with pytest.warns(UserWarning, match=r"one by one \('blocks.0.up' is called from outside too\); the whole network"):
        assert chain_of(model, batch) is None
    others = {name: names for name, names in planned(model).items() if name != "blocks.0.up"}
    with torch.no_grad():
        assert find_chain(model, others, batch) is not None


class Named(Block):
    """A block that calls an argument as a stand-in might call its own."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        return super().forward(x)


class PassesNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Named(12), Named(12)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, state=None)
        return x


def test_the_names_of_arguments_are_the_blocks_own() -> None:
    chain = chain_of(PassesNames(), sequences(1)[0])
    assert chain is not None
    assert chain.names == ("blocks.0", "blocks.1")


# What passes through


@torch.no_grad()
@pytest.mark.parametrize("returns_tuple", [False, True])
def test_blocks_called_one_by_one_give_what_the_network_gives(returns_tuple: bool) -> None:
    model, xs = Stack(returns_tuple=returns_tuple).eval(), sequences(2)
    batches = [{"x": xs[0], "attention_mask": padding()}, (xs[1],)]
    assert_relayed(model, batches, lambda output: output)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForSequenceClassification", "ViTForImageClassification"]
)
def test_blocks_of_transformers_called_one_by_one(name: str) -> None:
    model = transformer(name)
    assert_relayed(model, [transformer_batch(model, seed) for seed in range(2)], lambda output: output.logits)


def assert_relayed(model: nn.Module, batches: list[Any], tensor: Callable[[Any], Tensor]) -> None:
    """That entering, the blocks on what they are called with, and a relay of the last state make up the network."""
    modules = dict(model.named_modules())
    expected = [tensor(model(**b) if isinstance(b, dict) else model(*b)) for b in batches]
    chain = chain_of(model, batches[0])
    assert chain is not None
    states, extras = chain.enter(model, batches)
    for name, extra in zip(chain.names, extras, strict=True):
        block = model.get_submodule(name)
        states = [tensor_of(extra[i].call(block, state)) for i, state in enumerate(states)]
    relay = Relay(model, chain, batches)
    with relay.hung():
        outputs = [tensor(relay.call(model, state, i)) for i, state in enumerate(states)]
        assert not any(type(m) is type(modules[chain.names[0]]) for m in model.modules())
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted)
    assert dict(model.named_modules()) == modules


@torch.no_grad()
def test_a_network_that_fails_gets_its_blocks_back() -> None:
    model = Stack().eval()
    chain = chain_of(model, sequences(1)[0])
    assert chain is not None
    blocks = list(model.blocks)
    with pytest.raises(RuntimeError):
        chain.enter(model, [torch.randn(2, 3, 13)])
    assert all(a is b for a, b in zip(model.blocks, blocks, strict=True))


@torch.no_grad()
def test_stand_ins_answer_for_their_blocks() -> None:
    class Asks(Stack):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            assert [block.kind for block in self.blocks] == ["a", "b", "c"]
            return super().forward(x, attention_mask)

    model = Asks().eval()
    for block, kind in zip(model.blocks, "abc", strict=True):
        block.kind = kind
    assert_relayed(model, sequences_as_tuples(2), lambda output: output)
    relay = Relay(model, Chain(("blocks.0", "blocks.1", "blocks.2"), False, ()), sequences_as_tuples(1))
    with relay.hung(), pytest.raises(AttributeError, match="missing"):
        model.blocks[0].missing  # noqa: B018


def sequences_as_tuples(count: int) -> list[tuple[Tensor]]:
    return [(x,) for x in sequences(count)]


class InPlace(nn.Module):
    """A block that adds to the very tensor that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        x += self.down(self.up(self.norm(x)).relu())
        return x


@torch.no_grad()
def test_a_block_that_changes_its_input_does_not_change_the_state_at_hand() -> None:
    model = nn.Sequential(nn.Sequential(InPlace(), InPlace()), nn.ReLU(inplace=True)).eval()
    x = sequences(1)[0]
    chain = chain_of(model, x.clone())
    assert chain is not None
    states, extras = chain.enter(model, [x.clone()])
    before = states[0].clone()
    first = extras[0][0].call(model[0][0], states[0])
    assert torch.equal(states[0], before)
    relay = Relay(model, chain, [x.clone()])
    state = first.clone()
    with relay.hung():
        relay.call(model, state, 0)
    assert torch.equal(state, first)


# The tensor that matters


X = torch.ones(2)


@pytest.mark.parametrize(
    "output",
    [X, (X, None), [X, 3], {"logits": X}, {"loss": torch.zeros(()), "last_hidden_state": X}, SimpleNamespace(sample=X)],
    ids=["tensor", "tuple", "list", "logits", "mapping", "object"],
)
def test_the_tensor_of_an_output(output: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ADAPTERS, "a framework", Adapter(outputs=("last_hidden_state", "sample")))
    assert tensor_of(output) is X


def test_the_tensor_of_an_output_under_one_name() -> None:
    assert tensor_of({"logits": X, "other": torch.zeros(2)}, ["logits"]) is X
    with pytest.raises(
        TypeError, match="expected a tensor, or a tuple or object that holds one, from a block, got dict"
    ):
        tensor_of({"logits": X}, ["sample"])


@pytest.mark.parametrize("output", [None, (), (None, X), {"loss": X}, 3])
def test_an_output_without_a_tensor_is_refused(output: Any) -> None:
    message = "expected a tensor, or a tuple or object that holds one, from a block, got " + type(output).__name__
    with pytest.raises(TypeError, match=re.escape(message)):
        tensor_of(output)
