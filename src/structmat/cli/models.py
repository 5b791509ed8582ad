"""The door to transformers: models with and without their weights, tokenizers and image processors."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from structmat import _checks
from structmat.cli.errors import door
from structmat.cli.options import Options
from structmat.data.sources import neighbour
from structmat.integrations.hub import load_pretrained
from structmat.integrations.integrity import read_configuration

DTYPES = ("auto", "float32", "bfloat16", "float16")

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
IMAGE_FILES = ("preprocessor_config.json",)


DtypeOption = Annotated[
    str, typer.Option(help=f"The dtype of the weights: {', '.join(DTYPES)}; auto is that of the checkpoint.")
]


DeviceOption = Annotated[
    str, typer.Option(help="The device that computes: cpu, cuda, cuda:1, …; auto is a GPU if there is one.")
]


@dataclass(frozen=True)
class Placement(Options):
    """How a model is held while a command works with it.

    Attributes:
        dtype: The dtype of the weights.
        device: The device.
    """

    dtype: DtypeOption = "auto"
    device: DeviceOption = "auto"


def library() -> Any:
    """The package transformers, which no command imports before it needs it.

    Returns:
        The package, with structmat registered.

    Raises:
        ImportError: If it is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ImportError("this command needs transformers: pip install 'structmat[transformers]'")
    importlib.import_module("structmat.integrations.transformers.quantizer")
    transformers = importlib.import_module("transformers")
    if not sys.stderr.isatty():  # logs are plain lines
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        transformers.utils.logging.disable_progress_bar()
    return transformers


def check_name(model: str) -> str:
    """Check the name of a model before anything is imported or looked up.

    Args:
        model: A folder, or a name on the Hub.

    Returns:
        The same.

    Raises:
        FileNotFoundError: If it can only be a folder and there is none, or the folder holds no model.
    """
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"expected a model in the folder {model!r}, but it has no config.json")
        read_configuration(path / "config.json")
    elif (
        path.exists()
        or path.is_absolute()
        or model.startswith((".", "~"))
        or len(path.parts) > 2
        or os.sep == model[-1:]
    ):
        near = None if path.exists() else neighbour(model)
        hint = "" if near is None else f"; did you mean {near!r}?"
        raise FileNotFoundError(f"expected a folder with a model, or its name on the Hub, got {model!r}{hint}")
    return model


def configuration(model: str) -> Any:
    """The configuration of a model."""
    with door("transformers", f"a model that transformers knows, got {model!r}"):
        return library().AutoConfig.from_pretrained(check_name(model))


def skeleton(model: str) -> Any:
    """A model without its weights, structured if it is saved so.

    Args:
        model: A folder, or a name on the Hub.

    Returns:
        The model, with its parameters on the meta device.
    """
    configuration(model)
    skeletons = importlib.import_module("structmat.integrations.transformers.skeletons")
    return skeletons.skeleton(model)


def load(model: str, placement: Placement = Placement()) -> Any:
    """Load a model with its weights.

    Args:
        model: A folder, or a name on the Hub.
        placement: The dtype and the device.

    Returns:
        The model, in evaluation mode.
    """
    library()
    dtype, device = dtype_named(placement.dtype), device_named(placement.device)
    with door("transformers", f"a model that transformers loads, got {model!r}"):
        loaded = load_pretrained(check_name(model), dtype=dtype)
    return loaded.to(device).eval()


def folder_of(model: str) -> Path:
    """The folder with a model's files, which for a name on the Hub are fetched first."""
    if Path(check_name(model)).is_dir():
        return Path(model)
    library()
    return Path(importlib.import_module("huggingface_hub").snapshot_download(model))


def dtype_named(name: str) -> Any:
    """The dtype that ``--dtype`` means; ``"auto"`` stays ``"auto"``."""
    _checks.one_of(name, DTYPES, "--dtype")
    return name if name == "auto" else getattr(torch, name)


def device_named(name: str) -> torch.device:
    """The device that ``--device`` means.

    Args:
        name: ``"auto"``, or a name that PyTorch knows.

    Returns:
        The device.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise ValueError(f"expected --device to be one of this machine, such as cpu, got {name!r}") from error
    return device


def processors(model: str) -> dict[str, Any]:
    """Load what makes the inputs of a model.

    Args:
        model: A folder, or a name on the Hub.

    Returns:
        The model's ``"tokenizer"`` and ``"image processor"``, of which it may have both, one or none.
    """
    transformers = library()
    kinds = {
        "tokenizer": (TOKENIZER_FILES, transformers.AutoTokenizer),
        "image processor": (IMAGE_FILES, transformers.AutoImageProcessor),
    }
    there = {name: kind for name, (files, kind) in kinds.items() if any(has_file(model, file) for file in files)}
    with door("transformers", f"a {' and an '.join(there)} that transformers loads, got {model!r}"):
        return {name: kind.from_pretrained(model) for name, kind in there.items()}


def has_file(model: str, file: str) -> bool:
    """Whether a folder or a repository on the Hub has a file."""
    return file_of(model, file) is not None


def file_of(model: str, file: str) -> Path | None:
    """The path of a file in a folder, or of one that is fetched from the Hub; None where there is none."""
    if Path(model).is_dir():
        found = Path(model) / file
        return found if found.is_file() else None
    library()
    hub = importlib.import_module("transformers.utils.hub")
    cached = hub.cached_file(model, file, _raise_exceptions_for_missing_entries=False)
    return None if cached is None else Path(cached)


def processor_of(model: str) -> Any:
    """Load what makes the model's inputs from data: its tokenizer, or else its image processor.

    Args:
        model: A folder, or a name on the Hub.

    Returns:
        The processor.

    Raises:
        FileNotFoundError: If it has none.
    """
    found = processors(model)
    if not found:
        raise FileNotFoundError(
            f"expected {model!r} to have a tokenizer ({' or '.join(TOKENIZER_FILES)}) or an image processor "
            f"({IMAGE_FILES[0]}) to read data with, found none; save it there with save_pretrained"
        )
    return next(iter(found.values()))
