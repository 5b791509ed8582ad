"""Where data comes from: a file, a folder or the Hub, and which part of it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPRESSIONS = (".xz", ".gz")
TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""The reader of each kind of table, by the ending of the file's name."""


@dataclass(frozen=True)
class Source:
    """A data source as the user spells it: ``PATH``, ``HUB/NAME`` or ``HUB/NAME:CONFIGURATION``, and ``[start:stop]``.

    Attributes:
        name: The source without the slice.
        part: The slice of its entries.
    """

    name: str
    part: slice

    @classmethod
    def parse(cls, source: str) -> Source:
        """Read the spelling.

        Args:
            source: The source, as the user spells it.

        Returns:
            The source.

        Raises:
            ValueError: If the brackets hold no slice, or there is no name.
        """
        sliced = source.endswith("]") and not Path(source).exists()
        name, _, inside = source.partition("[") if sliced else (source, "", ":]")
        found = re.fullmatch(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*\]", inside)
        if found is None:
            raise ValueError(f"expected a slice such as [:1500] or [-300:] after the source, got {source!r}")
        if not name:
            raise ValueError(f"expected a file, a folder or the name of a data set on the Hub, got {source!r}")
        start, stop = (None if text is None else int(text) for text in found.groups())
        return cls(name, slice(start, stop))

    @property
    def ending(self) -> str:
        """The ending of the name in small letters, where the ending of a compression does not count."""
        path = Path(self.name)
        return Path(path.stem if path.suffix.lower() in COMPRESSIONS else path.name).suffix.lower()

    def table(self, split: str | None) -> Any:
        """The entries as a data set of the ``datasets`` library.

        Args:
            split: The split; None where there is only one.

        Returns:
            A ``datasets.Dataset``.

        Raises:
            ImportError: If ``datasets`` is not installed.
            ValueError: If the file is of an unknown kind, the split is not there or not given, or the slice is empty.
            FileNotFoundError: If there is no such file, folder or data set, or the Hub is out of reach.
        """
        loaded = self._loaded()
        chosen = _choose_split(loaded, split, self.name) if isinstance(loaded, dict) else loaded
        picked = range(len(chosen))[self.part]  # `datasets` slices neither text files nor what was saved to disk
        if not picked:
            raise ValueError(f"expected at least one of the {len(chosen)} entries of {self.name!r}, got none")
        return chosen.select(picked)

    def _loaded(self) -> Any:
        """The whole data set, or a dictionary of its splits."""
        try:
            datasets = importlib.import_module("datasets")
        except ImportError as error:
            raise ImportError(
                f"reading {self.name!r} needs the package datasets; pip install 'structmat[train]'"
            ) from error
        path = Path(self.name)
        if path.is_file():
            if self.ending not in TABLES:
                raise ValueError(
                    f"expected a file ending in .txt, {', '.join(TABLES)} (or that and {' or '.join(COMPRESSIONS)}), "
                    f"got {self.name!r}"
                )
            options: dict[str, Any] = {"sep": "\t"} if self.ending == ".tsv" else {}
            return datasets.load_dataset(TABLES[self.ending], data_files=str(path), **options)
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(path))
        name, _, configuration = self.name.partition(":")
        try:
            return datasets.load_dataset(name, configuration or None)
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise FileNotFoundError(
                f"expected a file, a folder or the name of a data set on the Hub, got {self.name!r}: {error}"
            ) from error


def _choose_split(splits: dict[str, Any], split: str | None, name: str) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        raise ValueError(f"expected split to be one of {', '.join(map(repr, splits))} of {name!r}, got {split!r}")
    return splits[split]


def choose_column(columns: Sequence[str], wanted: str | None, usual: Sequence[str], what: str) -> str:
    """Choose the column to read: the one asked for, one with a usual name, or the only one.

    Args:
        columns: The columns that could be meant.
        wanted: The name that the caller gave; None for no name.
        usual: The usual names, in the order in which they are tried.
        what: The contents of the column, for the message.

    Returns:
        The name of the column.

    Raises:
        ValueError: If the column is not there, or several could be meant.
    """
    candidates = [wanted] if wanted is not None else [*usual, *(columns if len(columns) == 1 else ())]
    found = next((name for name in candidates if name in columns), None)
    if found is None:
        raise ValueError(
            f"expected the column of the {what} to be one of {', '.join(map(repr, columns)) or 'none'}, got {wanted!r}"
        )
    return found
