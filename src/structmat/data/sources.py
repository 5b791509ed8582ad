"""Where data comes from: a file, a folder or the Hub, and which part of it."""

from __future__ import annotations

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
        part: Which entries, of the whole.
    """

    name: str
    part: slice

    @classmethod
    def parse(cls, source: str) -> Source:
        """Read the spelling.

        Args:
            source: As above.

        Returns:
            Its parts.

        Raises:
            ValueError: If what stands in brackets is no slice, or there is no name.
        """
        name, bracket, inside = source.partition("[") if source.endswith("]") and not Path(source).exists() else (
            source, "", "",
        )  # fmt: skip
        found = re.fullmatch(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*\]", inside) if bracket else None
        if bracket and found is None:
            raise ValueError(f"expected a slice such as [:1500] or [-300:] after the source, got {source!r}")
        if not name:
            raise ValueError(f"expected a file, a folder or the name of a data set on the Hub, got {source!r}")
        start, stop = (None if text is None else int(text) for text in (found.groups() if found else (None, None)))
        return cls(name, slice(start, stop))

    @property
    def ending(self) -> str:
        """The ending of the name, in small letters and without that of a compression."""
        path = Path(self.name)
        return Path(path.stem if path.suffix.lower() in COMPRESSIONS else path.name).suffix.lower()

    def table(self, split: str | None) -> Any:
        """The entries as a data set of the ``datasets`` library.

        Args:
            split: Which split; None where there is only one.

        Returns:
            A ``datasets.Dataset``.

        Raises:
            ImportError: If ``datasets`` is not installed.
            ValueError: If the file is of an unknown kind, the split is not there or not given, or the slice is empty.
            FileNotFoundError: If neither here nor on the Hub there is such a thing, or the Hub is out of reach.
        """
        try:
            import datasets  # noqa: PLC0415 - an optional dependency
            from datasets.exceptions import DatasetsError  # noqa: PLC0415 - likewise
        except ImportError as error:
            raise ImportError(
                f"reading {self.name!r} needs the package datasets; pip install 'structmat[train]'"
            ) from error
        loaded: Any
        path = Path(self.name)
        if path.is_file():
            if self.ending not in TABLES:
                raise ValueError(
                    f"expected a file ending in .txt, {', '.join(TABLES)} (or that and {' or '.join(COMPRESSIONS)}), "
                    f"got {self.name!r}"
                )
            options: dict[str, Any] = {"sep": "\t"} if self.ending == ".tsv" else {}
            loaded = datasets.load_dataset(TABLES[self.ending], data_files=str(path), **options)
        elif path.is_dir() and (path / "state.json").exists():
            loaded = datasets.Dataset.load_from_disk(str(path))
        elif path.is_dir() and (path / "dataset_dict.json").exists():
            loaded = datasets.DatasetDict.load_from_disk(str(path))
        else:
            name, _, configuration = self.name.partition(":")
            try:
                loaded = datasets.load_dataset(name, configuration or None)
            except (OSError, DatasetsError) as error:
                raise FileNotFoundError(
                    f"expected a file, a folder or the name of a data set on the Hub, got {self.name!r}: {error}"
                ) from error
        chosen = _choose_split(loaded, split, self.name) if isinstance(loaded, dict) else loaded
        indices = list(range(len(chosen))[self.part])
        if not indices:
            raise ValueError(f"expected at least one of the {len(chosen)} entries of {self.name!r}, got none")
        return chosen.select(indices)


def _choose_split(splits: dict[str, Any], split: str | None, name: str) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        raise ValueError(f"expected split to be one of {', '.join(map(repr, splits))} of {name!r}, got {split!r}")
    return splits[split]


def choose_column(columns: Sequence[str], wanted: str | None, usual: Sequence[str], what: str) -> str:
    """The column to read: the one asked for, one with a usual name, or the only one.

    Args:
        columns: Those that could be meant.
        wanted: What the caller says.
        usual: Names in the order in which they are tried.
        what: What it holds, for the message.

    Returns:
        Its name.

    Raises:
        ValueError: If it is not there, or several could be meant.
    """
    candidates = [wanted] if wanted is not None else [*usual, *(columns if len(columns) == 1 else ())]
    found = next((name for name in candidates if name in columns), None)
    if found is None:
        raise ValueError(
            f"expected the column of the {what} to be one of {', '.join(map(repr, columns)) or 'none'}, got {wanted!r}"
        )
    return found
