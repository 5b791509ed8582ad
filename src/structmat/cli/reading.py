"""How texts are read: the options that every command with data has, and what is said of the data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer

from structmat.cli.options import DATA, Options
from structmat.data import read_texts
from structmat.data.sources import HUB_SETS, Source

LENGTH = 512
"""The number of tokens in a row where neither the user nor the model says."""

WHAT = (
    "a text file such as stories.txt.xz[:1500], a table (jsonl, csv, parquet), a pattern such as 'texts/*.txt', a "
    "folder, a data set on the Hub, or wikitext2 or c4"
)
"""What a source of data may be, for help texts."""


@dataclass(frozen=True)
class Reading(Options):
    """How texts are taken out of a source.

    Attributes:
        separator: The text between the documents of a text file; None for one that is recognised.
        column: The column of a table; None for one that is recognised.
    """

    separator: Annotated[
        str | None,
        typer.Option(
            help="The text between the documents of a text file, such as '\\n\\n'; by default an end-of-text token, "
            "where the file has one.",
            rich_help_panel=DATA,
        ),
    ] = field(default=None, kw_only=True)
    column: Annotated[
        str | None,
        typer.Option(
            help="The column of a table with the texts or chats; by default one with a usual name.",
            rich_help_panel=DATA,
        ),
    ] = field(default=None, kw_only=True)

    def record(self) -> dict[str, Any]:
        """The options by name; those of reading alone where they are set."""
        own = {one.name for one in dataclasses.fields(Reading)}
        return {name: value for name, value in super().record().items() if name not in own or value is not None}

    def texts(self, source: str, *, split: str | None, tokenizer: Any) -> list[str]:
        """Read documents, as ``read_texts`` does.

        Args:
            source: The source.
            split: The split; None where there is only one.
            tokenizer: The tokenizer whose chat template makes texts of chats.

        Returns:
            The documents.
        """
        separator = self.separator
        if separator is not None:
            separator = separator.replace("\\n", "\n").replace("\\t", "\t")
        return read_texts(source, split=split, separator=separator, column=self.column, tokenizer=tokenizer)


def measured_split(source: str, split: str | None) -> str | None:
    """The split to measure on: the one asked for, or that on which a well-known data set is measured."""
    known = HUB_SETS.get(Source.parse(source).name)
    return known.measured if split is None and known is not None else split


def length_for(config: Any, wanted: int | None, usual: int = LENGTH) -> int:
    """Find the largest number of tokens in a row.

    Args:
        config: The model's configuration.
        wanted: The number that the user wants; None for the usual.
        usual: The number where the user does not say.

    Returns:
        The wanted number, or the usual one, or the number of the model's positions if that is less.

    Raises:
        ValueError: If the user wants more than the model has positions.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if wanted is None:
        return min(usual, positions) if isinstance(positions, int) else usual
    if isinstance(positions, int) and wanted > positions:
        raise ValueError(f"expected --length of at most the model's {positions} positions, got {wanted}")
    return wanted
