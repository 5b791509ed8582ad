"""Whether a stored model is as it was saved: digests in its configuration, written and checked with its files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from structmat import _checks
from structmat._digests import changes, check, digests, sealed
from structmat._files import read_json, read_tensors, write_atomically
from structmat.checkpoint import read_checkpoint
from structmat.formats import Format
from structmat.integrations.recorded import Recorded, is_ours

CONFIG, INDEXES = "config.json", "*.safetensors.index.json"

SHARD = re.compile(r"[^/\\]+\.safetensors")
"""The names of files that an index may lead to."""

VARIANT = re.compile(r"model\.[^.]+\.safetensors|adapter_.*")
"""The names of files beside the model's own: variants such as ``model.fp16.safetensors``, and adapters."""


@dataclass(frozen=True)
class Verified:
    """What ``verify`` found.

    Attributes:
        tensors: The number of tensors.
        has_digests: Whether digests were saved with them.
        problems: What is wrong, one text for each tensor; empty where all is well.
    """

    tensors: int
    has_digests: bool
    problems: tuple[str, ...]


def verify(path: str | os.PathLike[str]) -> Verified:
    """Compare a stored model with its digests, and look for values that are not finite.

    Args:
        path: A file that ``save_model`` wrote, or the folder of a Hugging Face checkpoint.

    Returns:
        What was found.

    Raises:
        FileNotFoundError: If there is no such file or folder, or the folder holds no safetensors files.
        ValueError: If a file cannot be read; the message names it.
    """
    place = Path(path)
    if not place.is_dir():
        state, header = read_checkpoint(place)
        seal, record, plan, said = header.seal, header.record, header.plan, []
    else:
        state = read_state(weight_files(place))
        recorded = _recorded(read_configuration(place / CONFIG))
        seal, record, plan = recorded.digests, recorded.record, recorded.plan()
        said = _problems_of_index(place)
    with _checks.about(os.fspath(path)):
        said += changes(seal, record, digests(state)) if seal else []
    return Verified(len(state), bool(seal), (*said, *_not_finite(state, plan)))


def _not_finite(state: Mapping[str, Tensor], plan: Mapping[str, Format]) -> Iterator[str]:
    """Name the tensors with NaN or infinity, which but for settings of formats nothing has."""
    settings = {
        f"{layer}.{factor}"
        for layer, format in plan.items()
        for factor, spec in format.factor_specs().items()
        if not spec.trainable
    }
    for name, tensor in state.items():
        if name not in settings and not _checks.is_finite(tensor):
            yield f"{name!r} has NaN or infinite values"


def _problems_of_index(folder: Path) -> list[str]:
    """Name the tensors of an index that are not in the files which it names."""
    said: list[str] = []
    for index in sorted(folder.glob(INDEXES)):
        by_file: dict[str, list[str]] = {}
        for name, file in read_index(index).items():
            by_file.setdefault(file, []).append(name)
        for file, names in by_file.items():
            held = read_tensors(folder / file)[0] if (folder / file).is_file() else {}
            said += [f"{name!r} is not in {file!r}, where {index.name!r} has it" for name in names if name not in held]
    return said


def read_index(path: Path) -> dict[str, str]:
    """Read which file of a sharded checkpoint holds which tensor.

    Args:
        path: The index.

    Returns:
        The name of the file, in the same folder, by the name of the tensor.

    Raises:
        ValueError: If the file holds something else, or leads to another folder.
    """
    what = "the index of a checkpoint"
    index = read_json(path, what)
    with _checks.about(os.fspath(path)):
        found = _checks.fields(index, {"metadata": dict, "weight_map": dict}, what)  # transformers reads both
        where = _checks.values(found["weight_map"], str, f"'weight_map' of {what}")
        wrong = [file for file in where.values() if not SHARD.fullmatch(file) or not file.isprintable()]
        if wrong or not where:
            got = _checks.shown(wrong[0]) if wrong else "none"
            raise ValueError(f"expected names of safetensors files in the same folder in {what}, got {got}")
    return where


def read_configuration(path: Path) -> dict[str, Any]:
    """Read the configuration of a model, of which this library needs but a few fields.

    Args:
        path: The file ``config.json`` or ``model_index.json``.

    Returns:
        The configuration.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON object, or the fields for this library are of another kind.
    """
    what = "the configuration of a model"
    config = _checks.typed(read_json(path, what), dict, f"{what} in {os.fspath(path)!r}")
    with _checks.about(os.fspath(path)):
        for field, kind in {"architectures": list, "quantization_config": dict, "_class_name": str}.items():
            if config.get(field) is not None:
                _checks.typed(config[field], kind, f"{field!r} of {what}")
        for name in config.get("architectures") or ():
            _checks.typed(name, str, f"'architectures' of {what}")
        facts = config.get("quantization_config")
        known = [key for key, value in (facts or {}).items() if value is not None]
        if facts is not None and not any(key == "quant_method" or key.startswith("load_in_") for key in known):
            raise ValueError(f"expected 'quant_method' in 'quantization_config' of {what}, got none")
        _recorded(config)
    return config


def _recorded(config: Mapping[str, Any]) -> Recorded:
    """What a configuration says about structured layers."""
    facts = config.get("quantization_config")
    return Recorded(**dict[str, Any](facts)) if facts and is_ours(facts) else Recorded()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model in a folder, without variants and adapters.

    Args:
        folder: The folder.

    Returns:
        The files.

    Raises:
        FileNotFoundError: If there is none.
    """
    files = [path for path in sorted(folder.glob("*.safetensors")) if not VARIANT.fullmatch(path.name)]
    if not files:
        raise FileNotFoundError(f"expected safetensors files in {os.fspath(folder)!r}, found none")
    return files


def read_state(files: Iterable[Path]) -> dict[str, Tensor]:
    """The tensors of several files by name; they stay in the files until they are needed."""
    return {name: tensor for file in files for name, tensor in read_tensors(file)[0].items()}


def check_files(recorded: Recorded, files: Iterable[str | os.PathLike[str]] | None) -> None:
    """Refuse the files of a checkpoint where a tensor or the record is not as it was saved.

    Args:
        recorded: What the configuration says of the tensors.
        files: The files; None where there are none.
    """
    paths = [Path(file) for file in files or ()]
    own = [path for path in paths if path.suffix == ".safetensors" and not VARIANT.fullmatch(path.name)]
    if own and recorded.digests:
        check(recorded.digests, recorded.record, read_state(own), os.fspath(own[0].parent))


@contextmanager
def recording_digests(folder: str | os.PathLike[str], here: bool = True) -> Iterator[None]:
    """Write the digests of what is saved into the configuration beside it, once the context is left.

    Args:
        folder: The folder; files that were there before and do not change are left out.
        here: Whether this process writes the files.

    Yields:
        Nothing.
    """
    before = _times(Path(folder)) if here else {}
    yield
    if here:
        written = [path for path, time in _times(Path(folder)).items() if before.get(path) != time]
        if written:
            record_digests(Path(folder), digests(read_state(written)))


def _times(folder: Path) -> dict[Path, tuple[int, int]]:
    """The file number and the time of every file with weights."""
    found = {path: path.stat() for path in folder.glob("*.safetensors") if not VARIANT.fullmatch(path.name)}
    return {path: (facts.st_ino, facts.st_mtime_ns) for path, facts in found.items()}


def record_digests(folder: Path, tensors: Mapping[str, str]) -> None:
    """Write digests into the configuration in a folder, where it is one of a structured model.

    Args:
        folder: The folder.
        tensors: The digest of every tensor.
    """
    if not (folder / CONFIG).is_file():
        return
    config = read_configuration(folder / CONFIG)
    if not is_ours(config.get("quantization_config")):
        return
    record = _recorded(config).record
    config["quantization_config"]["digests"] = sealed(record, tensors)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    write_atomically(folder / CONFIG, lambda temporary: temporary.write_text(text, encoding="utf-8"))
