"""Evaluation: every token is scored once, answers are counted, and operations are those of the dense network."""

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from structmat import (
    Blast,
    BlockDiagonal,
    BlockSparse,
    Format,
    LowRank,
    Monarch,
    StructuredLinear,
    apply_plan_,
    densify_,
)
from structmat.evaluate import Accuracy, Flops, Perplexity, accuracy, perplexity, relative_flops
from structmat.formats import flat_butterfly

VOCABULARY = 40


class Words:
    """A tokenizer: the words are numbers, the tokens too; 1 begins a document."""

    def __init__(self, bos: int | None = 1, eos: int | None = 2) -> None:
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Causal(nn.Module):
    """A language model whose answer depends on the last three tokens, and whose loss is known."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)
        self.calls: list[list[list[int]]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        rows = zip(input_ids.tolist(), attention_mask.tolist(), strict=True)
        self.calls.append([[i for i, kept in zip(ids, mask, strict=True) if kept] for ids, mask in rows])
        assert not self.training
        embedded = self.table(input_ids)
        shifted = [nn.functional.pad(embedded, (0, 0, k, 0))[:, : embedded.shape[1]] for k in range(3)]
        return SimpleNamespace(logits=shifted[0] + 0.5 * shifted[1] + 0.25 * shifted[2])


def document(length: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(str(int(i)) for i in torch.randint(3, VOCABULARY, (length,), generator=generator))


TEXTS = [document(length, seed) for seed, length in enumerate((17, 1, 30, 5))]


def reference(model: Causal, texts: list[str], begin: int = 1) -> float:
    """The loss of whole documents, one by one."""
    total = 0.0
    for text in texts:
        ids = torch.tensor([[begin, *map(int, text.split())]])
        logits = model(ids, torch.ones_like(ids)).logits
        total += nn.functional.cross_entropy(logits[0, :-1].double(), ids[0, 1:], reduction="sum").item()
    return total


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize(("length", "stride"), [(64, None), (31, 30), (8, 5), (8, 1), (6, 3)])
def test_every_token_is_scored_once(length: int, stride: int | None, batch_size: int) -> None:
    # a context of three tokens is enough for this model, so that windows change nothing
    model = Causal().eval()
    found = perplexity(model, Words(), TEXTS, length=length, stride=stride, batch_size=batch_size, progress=False)
    assert found.nll == pytest.approx(reference(model, TEXTS), rel=1e-6)
    assert (found.tokens, found.words, found.documents) == (53, 53, 4)
    assert found.bytes == sum(map(len, TEXTS))


def test_context_of_the_windows() -> None:
    model = Causal()
    perplexity(model, Words(), [document(10, 0)], length=6, stride=2, batch_size=1, progress=False)
    ids = [1, *map(int, document(10, 0).split())]
    assert [call[0] for call in model.calls] == [ids[0:6], ids[2:8], ids[4:10], ids[6:11]]
    assert model.training


def test_documents_that_are_cut() -> None:
    model = Causal().eval()
    found = perplexity(model, Words(), TEXTS, length=6, truncate=True, progress=False)
    cut = [" ".join(text.split()[:5]) for text in TEXTS]
    assert found.nll == pytest.approx(reference(model, cut), rel=1e-6)
    assert (found.tokens, found.words, found.bytes) == (16, 16, sum(map(len, cut)))
    assert "each document cut at 6 tokens" in str(found)


@pytest.mark.parametrize("most", [1, 17, 20, 53, 99])
def test_the_first_tokens_alone(most: int) -> None:
    model = Causal().eval()
    found = perplexity(model, Words(), TEXTS, length=6, stride=2, max_tokens=most, progress=False)
    words = [text.split() for text in TEXTS]
    starts = [sum(map(len, words[:k])) for k in range(len(words))]
    kept = [" ".join(own[: max(0, most - start)]) for own, start in zip(words, starts, strict=True)]
    kept = [text for text in kept if text]
    assert found.nll == pytest.approx(reference(model, kept), rel=1e-6)
    assert (found.tokens, found.words, found.documents) == (min(most, 53), min(most, 53), len(kept))
    assert f"windows of 6 tokens, advancing by 2, the first {most} tokens" in found.how


def test_windows_do_not_overlap_unless_that_is_asked_for() -> None:
    model = Causal()
    perplexity(model, Words(), [document(10, 0)], length=6, batch_size=1, progress=False)
    ids = [1, *map(int, document(10, 0).split())]
    assert [call[0] for call in model.calls] == [ids[0:6], ids[5:11]]


def test_figures_and_their_text() -> None:
    found = Perplexity(20 * math.log(2), 10, 5, 40, 2, "somehow")
    assert (found.token, found.word, found.bits_per_byte) == (pytest.approx(4), pytest.approx(16), pytest.approx(0.5))
    assert str(found) == (
        "perplexity 4.000 per token, 16.00 per word, 0.5000 bits per byte (10 tokens, 5 words, 2 documents; somehow)"
    )
    assert Perplexity(1e6, 1, 1, 1, 1, "").word == math.inf
    nothing = Perplexity(1.0, 1, 0, 0, 1, "")
    assert math.isnan(nothing.word)
    assert math.isnan(nothing.bits_per_byte)


def test_a_tokenizer_without_bos() -> None:
    model = Causal().eval()
    found = perplexity(model, Words(bos=None), TEXTS, length=64, progress=False)
    assert found.nll == pytest.approx(reference(model, TEXTS, begin=2), rel=1e-6)
    assert "EOS in front of each document and not scored" in found.how


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "expected a length of at least 2, a token and its context, got 1"),
        ({"length": 0}, "expected length to be an integer of at least 1, got 0"),
        ({"length": 8, "stride": 8}, "expected a stride below the length 8, so that each token has context, got 8"),
        ({"length": 8, "stride": 0}, "expected stride to be an integer of at least 1, got 0"),
        ({"length": 8, "max_tokens": 0}, "expected max_tokens to be an integer of at least 1, got 0"),
        ({"length": 8, "batch_size": 0}, "expected batch_size to be an integer of at least 1, got 0"),
        ({"length": 8, "tokenizer": Words(None, None)}, "expected a tokenizer with a BOS or an EOS token"),
        ({"length": 8, "texts": ["", ""]}, "expected texts with at least one token, got 2 documents without any"),
    ],
)
def test_what_cannot_be_scored(options: dict[str, Any], message: str) -> None:
    options = {"tokenizer": Words(), "texts": TEXTS, "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        perplexity(Causal(), **options)


def test_one_text_is_no_list() -> None:
    with pytest.raises(TypeError, match="expected a list of texts, got one text; put it into a list"):
        perplexity(Causal(), Words(), "3 4", length=8)


def test_more_positions_than_the_model_has() -> None:
    model = Causal()
    model.config = SimpleNamespace(max_position_embeddings=8)
    with pytest.raises(ValueError, match="expected a length of at most the model's 8 positions, got 9"):
        perplexity(model, Words(), TEXTS, length=9)
    assert perplexity(model, Words(), TEXTS, length=8, progress=False).tokens == 53


def test_a_broken_model() -> None:
    model = Causal()
    nn.init.constant_(model.table.weight, math.nan)
    with pytest.raises(ValueError, match="expected a finite loss, got nan; the model is broken"):
        perplexity(model, Words(), TEXTS, length=8, progress=False)


# accuracy


class Classifier(nn.Module):
    """Puts inputs into the class of their largest entry; returns what it is told to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, pixels: Tensor, note: str = "") -> Any:
        logits = pixels * self.scale
        return {"tensor": logits, "dict": {"logits": logits}, "object": SimpleNamespace(logits=logits)}[self.kind]


@pytest.mark.parametrize("kind", ["tensor", "dict", "object"])
def test_accuracy(kind: str) -> None:
    x, y = torch.eye(3), torch.tensor([0, 1, 0])
    expected = Accuracy(4, 6)
    model = Classifier(kind)
    assert accuracy(model, [(x, y), [x, y]]) == expected
    assert accuracy(model, iter([{"pixels": x, "labels": y, "note": "n"}] * 2)) == expected
    assert expected.top1 == pytest.approx(2 / 3)
    assert str(expected) == "accuracy 0.6667 (4 of 6)"
    assert model.training


@pytest.mark.parametrize(
    ("batches", "kind", "message"),
    [
        ([], ValueError, "expected at least one example, got none"),
        ([{"pixels": torch.eye(3)}], ValueError, "expected a batch with 'labels', got 'pixels'"),
        ([(torch.eye(3), torch.zeros(2))], ValueError, r"expected logits \(2, classes\), got shape \(3, 3\)"),
        ([torch.eye(3)], TypeError, r"expected a mapping or a pair \(inputs, labels\) as batch, got Tensor"),
    ],
)
def test_what_is_no_batch(batches: list[Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        accuracy(Classifier("tensor"), batches)


# operations


class Network(nn.Module):
    """Linear layers at different numbers of vectors, one of them twice, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        features = self.first(self.conv(x).flatten(2).mT)  # (B, positions, 24)
        return self.second(self.second(features)).mean(1) @ self.second.bias


def counted(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "format",
    [
        LowRank(24, 24, 5),
        Blast(24, 24, 3, 6),
        Monarch(24, 24, 4, 2),
        BlockDiagonal(24, 24, 4),
        BlockSparse(24, 24, flat_butterfly((4, 4), stride=1)),
    ],
    ids=lambda format: format.name,
)
def test_operations_are_those_of_the_dense_network(format: Format) -> None:
    x = torch.randn(2, 4, 5, 5)
    model = apply_plan_(Network(), {"conv": LowRank(8, 36, 3), "second": format})
    found = relative_flops(model, x)
    assert found == Flops(counted(model, x), counted(densify_(copy.deepcopy(model)), x))
    assert found.compressed < found.dense
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training


def test_operations_on_the_meta_device_and_keywords() -> None:
    with torch.device("meta"):
        model, x = apply_plan_(Network(), {"second": LowRank(24, 24, 6)}), torch.randn(2, 4, 5, 5)
    found = relative_flops(model, {"x": x})
    assert found == relative_flops(model, (x,))
    assert found == relative_flops(apply_plan_(Network(), {"second": LowRank(24, 24, 6)}), torch.randn(2, 4, 5, 5))
    assert str(found) == f"{found.compressed:,} FLOPs, {found.relative:.3f} of the dense {found.dense:,}"
    assert math.isnan(relative_flops(nn.ReLU(), x).relative)


def test_an_operator_without_a_formula() -> None:
    class Silent(StructuredLinear):
        def forward(self, x: Tensor) -> Tensor:
            return x[..., : self.format.M] * 2

    with pytest.raises(ValueError, match=r"expected the counter to see the operations of LowRank.*, got none"):
        relative_flops(nn.Sequential(Silent(LowRank(4, 8, 2))), torch.randn(3, 8))
