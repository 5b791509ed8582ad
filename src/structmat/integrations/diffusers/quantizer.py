"""Structured networks in Hugging Face diffusers: models and whole pipelines, plain save and plain load.

Importing this module, or ``structmat`` before or after diffusers, registers the quantization method ``"structmat"``.
Surgery on ``pipeline.transformer`` or ``pipeline.unet`` writes the plan into that model's configuration, and
``from_pretrained`` of the model, or of a pipeline that holds it, reads it. A program that did not import structmat gets
the ``ValueError`` of diffusers about an unknown quantization type. Layers that share one weight cannot be saved;
diffusers refuses to save dense ones too.
"""

from __future__ import annotations

import functools
import warnings
from enum import Enum
from typing import Any

from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from structmat.integrations.recorded import QUANT_METHOD, Recorded, is_ours, recorded, refuse_adapters
from structmat.network.adapters import Adapter, register_adapter
from structmat.network.surgery import apply_plan_, check_layers, densify_
from structmat.nn import StructuredModule


class StructmatMethod(str, Enum):
    """The method's name in the form that diffusers reads, with a ``value``."""

    STRUCTMAT = QUANT_METHOD


class StructmatDiffusersConfig(Recorded, QuantizationConfigMixin):
    """The ``quantization_config`` of a structured model."""

    quant_method = StructmatMethod.STRUCTMAT

    def to_diff_dict(self) -> dict[str, Any]:
        """All fields as a dictionary, which the ``repr`` of the base class asks for."""
        return self.to_dict()


class StructmatDiffusersQuantizer(DiffusersQuantizer):
    """Puts structured layers into a skeleton before its weights are loaded, and checks that the file has all."""

    use_keep_in_fp32_modules = True
    quantization_config: StructmatDiffusersConfig

    @property
    def is_serializable(self) -> Any:
        """Such a model can be saved."""
        return True

    @property
    def is_trainable(self) -> Any:
        """Such a model can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Such a model can be compiled."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        apply_plan_(model, self.quantization_config.plan())
        return model

    def update_missing_keys(self, model: ModelMixin, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse a file that lacks a tensor of a structured layer.

        Args:
            model: The skeleton.
            missing_keys: The names of the tensors that the file lacks.
            prefix: A prefix of the names, which is not used.

        Returns:
            The same ``missing_keys``.

        Raises:
            ValueError: If one of them belongs to a structured layer.
        """
        structured = {name for name, module in model.named_modules() if isinstance(module, StructuredModule)}
        lost = sorted(key for key in missing_keys if key.rpartition(".")[0] in structured)
        if lost:
            raise ValueError(
                f"expected values for every tensor of the structured layers, but the checkpoint has none for {lost}; "
                "it is incomplete, or its tensors are under other names"
            )
        return missing_keys

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        check_layers(model)
        model.is_quantized = False  # .half(), .float() and .to(dtype) refuse to work on models that are
        write_down(model)
        return model

    def _dequantize(self, model: Any) -> Any:
        densify_(model)
        model.hf_quantizer = self  # diffusers takes it off itself
        return model


def write_down(model: nn.Module) -> None:
    """Write what is structured into the configuration of every diffusers model in the network.

    ``apply_plan_``, ``compress_`` and ``densify_`` do this themselves for the network that they were given.

    Args:
        model: The network; the models of diffusers in it are found.
    """
    for module in model.modules():
        if isinstance(module, ModelMixin):
            _write_down_one(module)


def _write_down_one(model: Any) -> None:
    facts = recorded(model)
    before = model.config.get("quantization_config")
    if before is not None and not is_ours(before):
        if facts:
            warnings.warn(
                f"the model has the quantization_config {type(before).__name__}, and a model can have but one: "
                "save_pretrained will not store its structured layers; compress it before it is quantized",
                stacklevel=2,
            )
        return
    if facts is not None:
        model.register_to_config(quantization_config=StructmatDiffusersConfig(**facts))
    elif before is not None:
        model._internal_dict = FrozenDict({k: v for k, v in model.config.items() if k != "quantization_config"})
        model.__dict__.pop("hf_quantizer", None)


_SAVE: Any = ModelMixin.save_pretrained


@functools.wraps(_SAVE)
def _save_pretrained(model: Any, *arguments: Any, **options: Any) -> None:
    """Save a model as its class does, with a record of what is structured in it now, whoever made it so."""
    refuse_adapters(model)
    write_down(model)
    _SAVE(model, *arguments, **options)


ModelMixin.save_pretrained = _save_pretrained  # pyright: ignore - the record is to be of what is saved
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = StructmatDiffusersConfig  # there is no function for it
auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = StructmatDiffusersQuantizer
register_adapter("diffusers", Adapter(record=write_down, outputs=("sample",)))
