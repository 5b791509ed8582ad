"""Load a saved model in one line, whichever framework wrote it."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from structmat import _checks
from structmat.integrations import doors
from structmat.integrations.integrity import INDEXES, read_configuration, read_index

DOWNLOAD_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")
"""The arguments of ``from_pretrained`` that say where a file is."""


def load_pretrained(
    path_or_name: str | os.PathLike[str], *, auto_class: str | type[Any] | None = None, **kwargs: Any
) -> Any:
    """Load a structured (or dense) model that ``save_pretrained`` of transformers or diffusers wrote.

    The framework is imported here and not before. The folder's ``config.json`` or ``model_index.json`` names what is
    loaded: a transformers model, a diffusers model, or a diffusers pipeline.

    Args:
        path_or_name: A folder, or the name of a repository on the Hugging Face hub.
        auto_class: The class to load it with instead, or its name in the framework, such as ``"AutoModel"``.
        kwargs: Further arguments of ``from_pretrained``, such as ``dtype``, ``device_map`` and ``revision``.

    Returns:
        The model or pipeline.

    Raises:
        FileNotFoundError: If there is neither a ``config.json`` nor a ``model_index.json``.
        ImportError: If that framework is not installed or too old; the message has the command that installs it.
        ValueError: If the configuration is damaged, names no class of a model that the framework has, or does not fit
            the files.
    """
    config = _configuration(path_or_name, {key: kwargs[key] for key in DOWNLOAD_OPTIONS if key in kwargs})
    framework = "diffusers" if "_class_name" in config else "transformers"
    doors.check_version(framework)
    importlib.import_module(f"structmat.integrations.{framework}")
    named = config.get("_class_name") if framework == "diffusers" else (config.get("architectures") or [None])[0]
    wanted = named if auto_class is None else auto_class
    kind = model_class(framework, wanted, os.fspath(path_or_name), "; pass auto_class")
    return kind.from_pretrained(os.fspath(path_or_name), **kwargs)


MODELS = {"transformers": ("PreTrainedModel",), "diffusers": ("ModelMixin", "DiffusionPipeline")}
"""The base classes of what is loaded, by framework; other classes have a ``from_pretrained`` too."""

FIELDS = {"transformers": "architectures", "diffusers": "_class_name"}
"""The field of a configuration that names the class, by framework."""

LOADERS = ("AutoModel", "AutoPipeline")
"""How the names of classes begin that find a model's class themselves."""


def model_class(framework: str, wanted: Any, source: str, remedy: str = "") -> Any:
    """Find the class of a model.

    Args:
        framework: A key of ``MODELS``, which is imported.
        wanted: The class, or its name.
        source: Where the model is, for messages.
        remedy: What else to do, for messages.

    Returns:
        The class.

    Raises:
        ValueError: If the framework has no such class, or it is not one of models.
    """
    library = importlib.import_module(framework)
    kind = getattr(library, wanted, None) if isinstance(wanted, str) else wanted
    bases = tuple(getattr(library, name) for name in MODELS[framework])
    if isinstance(kind, type) and (issubclass(kind, bases) or kind.__name__.startswith(LOADERS)):
        return kind
    raise ValueError(
        f"expected the configuration of {source!r} to name a class of {framework} under {FIELDS[framework]!r} that is "
        f"one of models, got {_checks.shown(wanted)}{remedy}"
    )


def _configuration(path_or_name: str | os.PathLike[str], options: dict[str, Any]) -> dict[str, Any]:
    """The contents of ``model_index.json`` or ``config.json``, once an index of files beside it is known to be one."""
    folder = Path(path_or_name) / (options.get("subfolder") or "")
    for index in sorted(folder.glob(INDEXES)):
        read_index(index)
    for name in ("model_index.json", "config.json"):
        file = folder / name
        if not Path(path_or_name).is_dir():
            hub, errors = doors.checked_module("huggingface_hub"), doors.checked_module("huggingface_hub.errors")
            try:
                file = Path(hub.hf_hub_download(os.fspath(path_or_name), name, **options))
            except errors.EntryNotFoundError:
                continue
        if file.is_file():
            return read_configuration(file)
    raise FileNotFoundError(
        f"expected a folder or hub repository with config.json or model_index.json, got {os.fspath(path_or_name)!r}"
    )
