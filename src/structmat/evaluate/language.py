"""Perplexity of a causal language model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat._progress import progress_bar
from structmat.data.tokens import pad, padding_id
from structmat.network.calls import device_of, evaluating, tensor_of


@dataclass(frozen=True)
class Perplexity:
    """How well a language model predicts texts.

    Attributes:
        nll: The negative log-likelihood of all scored tokens together, in nats.
        tokens: The number of tokens that were scored.
        words: The number of words, as white space separates them, in the scored texts.
        bytes: The number of bytes of UTF-8 in the scored texts.
        documents: The number of texts.
        how: A description of how the texts were scored.
    """

    nll: float
    tokens: int
    words: int
    bytes: int
    documents: int
    how: str

    @property
    def token(self) -> float:
        """The perplexity per token, which compares models of one tokenizer only."""
        return _exp(self.nll / self.tokens)

    @property
    def word(self) -> float:
        """The perplexity per word: that of the whole text, spread over its words, whatever the tokenizer."""
        return _exp(self.nll / self.words) if self.words else math.nan

    @property
    def bits_per_byte(self) -> float:
        """The number of bits that the model needs for a byte of text."""
        return self.nll / math.log(2) / self.bytes if self.bytes else math.nan

    def __str__(self) -> str:
        return (
            f"perplexity {self.token:.3f} per token, {self.word:.2f} per word, {self.bits_per_byte:.4f} bits per byte "
            f"({self.tokens:,} tokens, {self.words:,} words, {self.documents:,} documents; {self.how})"
        )


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf


def perplexity(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    length: int,
    stride: int | None = None,
    batch_size: int = 8,
    truncate: bool = False,
    max_tokens: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Score texts with a causal language model.

    Every document is scored by itself, with the tokenizer's BOS token in front (its EOS token where it has none), which
    gives the first token a context and is not scored itself. A document longer than ``length`` is read in windows that
    advance by ``stride``, so that every token is scored exactly once, with at least ``length - stride`` tokens of
    context where they exist; the positions of a window are counted from its own start.

    Args:
        model: A network that is called as ``model(input_ids=…, attention_mask=…)`` and returns logits, or an object
            that has them.
        tokenizer: A tokenizer of ``transformers``.
        texts: The documents.
        length: The number of tokens that the model sees at once, including the BOS token.
        stride: The number of tokens by which a window advances, below ``length``; None for windows that do not overlap
            but for one token, which is the context of the first token that a window scores: ``length - 1``.
        batch_size: The number of windows that are scored together.
        truncate: Whether only the first ``length`` tokens of each document are scored, including the BOS token.
        max_tokens: The number of tokens after which the rest of the texts is left out; None to score all of them.
        progress: Whether to show a progress bar.

    Returns:
        The figures, which say how they were found.

    Raises:
        ValueError: If a number is out of range, the tokenizer has neither a BOS nor an EOS token, there is nothing to
            score, or the loss is not finite.
        TypeError: If ``texts`` is one text.
    """
    if isinstance(texts, str):
        raise TypeError("expected a list of texts, got one text; put it into a list")
    _checks.positive_int(batch_size, "batch_size")
    stride = _checked_stride(model, length, stride)
    most = math.inf if max_tokens is None else _checks.positive_int(max_tokens, "max_tokens")
    documents, seen = _tokenized(tokenizer, texts, length if truncate else math.inf, most)
    windows = [window for ids in documents for window in _windows(ids, length, stride)]
    if not windows:
        raise ValueError(f"expected texts with at least one token, got {len(seen)} documents without any")
    windows.sort(key=lambda window: -len(window[0]))  # little padding
    nll, padding = 0.0, padding_id(tokenizer)
    with evaluating(model), progress_bar(total=len(windows), desc="perplexity", show=progress) as bar:
        for k in range(0, len(windows), batch_size):
            nll += _nll(model, windows[k : k + batch_size], padding)
            bar.update(len(windows[k : k + batch_size]))
    if not math.isfinite(nll):
        raise ValueError(f"expected a finite loss, got {nll}; the model is broken, or its dtype overflows")
    begin = "BOS" if getattr(tokenizer, "bos_token_id", None) is not None else "EOS"
    how = f"each document cut at {length} tokens" if truncate else f"windows of {length} tokens, advancing by {stride}"
    how += "" if max_tokens is None else f", the first {max_tokens:,} tokens"
    return Perplexity(
        nll,
        sum(len(ids) - scored_from for ids, scored_from in windows),
        sum(len(text.split()) for text in seen),
        sum(len(text.encode()) for text in seen),
        len(seen),
        f"{how}, {begin} in front of each document and not scored",
    )


def _checked_stride(model: nn.Module, length: int, stride: int | None) -> int:
    """The stride, if it and the length are in range."""
    if _checks.positive_int(length, "length") < 2:
        raise ValueError(f"expected a length of at least 2, a token and its context, got {length}")
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if isinstance(positions, int) and length > positions:
        raise ValueError(f"expected a length of at most the model's {positions} positions, got {length}")
    stride = length - 1 if stride is None else _checks.positive_int(stride, "stride")
    if stride >= length:
        raise ValueError(f"expected a stride below the length {length}, so that each token has context, got {stride}")
    return stride


def _tokenized(tokenizer: Any, texts: Sequence[str], longest: float, most: float) -> tuple[list[list[int]], list[str]]:
    """The tokens of documents, behind a first one; and the texts of these tokens.

    Args:
        tokenizer: The tokenizer.
        texts: The documents.
        longest: The number of tokens at which a document is cut, with the first one.
        most: The number of tokens to score, after which no further document is tokenized.

    Returns:
        The tokens of each document, and its text.

    Raises:
        ValueError: If the tokenizer has no token to begin with.
    """
    first = next((i for n in ("bos_token_id", "eos_token_id") if (i := getattr(tokenizer, n, None)) is not None), None)
    if first is None:
        raise ValueError("expected a tokenizer with a BOS or an EOS token to begin documents with; set its bos_token")
    documents: list[list[int]] = []
    seen: list[str] = []
    for text in texts:
        if most <= 0:
            break
        ids = [first, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        end = min(longest, most + 1)
        if len(ids) > end:
            ids = ids[: int(end)]
            text = tokenizer.decode(ids[1:])
        most -= len(ids) - 1
        documents.append(ids)
        seen.append(text)
    return documents, seen


def _windows(ids: list[int], length: int, stride: int) -> Iterator[tuple[list[int], int]]:
    """The windows over a document, each with the first position in it that is scored."""
    scored = 1
    for begin in range(0, len(ids), stride):
        if scored >= len(ids):
            return
        window = ids[begin : begin + length]
        yield window, scored - begin
        scored = begin + len(window)


def _nll(model: nn.Module, windows: Sequence[tuple[list[int], int]], padding: int) -> float:
    """The negative log-likelihood of the scored positions."""
    batch = pad([ids for ids, _ in windows], padding)
    positions = torch.arange(1, batch["input_ids"].shape[1])
    begins = torch.tensor([scored_from for _, scored_from in windows])[:, None]
    return _loss(model, batch, (positions >= begins) & batch["attention_mask"][:, 1:].bool())


def _loss(model: nn.Module, batch: Mapping[str, Tensor], scored: Tensor) -> float:
    """The negative log-likelihood of the tokens of a batch behind each first one that ``scored (B, T - 1)`` picks."""
    device = device_of(model)
    logits = tensor_of(model(**{name: tensor.to(device) for name, tensor in batch.items()}), ["logits"])[:, :-1]
    scored = scored.to(logits.device)
    targets = batch["input_ids"][:, 1:].to(logits.device)[scored]
    return nn.functional.cross_entropy(logits[scored].float(), targets, reduction="none").double().sum().item()


def row_loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> tuple[float, int]:
    """Score batches of rows of tokens, each row from its second token on and by itself.

    Args:
        model: A causal language model.
        batches: Batches ``{"input_ids": (B, T), "attention_mask": (B, T)}``, padded on the right.

    Returns:
        The negative log-likelihood of all scored tokens together, in nats, and their number.
    """
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch in batches:
            for k in range(len(batch["input_ids"])):  # one at a time: logits of large vocabularies are large
                length = int(batch["attention_mask"][k].sum())
                row = {name: tensor[k : k + 1, :length] for name, tensor in batch.items()}
                total += _loss(model, row, torch.ones(1, max(length - 1, 0), dtype=torch.bool))
                tokens += max(length - 1, 0)
    return total, tokens
