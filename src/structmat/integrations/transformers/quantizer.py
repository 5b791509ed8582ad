"""Structured networks in Hugging Face transformers: plain ``save_pretrained``, plain ``from_pretrained``.

Importing this module, or ``structmat`` before or after transformers, registers the quantization method
``"structmat"``. Surgery writes the plan into ``config.quantization_config``, and ``save_pretrained`` writes it anew,
for layers that were put in or taken out without surgery. ``from_pretrained`` reads it, puts the structured layers into
the empty skeleton, and transformers fills them like any others: sharded, on a device map, in another dtype, into the
model with a head or the one without.

**A program that did not import structmat gets an error, never random weights.** Transformers alone only warns about a
method that it does not know, and continues with a dense model whose missing weights it draws at random. Therefore every
structured layer also stores one byte under the name of the dense weight that it replaced. Without structmat, that byte
has the wrong shape for the weight, and ``from_pretrained`` raises an error that names each layer (unless it was told
``ignore_mismatched_sizes=True``). With structmat, the byte is ignored. The plan travels in the configuration of the
model that is saved.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from structmat import _checks
from structmat.formats import Format
from structmat.integrations.integrity import check_files, recording_digests
from structmat.integrations.recorded import QUANT_METHOD, Recorded, is_ours, recorded, refuse_adapters, ties_of
from structmat.network.adapters import Adapter, register_adapter
from structmat.network.signatures import Signature
from structmat.network.sites import DENSE_KINDS, DenseKind, dense_weight
from structmat.network.surgery import apply_plan_, check_layers, densify_
from structmat.nn import ReadOnlyWeight, StructuredLinear, StructuredModule
from structmat.nn.adaptable import ADAPTABLE, Adaptable


class StructuredConv1D(StructuredLinear):
    """A structured layer in the place of a ``Conv1D``, GPT-2's linear layer, which stores its weight ``(in, out)``."""

    def dense_layer(self) -> Conv1D:
        """The ``Conv1D`` that this one stands in for, on the meta device."""
        with torch.device("meta"):
            return Conv1D(self.format.M, self.format.N)

    def in_dense_layout(self, matrix: Tensor) -> Tensor:
        """The matrix as ``(in, out)``."""
        return matrix.mT

    def out_of_dense_layout(self, weight: Tensor) -> Tensor:
        """What has the layout ``(in, out)`` as a matrix ``(M, N)``."""
        return weight.mT


class AdaptableConv1D(Adaptable, StructuredConv1D, Conv1D):
    """A ``StructuredConv1D`` that passes for a ``Conv1D``."""


ADAPTABLE[StructuredConv1D] = AdaptableConv1D


def _structured_conv1d(
    layer: nn.Module, format: Format, factors: Mapping[str, Tensor] | None, generator: torch.Generator | None
) -> StructuredConv1D:
    weight = layer.get_parameter("weight")
    return StructuredConv1D(format, factors=factors, generator=generator, device=weight.device, dtype=weight.dtype)


DENSE_KINDS[Conv1D] = DenseKind(lambda layer: dense_weight(layer).mT, lambda layer: None, _structured_conv1d)


class StructmatConfig(Recorded, QuantizationConfigMixin):
    """The ``quantization_config`` of a structured model."""


class StructmatQuantizer(HfQuantizer):
    """Puts structured layers into a skeleton before its weights are loaded, and checks that all of them were."""

    requires_calibration = True  # refuses quantization_config=... on a dense checkpoint
    quantization_config: StructmatConfig
    given: Mapping[str, Tensor] | None = None
    """The state dict that ``save_pretrained`` was given, while it runs."""

    def is_serializable(self) -> Any:
        """Such a model can be saved."""
        return True

    @property
    def is_trainable(self) -> Any:
        """Such a model can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """All parameters of such a model can be trained, which ``Trainer`` asks."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Such a model can be compiled."""
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        with _checks.about(model.config._name_or_path):
            check_files(self.quantization_config, kwargs.get("checkpoint_files"))
            return self._make_structured(model)

    def _make_structured(self, model: Any) -> Any:
        """Put structured layers into a skeleton, in place."""
        names = _names_in(model, self.quantization_config)
        for copy, owner in self.quantization_config.ties.items():
            if copy in names and owner in names:
                model.get_submodule(names[copy]).weight = model.get_submodule(names[owner]).weight
        plan = self.quantization_config.plan()
        apply_plan_(model, {names[name]: format for name, format in plan.items() if name in names})
        layers = "|".join(re.escape(name.removeprefix(f"{model.base_model_prefix}.")) for name in names.values())
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            rf"(^|\.)({layers})\.weight$",
        }
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        lost = [
            f"{name}.{own}"
            for name, module in model.named_modules()
            if isinstance(module, StructuredModule)
            for own, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False)
        ]
        if lost:
            raise ValueError(
                f"expected values for every tensor of the structured layers, but the checkpoint has none for {lost}; "
                "it is incomplete, or its tensors are under other names"
            )
        with _checks.about(model.config._name_or_path):
            check_layers(model)
        model.is_quantized = False  # .half() and .float() refuse to work on models that are
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        write_down(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        densify_(model)
        return model if dtype in (None, model.dtype) else model.to(dtype)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> Any:
        """The state dict to save, with one byte in the place of each dense weight.

        Args:
            model: The model to save.

        Returns:
            The state dict, and no metadata.
        """
        state = dict(model.state_dict() if self.given is None else self.given)
        for name, byte in placeholders(model).items():
            state.setdefault(name, byte)
        return state, {}


def placeholders(model: nn.Module) -> dict[str, Tensor]:
    """One byte under the name of the dense weight of every structured layer, for the files of a checkpoint."""
    return {
        f"{name}.weight": torch.zeros(1, dtype=torch.uint8)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, StructuredModule)
    }


_SAVE: Any = PreTrainedModel.save_pretrained


@functools.wraps(_SAVE)
def _save_pretrained(
    model: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    *arguments: Any,
    **options: Any,
) -> None:
    """Save a model as its class does, with a record of what is structured in it now, whoever made it so.

    Transformers forgets the ``state_dict`` that it was given, which is all that a sharded trainer can save, where a
    model has a quantizer; the quantizer is told it here.
    """
    if not getattr(model, "_hf_peft_config_loaded", False):  # or transformers saves the adapter alone
        refuse_adapters(model)
        write_down(model)
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, StructmatQuantizer):
        _SAVE(model, save_directory, is_main_process, state_dict, *arguments, **options)
        return
    quantizer.given = state_dict
    try:
        with recording_digests(save_directory, model.should_save_on_this_rank(is_main_process)):
            _SAVE(model, save_directory, is_main_process, state_dict, *arguments, **options)
    finally:
        quantizer.given = None


def _names_in(model: Any, config: StructmatConfig) -> dict[str, str]:
    """The names of a checkpoint's layers in this model, which may have the prefix of a head or not."""
    present, prefix = {name for name, _ in model.named_modules()}, model.base_model_prefix
    names: dict[str, str] = {}
    for name in (*config.layers, *config.ties):
        candidates = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        found = next((candidate for candidate in candidates if candidate in present), None)
        if found is not None:
            names[name] = found
    absent = [name for name in (*config.layers, *config.ties) if name not in names]
    written_by = set(model.config.architectures or ())
    if not written_by & {type(model).__name__, type(model.base_model).__name__} and names:
        absent = [name for name in absent if name.startswith(f"{prefix}.")]  # others belong to the other head
    if absent:
        raise ValueError(
            f"expected the layers {absent}, which the checkpoint's quantization_config lists, in a "
            f"{type(model).__name__}, but it has none of these names; "
            f"load it into {' or '.join(sorted(written_by)) or 'its class'}"
        )
    return names


def write_down(model: nn.Module) -> None:
    """Write what is structured into the configuration of every transformers model in the network.

    ``apply_plan_``, ``compress_`` and ``densify_`` do this themselves for the network that they were given. Several
    models with one configuration, such as one with a head and the one inside it, count as the outermost one.

    Args:
        model: The network; the models of transformers in it are found.
    """
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module.config) not in seen:
            seen.add(id(module.config))
            _write_down_one(module)


def _write_down_one(model: Any) -> None:
    facts, config = recorded(model), model.config
    before = getattr(config, "quantization_config", None)
    if before is not None and not is_ours(before):
        if facts:
            warnings.warn(
                f"the model has the quantization_config {type(before).__name__}, and a model can have but one: "
                "save_pretrained will not store its structured layers; compress it before it is quantized",
                stacklevel=2,
            )
        return
    if facts is None:
        if before is not None:
            del config.quantization_config
            model.__dict__.pop("hf_quantizer", None)
            _declare_ties(model)
        return
    if isinstance(model.get_output_embeddings(), StructuredModule):
        for part in (config, config.get_text_config(decoder=True)):
            part.tie_word_embeddings = False
    config.quantization_config = StructmatConfig(**facts)
    model.hf_quantizer = StructmatQuantizer(config.quantization_config)
    _declare_ties(model)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Let no model in the network return a cache of past tokens, while the context is entered."""
    configs = [config for config in _configurations(model) if isinstance(getattr(config, "use_cache", None), bool)]
    before = [config.use_cache for config in configs]
    try:
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for config, cached in zip(configs, before, strict=True):
            config.use_cache = cached


def _configurations(model: nn.Module) -> list[Any]:
    """The configurations of all modules in a network, with those that are parts of others, each once."""
    found: dict[int, Any] = {}
    left = [vars(module)["config"] for module in model.modules() if hasattr(vars(module).get("config"), "__dict__")]
    while left:
        config = left.pop()
        if id(config) not in found:
            found[id(config)] = config
            left += [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return list(found.values())


def _declare_ties(model: Any) -> None:
    """Tell transformers which tensors are one: it saves each once, and ties them again when it loads."""
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    ties = {
        f"{copy}.{own}": f"{owner}.{own}"
        for copy, owner in ties_of(model).items()
        for own in model.get_submodule(copy).state_dict()
        if tensors[f"{copy}.{own}"] is tensors[f"{owner}.{own}"]
    }
    declared = {copy: owner for copy, owner in model.all_tied_weights_keys.items() if {copy, owner} <= set(tensors)}
    model.all_tied_weights_keys = declared | ties
    model.__dict__.pop("_tied_weights_keys", None)
    if ties:
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **ties}


ReadOnlyWeight._is_hf_initialized = True  # pyright: ignore - transformers is not to draw such a weight at random
PreTrainedModel.save_pretrained = _save_pretrained  # pyright: ignore - the record is to be of what is saved
register_quantization_config(QUANT_METHOD)(StructmatConfig)
register_quantizer(QUANT_METHOD)(StructmatQuantizer)


def signature_of(model: nn.Module) -> Signature | None:
    """The signature of a model for exporters; the module that tells it is imported when it is asked for."""
    return importlib.import_module("structmat.integrations.transformers.signatures").signature_of(model)


register_adapter(
    "transformers",
    Adapter(
        record=write_down,
        stateless=without_cache,
        outputs=("logits", "last_hidden_state"),
        signature=signature_of,
    ),
)
