"""Models without their weights: what a plan is made for, and what weights are read into."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights

from structmat.integrations.hub import model_class
from structmat.integrations.integrity import read_configuration
from structmat.integrations.recorded import is_ours
from structmat.integrations.transformers.quantizer import StructmatConfig, StructmatQuantizer


def empty_model(kind: Any, config: Any, dtype: torch.dtype | None = None) -> Any:
    """A model whose parameters are on the meta device; its buffers, which files may not hold, have their values.

    Args:
        kind: The model's class.
        config: The model's configuration.
        dtype: The dtype of the parameters; None for that of the configuration.

    Returns:
        The model, in evaluation mode.
    """
    with init_empty_weights():
        model = kind._from_config(config, dtype=dtype or config.dtype or torch.float32)
    model.tie_weights()  # the context gives every name a parameter of its own
    return model.eval()


def skeleton(source: str | os.PathLike[str]) -> Any:
    """The model of a checkpoint without its weights, structured if it is saved so.

    Args:
        source: A folder, or a name on the Hub. Its configuration names the model's class.

    Returns:
        The model, with its parameters on the meta device, in the checkpoint's dtype.

    Raises:
        FileNotFoundError: If the source is a folder that is not there, or that has no ``config.json``.
        ValueError: If the configuration names no class of transformers, or the model is quantized.
    """
    folder = Path(source)
    must_be_folder = not isinstance(source, str) or folder.is_absolute() or folder.is_dir()
    if must_be_folder and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"expected a folder with config.json, got {os.fspath(source)!r}")
    if must_be_folder:
        read_configuration(folder / "config.json")
    config = transformers.AutoConfig.from_pretrained(source)
    kind = model_class("transformers", (config.architectures or [None])[0], os.fspath(source))
    facts = config.__dict__.pop("quantization_config", None)
    if facts is not None and not is_ours(facts):
        raise ValueError(
            f"expected a model with dense weights, got {os.fspath(source)!r}, which is quantized; dequantize it"
        )
    model = empty_model(kind, config)
    if facts is not None:
        written = facts if isinstance(facts, dict) else facts.to_dict()
        StructmatQuantizer(StructmatConfig(**written))._process_model_before_weight_loading(model)
    return model
