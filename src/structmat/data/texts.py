"""Texts from files, folders and the Hub."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

from structmat.data.sources import Source, choose_column

END_OF_TEXT = "<|endoftext|>"
"""The text between the documents of a text file, unless the caller says otherwise."""

TEXT_COLUMNS = ("text", "content", "sentence", "document", "story")

OPENERS: dict[str, Callable[[Path], bytes]] = {
    ".xz": lambda path: lzma.decompress(path.read_bytes()),
    ".gz": lambda path: gzip.decompress(path.read_bytes()),
}
"""How a file is read, by the last ending of its name."""


def read_texts(
    source: str, *, split: str | None = None, separator: str | None = None, column: str | None = None
) -> list[str]:
    """Read documents.

    Args:
        source: One of

            - a text file, ``.txt``, ``.txt.xz`` or ``.txt.gz``, in UTF-8;
            - a table, ``.json``, ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet``, which ``.xz`` or ``.gz`` may follow;
            - a folder that ``datasets`` can load;
            - the name of a data set on the Hub, with its configuration behind a colon if it has several, such as
              ``Salesforce/wikitext:wikitext-2-raw-v1``.

            All but the text file are read with the package ``datasets``. A slice behind the source, as in
            ``stories.txt.xz[:1500]`` or ``stories.txt.xz[-300:]``, picks documents.
        split: The split of a folder or Hub data set with several, such as ``"train"``.
        separator: The text between the documents of a text file. None for ``<|endoftext|>``; a file without it is one
            document.
        column: The column of a table; None for one with a usual name such as ``"text"``, or the only one that holds
            strings.

    Returns:
        The documents, without the white space around them. Empty ones are left out; in a text file, they do not count
        in the slice.

    Raises:
        ValueError: If there is no document, or an option does not go with the source.
    """
    parsed = Source.parse(source)
    if Path(parsed.name).is_file() and parsed.ending == ".txt":
        if split is not None or column is not None:
            raise ValueError(f"expected no split or column for the text file {parsed.name!r}, got {split or column!r}")
        texts = _split(_read_file(Path(parsed.name)), separator)[parsed.part]
    else:
        if separator is not None:
            raise ValueError(f"expected a separator only for a text file, got {separator!r} for {parsed.name!r}")
        table = parsed.table(split)
        columns = [name for name, feature in table.features.items() if getattr(feature, "dtype", None) in STRINGS]
        chosen = choose_column(columns, column, TEXT_COLUMNS, f"text of {parsed.name!r}")
        texts = [text.strip() for text in table[chosen] if text and text.strip()]
    if not texts:
        raise ValueError(f"expected at least one document in {source!r}, got none")
    return texts


STRINGS = ("string", "large_string")


def _read_file(path: Path) -> str:
    ending = path.suffix.lower()
    content = OPENERS[ending](path) if ending in OPENERS else path.read_bytes()
    return content.decode("utf-8")


def _split(text: str, separator: str | None) -> list[str]:
    documents = text.split(END_OF_TEXT if separator is None else separator)
    return [document.strip() for document in documents if document.strip()]
