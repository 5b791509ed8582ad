"""The files of a checkpoint: tensors are read when they are asked for, and written part by part.

The splitting into shards of ``huggingface_hub`` needs the whole state dict at once, which is what streaming avoids.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from structmat._digests import digests
from structmat._files import opened_tensors, write_atomically, write_tensors
from structmat._ranks import current
from structmat.integrations.integrity import read_index

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class CheckpointReader:
    """The tensors of a checkpoint by name.

    Args:
        source: The folder of the checkpoint.
        model: Its model, which may live on the meta device.

    Raises:
        FileNotFoundError: If the folder holds no safetensors files.
        ValueError: If the files lack a tensor of the model.
    """

    def __init__(self, source: str | os.PathLike[str], model: nn.Module) -> None:
        folder = Path(source)
        if (folder / INDEX).is_file():
            where = read_index(folder / INDEX)
        elif (folder / SINGLE).is_file():
            with opened_tensors(folder / SINGLE) as file:
                where = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise FileNotFoundError(f"expected {SINGLE} or {INDEX} in {os.fspath(source)!r}, found neither")
        self.paths = {name: folder / file for name, file in where.items()}
        tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        self.owners = {name: owner for name, owner in tied.items() if name not in self.paths}
        missing = [name for name in model.state_dict() if name not in self.paths and name not in tied]
        if missing:
            raise ValueError(
                f"expected tensors under the modules' names in {os.fspath(source)!r}, but {missing[0]!r} and "
                f"{len(missing) - 1} others are not there; load this model into memory and use compress_"
            )

    def stored_as(self, name: str) -> str:
        """The name under which the files have a tensor: another one's where it is tied to that."""
        return self.owners.get(name, name)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors.

        Args:
            names: Their names; names that no file has are left out.

        Returns:
            The tensors by name.
        """
        by_path: dict[Path, list[str]] = {}
        for name in names:
            if name in self.paths:
                by_path.setdefault(self.paths[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, wanted in by_path.items():
            with opened_tensors(path) as file:
                tensors |= {name: file.get_tensor(name) for name in wanted}
        return tensors


class CheckpointWriter:
    """The files of a new checkpoint.

    Args:
        folder: The folder, which is there.

    Attributes:
        weight_map: The file of each tensor.
        digests: The digest of each tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weight_map: dict[str, str] = {}
        self.digests: dict[str, str] = {}

    def write(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one file with some of the tensors; the first of the processes that work together does."""
        if current().leads:
            write_tensors(self.folder / file, tensors, {"format": "pt"})
        self.weight_map |= dict.fromkeys(tensors, file)
        self.digests |= digests(tensors)

    def write_index(self) -> None:
        """Write down which file has which tensor."""
        size = sum((self.folder / file).stat().st_size for file in set(self.weight_map.values()))
        index = {"metadata": {"total_size": size}, "weight_map": self.weight_map}
        write_atomically(self.folder / INDEX, lambda path: path.write_text(json.dumps(index, indent=1)))
