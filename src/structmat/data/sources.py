"""Where data comes from: files, a folder or the Hub, and which part of it."""

from __future__ import annotations

import difflib
import glob
import importlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMPRESSIONS = (".xz", ".gz")
PLAIN = (".txt", ".md")
"""The endings of the names of text files."""

TABLES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""The reader of each kind of table, by the ending of the file's name."""


@dataclass(frozen=True)
class HubSet:
    """A well-known data set on the Hub that has a short name.

    Attributes:
        name: The name on the Hub.
        configuration: The configuration; None where files are named.
        files: The file of each split, where the whole data set is too large to fetch.
        measured: The split on which figures are reported; ``"train"`` is the one to calibrate and train on.
        joint: The text between the rows, where they are lines of one text; None where they are documents.
    """

    name: str
    configuration: str | None
    files: dict[str, str] | None
    measured: str
    joint: str | None


HUB_SETS = {
    "wikitext2": HubSet("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test", "\n\n"),
    "c4": HubSet(
        "allenai/c4",
        None,
        {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
        "validation",
        None,
    ),
}
"""The data sets with short names."""


@dataclass(frozen=True)
class Source:
    """A data source as the user spells it: a path, a pattern, or a name on the Hub, and ``[start:stop]`` behind it.

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
            FileNotFoundError: If the name can only be a path, and there is nothing.
        """
        sliced = source.endswith("]") and not Path(source).exists()
        name, _, inside = source.partition("[") if sliced else (source, "", ":]")
        found = re.fullmatch(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*\]", inside)
        if found is None:
            raise ValueError(f"expected a slice such as [:1500] or [-300:] after the source, got {source!r}")
        if not name:
            raise ValueError(f"expected {KINDS}, got {source!r}")
        start, stop = (None if text is None else int(text) for text in found.groups())
        parsed = cls(os.path.expanduser(name), slice(start, stop))
        parsed._check_path()
        return parsed

    @property
    def spelled(self) -> str:
        """The source as a user spells it, with an absolute path where it is one."""
        start, stop = ("" if end is None else end for end in (self.part.start, self.part.stop))
        name = os.path.abspath(self.name) if self.files or Path(self.name).exists() else self.name
        return name if self.part == slice(None) else f"{name}[{start}:{stop}]"

    def _check_path(self) -> None:
        """Refuse a path that leads nowhere, so that the Hub is never asked for it."""
        if self.name in HUB_SETS or Path(self.name).exists() or self.files or not is_path(self.name):
            return
        near = neighbour(self.name)
        hint = "" if near is None else f"; did you mean {near!r}?"
        raise FileNotFoundError(f"expected {KINDS}, got {self.name!r}, and there is no such file or folder here{hint}")

    @property
    def files(self) -> list[Path]:
        """The files that a path or a pattern means, sorted: one, those of a folder, or those that match."""
        path = Path(self.name)
        if path.is_file():
            return [path]
        if path.is_dir():
            found = path.rglob("*")
        else:
            found = map(Path, glob.glob(self.name, recursive=True)) if has_pattern(self.name) else ()
        return sorted(file for file in found if file.is_file())

    @property
    def texts(self) -> list[Path]:
        """The text files among the files; none where they are a table, or tables are among them."""
        kinds = {file: ending(file) for file in self.files if not file.name.startswith(".")}
        tables = any(kind in TABLES or kind == ".arrow" for kind in kinds.values())
        return [] if tables else [file for file, kind in kinds.items() if kind in PLAIN]

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
        if self.name in HUB_SETS and not Path(self.name).exists():
            split = split or "train"
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
        if path.is_file() or has_pattern(self.name):
            kind = _kind_of_table(self.files, self.name)
            options: dict[str, Any] = {"sep": "\t"} if kind == ".tsv" else {}
            return datasets.load_dataset(TABLES[kind], data_files=[str(file) for file in self.files], **options)
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(path))
        try:
            return _fetched(datasets, self.name)
        except (OSError, datasets.exceptions.DatasetsError) as error:
            raise FileNotFoundError(f"expected {KINDS}, got {self.name!r}: {error}") from error


KINDS = "a file, a folder, a pattern such as 'texts/*.txt', or the name of a data set on the Hub"
"""What a source may be, for messages."""


def _fetched(datasets: Any, name: str) -> Any:
    """A folder that ``datasets`` reads, or a data set of the Hub, in its splits."""
    known = None if Path(name).exists() else HUB_SETS.get(name)
    if known is not None:
        return datasets.load_dataset(known.name, known.configuration, data_files=known.files)
    name, _, configuration = name.partition(":")
    return datasets.load_dataset(name, configuration or None)


def ending(file: Path) -> str:
    """The ending of a file's name in small letters, where the ending of a compression does not count."""
    return Path(file.stem if file.suffix.lower() in COMPRESSIONS else file.name).suffix.lower()


def has_pattern(name: str) -> bool:
    """Whether a name is a pattern of paths."""
    return any(sign in name for sign in "*?") and not Path(name).exists()


def is_path(name: str) -> bool:
    """Whether a name that leads nowhere can only have been meant as a path, and not as a name on the Hub.

    Args:
        name: The name, which is none of an existing file or folder.

    Returns:
        True where it looks like a path, its folder is there, or something here has nearly the same name.
    """
    path = Path(name)
    return (
        path.is_absolute()
        or has_pattern(name)
        or name.startswith((".", "~"))
        or name.endswith((os.sep, "/"))
        or len(path.parts) > 2
        or path.suffix.lower() in (*PLAIN, *TABLES, *COMPRESSIONS)
        or (len(path.parts) == 2 and path.parent.is_dir())
        or neighbour(name) is not None
    )


def neighbour(name: str) -> str | None:
    """The path in the same folder whose name is nearly that of a path that leads nowhere; None where there is none."""
    path = Path(name)
    if not path.parent.is_dir():
        return None
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 1, 0.8)
    return str(path.with_name(close[0])) if close else None


def _kind_of_table(files: Sequence[Path], name: str) -> str:
    """The ending of tables, which must all be of one kind."""
    kinds = sorted({ending(file) for file in files})
    if len(kinds) != 1 or kinds[0] not in TABLES:
        raise ValueError(
            f"expected a file ending in {', '.join((*PLAIN, *TABLES))} (or that and {' or '.join(COMPRESSIONS)}), or "
            f"files of one such kind, got {name!r}"
        )
    return kinds[0]


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
