"""Texts from files, folders and the Hub."""

from __future__ import annotations

import gzip
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from structmat.data.chats import chat_columns, chat_text, instruction_chat, instruction_columns
from structmat.data.sources import HUB_SETS, Source, choose_column, ending

ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<eos>", "</s>")
"""Tokens that stand between the documents of a text file, unless the caller says otherwise."""

TEXT_COLUMNS = ("text", "content", "sentence", "document", "story")

OPENERS: dict[str, Callable[[Path], bytes]] = {
    ".xz": lambda path: lzma.decompress(path.read_bytes()),
    ".gz": lambda path: gzip.decompress(path.read_bytes()),
}
"""How a file is read, by the last ending of its name."""


def read_texts(
    source: str,
    *,
    split: str | None = None,
    separator: str | None = None,
    column: str | None = None,
    tokenizer: Any = None,
) -> list[str]:
    """Read documents.

    Args:
        source: One of

            - a text file, ``.txt`` or ``.md``, in UTF-8;
            - a table, ``.json``, ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet``, of texts, of chats (lists of
              messages), or of instructions with answers;
            - a pattern of such files, such as ``texts/*.txt``, or a folder of text files, each of which is a document;
            - a folder that ``datasets`` can load;
            - the name of a data set on the Hub, with its configuration behind a colon if it has several, such as
              ``Salesforce/wikitext:wikitext-2-raw-v1``, or ``wikitext2`` or ``c4``.

            ``.xz`` or ``.gz`` may follow the name of a file. All but text files are read with the package ``datasets``.
            A slice behind the source, as in ``stories.txt.xz[:1500]`` or ``stories.txt.xz[-300:]``, picks documents.
        split: The split of a folder or Hub data set with several, such as ``"train"``.
        separator: The text between the documents of a text file. None for one of ``ENDS_OF_TEXT``. A file without any
            is one document; a slice then counts what blank lines separate in it, or its lines.
        column: The column of a table; None for one with a usual name such as ``"text"`` or ``"messages"``, those of an
            instruction and its answer, or the only one that holds strings.
        tokenizer: The tokenizer whose chat template makes texts of chats and instructions; None to join their parts
            with blank lines.

    Returns:
        The documents, without the white space around them. Empty ones are left out; in a text file, they do not count
        in the slice.

    Raises:
        ValueError: If there is no document, or an option does not go with the source.
    """
    parsed = Source.parse(source)
    files = parsed.texts
    if files:
        if split is not None or column is not None:
            raise ValueError(f"expected no split or column for the text file {parsed.name!r}, got {split or column!r}")
        one = len(files) == 1 and Path(parsed.name).is_file()
        texts = _of_file(files[0], separator, parsed.part) if one else _of_files(files, separator)[parsed.part]
    else:
        if separator is not None:
            raise ValueError(f"expected a separator only for a text file, got {separator!r} for {parsed.name!r}")
        texts = _of_table(parsed, split, column, tokenizer)
    if not texts:
        raise ValueError(f"expected at least one document in {source!r}, got none")
    return texts


def _of_table(source: Source, split: str | None, column: str | None, tokenizer: Any) -> list[str]:
    """The documents in a table: chats, texts, or instructions with answers."""
    table = source.table(split)
    strings = [name for name, feature in table.features.items() if getattr(feature, "dtype", None) in STRINGS]
    chats = chat_columns(table[0])
    instructions = instruction_columns(strings)
    if chats and column in (None, *chats):
        texts = [chat_text(chat or [], tokenizer) for chat in table[column or chats[0]]]
    elif column is None and instructions is not None and not set(strings) & set(TEXT_COLUMNS):
        texts = [chat_text(instruction_chat(row, instructions), tokenizer) for row in table]
    else:
        chosen = choose_column(strings, column, TEXT_COLUMNS, f"text of {source.name!r}")
        texts = [text or "" for text in table[chosen]]
    texts = [text.strip() for text in texts if text.strip()]
    joint = HUB_SETS[source.name].joint if source.name in HUB_SETS else None
    return texts if joint is None or not texts else [joint.join(texts)]


STRINGS = ("string", "large_string")


def _read_file(path: Path) -> str:
    kind = path.suffix.lower()
    content = OPENERS[kind](path) if kind in OPENERS else path.read_bytes()
    return content.decode("utf-8-sig")


def _of_files(files: list[Path], separator: str | None) -> list[str]:
    """The documents of several text files: one of each, unless it has separators."""
    return [text for file in files for text in _of_file(file, separator, slice(None))]


def _of_file(file: Path, separator: str | None, part: slice) -> list[str]:
    """The documents of a text file that a slice picks."""
    text = _read_file(file)
    pattern = "|".join(map(re.escape, ENDS_OF_TEXT if separator is None else (separator,)))
    documents = _pieces(text, pattern)
    if separator is not None or len(documents) > 1 or part == slice(None) or ending(file) == ".md":
        return documents[part]
    for pattern, joint in ((r"\n\s*\n", "\n\n"), (r"\n", "\n")):  # pieces of what may well be one text
        pieces = _pieces(text, pattern)
        if len(pieces) > 1:
            return [joint.join(pieces[part])] if pieces[part] else []
    return documents[part]


def _pieces(text: str, pattern: str) -> list[str]:
    return [piece.strip() for piece in re.split(pattern, text) if piece.strip()]
