"""From texts to rows and batches of tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from structmat import _checks

Tokenizer = Any
"""A tokenizer of transformers, or anything else that is called like one and has the same ids of special tokens."""


def token_rows(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    length: int,
    packed: bool = False,
    most: int | None = None,
    tokens: int | None = None,
) -> list[list[int]]:
    """Tokenize documents into rows, in which all of their tokens are.

    A BOS token is put in front of each document, and of each row of it, where the tokenizer has one and does not add it
    itself.

    Args:
        tokenizer: A tokenizer of transformers.
        texts: The documents.
        length: The most tokens of a row.
        packed: False for rows of one document each, so that no token attends to another document; a document that is
            longer than a row becomes several, of nearly equal length. True for rows of exactly ``length`` tokens, cut
            from all documents one after the other with an EOS token behind each; a last row that is not full is
            dropped.
        most: The most rows, after which no further document is tokenized; None for all.
        tokens: The number of tokens with which there are enough rows; None for all.

    Returns:
        The ids of each row.

    Raises:
        ValueError: If ``length`` is no positive integer, there is no document, the tokenizer has no EOS token to pack
            with, or the texts do not fill one row.
        TypeError: If ``texts`` is one text.
    """
    if isinstance(texts, str):
        raise TypeError("expected several texts, got one; put it into a list")
    _checks.positive_int(length, "length")
    if packed and getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError("expected a tokenizer with an EOS token, which separates packed documents; pass packed=False")
    documents = (encode(tokenizer, text) for text in texts)
    first = next(documents, None)
    if first is None:
        raise ValueError("expected at least one document, got none")
    documents = itertools.chain([first], documents)
    if packed:
        enough = None if tokens is None else math.ceil(tokens / length)
        limits = [limit for limit in (most, enough) if limit is not None]
        return _packed_rows(tokenizer, documents, length, min(limits, default=None))
    bos = getattr(tokenizer, "bos_token_id", None)
    rows = itertools.islice((row for ids in documents for row in _rows_of(ids, length, bos)), most)
    return list(rows if tokens is None else _until(rows, tokens))


def _until(rows: Iterable[list[int]], tokens: int) -> Iterator[list[int]]:
    """The first rows, as many as it takes to have a number of tokens."""
    found = 0
    for row in rows:
        yield row
        found += len(row)
        if found >= tokens:
            return


def _rows_of(ids: list[int], length: int, bos: int | None) -> Iterator[list[int]]:
    """Cut a document into rows of nearly equal length, each with a BOS token in front where there is one."""
    begin = [bos] if bos is not None and length > 1 else []
    body = ids[len(begin) :]
    count = max(1, math.ceil(len(body) / (length - len(begin))))
    for k in range(count):
        yield [*begin, *body[k * len(body) // count : (k + 1) * len(body) // count]]


def _packed_rows(
    tokenizer: Tokenizer, documents: Iterable[list[int]], length: int, most: int | None
) -> list[list[int]]:
    """Full rows, cut from all documents one after the other with an EOS token behind each."""
    bos, eos = getattr(tokenizer, "bos_token_id", None), tokenizer.eos_token_id
    stream: list[int] = []
    for ids in documents:
        stream += ids
        if bos != eos and ids[-1:] != [eos]:
            stream.append(eos)
        if most is not None and len(stream) >= most * length:
            break
    rows = [stream[k : k + length] for k in range(0, len(stream) - length + 1, length)][:most]
    if not rows:
        raise ValueError(f"expected texts that fill a row of {length} tokens, got {len(stream)}; shorten the rows")
    return rows


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a document, with one BOS token in front where the tokenizer has one."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return ids
    if ids[:2] == [bos, bos]:  # a chat template writes it, and the tokenizer adds it
        return ids[1:]
    return ids if ids[:1] == [bos] else [bos, *ids]


def token_batches(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    length: int,
    batch_size: int,
    packed: bool = False,
    most: int | None = None,
) -> list[dict[str, Tensor]]:
    """Tokenize documents into batches, for calibration and evaluation.

    Args:
        tokenizer: A tokenizer of transformers.
        texts: The documents.
        length: The most tokens of a row.
        batch_size: The number of rows of a batch; the last batch may have fewer.
        packed: Whether rows are cut from all documents one after the other, as in ``token_rows``.
        most: The most rows; None for all.

    Returns:
        Batches ``{"input_ids": (rows, T), "attention_mask": (rows, T)}``, padded on the right to their longest row.

    Raises:
        ValueError: If ``batch_size`` is no positive integer, or ``token_rows`` refuses the texts.
    """
    _checks.positive_int(batch_size, "batch_size")
    return row_batches(tokenizer, token_rows(tokenizer, texts, length=length, packed=packed, most=most), batch_size)


class TokenRows(list[list[int]], Dataset[list[int]]):
    """Rows of ids as a data set, for training."""

    @property
    def size(self) -> str:
        """How much data that is, as text."""
        return f"{len(self):,} rows, {sum(map(len, self)):,} tokens"


def row_batches(tokenizer: Tokenizer, rows: Sequence[Sequence[int]], batch_size: int) -> list[dict[str, Tensor]]:
    """Put rows of ids into batches, as ``token_batches`` returns them."""
    padding = padding_id(tokenizer)
    return [pad(rows[k : k + batch_size], padding) for k in range(0, len(rows), batch_size)]


def padding_id(tokenizer: Tokenizer) -> int:
    """The tokenizer's padding token, else its EOS token, else 0: a masked position may hold any."""
    candidates = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return next((found for found in candidates if found is not None), 0)


def pad(rows: Sequence[Sequence[int]], padding: int) -> dict[str, Tensor]:
    """Fill up rows of ids on the right: ``{"input_ids": (rows, T), "attention_mask": (rows, T)}``."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], dtype=torch.long)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def language_collator(tokenizer: Tokenizer) -> Callable[[Sequence[Sequence[int]]], dict[str, Tensor]]:
    """Make a collator for training: it turns rows of ids into a padded batch with ``labels``, -100 on the padding."""
    # DataCollatorForLanguageModeling gives rows of ids no mask, needs a padding token, and where that is the EOS token
    # too, nothing is learned from any EOS token
    padding = padding_id(tokenizer)

    def collate(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        batch = pad(rows, padding)
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    return collate
