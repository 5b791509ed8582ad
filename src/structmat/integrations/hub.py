"""Load a saved model in one line, whichever framework wrote it."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

from structmat.integrations import doors

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
        ValueError: If the configuration names no class that the framework has.
    """
    config = _configuration(path_or_name, {key: kwargs[key] for key in DOWNLOAD_OPTIONS if key in kwargs})
    framework = "diffusers" if "_class_name" in config else "transformers"
    doors.check_version(framework)
    importlib.import_module(f"structmat.integrations.{framework}")
    library = importlib.import_module(framework)
    named = config.get("_class_name") if framework == "diffusers" else (config.get("architectures") or [None])[0]
    wanted = named if auto_class is None else auto_class
    kind = getattr(library, wanted, None) if isinstance(wanted, str) else wanted
    if kind is None:
        raise ValueError(
            f"expected the configuration of {os.fspath(path_or_name)!r} to name a class of {framework}, "
            f"got {wanted!r}; pass auto_class"
        )
    return kind.from_pretrained(os.fspath(path_or_name), **kwargs)


def _configuration(path_or_name: str | os.PathLike[str], options: dict[str, Any]) -> dict[str, Any]:
    """The contents of ``model_index.json`` or ``config.json``."""
    folder = Path(path_or_name) / (options.get("subfolder") or "")
    for name in ("model_index.json", "config.json"):
        file = folder / name
        if not Path(path_or_name).is_dir():
            hub, errors = doors.checked_module("huggingface_hub"), doors.checked_module("huggingface_hub.errors")
            try:
                file = Path(hub.hf_hub_download(os.fspath(path_or_name), name, **options))
            except errors.EntryNotFoundError:
                continue
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
    raise FileNotFoundError(
        f"expected a folder or hub repository with config.json or model_index.json, got {os.fspath(path_or_name)!r}"
    )
