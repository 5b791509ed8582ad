"""Models of transformers as functions of tensors, for exporters: images, texts, and texts with a cache of past tokens.

The names of inputs and outputs are those that optimum gives its graphs, which programs around ONNX know.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from structmat.network.signatures import BATCH, SEQUENCE, Flat, Signature, named_tensors

PAST, TOTAL = "past_sequence_length", "past_sequence_length + sequence_length"
"""The names of the axes of past tokens, and of past and new tokens together."""

LENGTH = "sequence_length"
"""The name of the axis of new tokens beside past ones."""


def signature_of(model: nn.Module) -> Signature | None:
    """Find the signature of a model of transformers.

    Args:
        model: The network.

    Returns:
        The signature: with past tokens for causal language models, with an attention mask for other models of texts,
        with images of the size in the configuration for models of images; None for other networks.
    """
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return None
    if model.main_input_name == "pixel_values":
        return _of_images(model)
    if model.main_input_name != "input_ids":
        return None
    return _of_generation(model) if model.can_generate() and _shape_of_past(model) else _of_texts(model)


def _of_images(model: Any) -> Signature | None:
    config = model.config
    size, channels = getattr(config, "image_size", 224), getattr(config, "num_channels", 3)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)

    def draw(sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(sizes[BATCH], channels, height, width, generator=generator).to(model.dtype),)

    return _signature(model, ("pixel_values",), {"pixel_values": {0: BATCH}}, draw, {BATCH: 2})


def _of_texts(model: Any) -> Signature:
    config = model.config.get_text_config()
    takes = inspect.signature(model.forward).parameters
    kinds = getattr(config, "type_vocab_size", None) or 0
    names = ("input_ids", "attention_mask", *(["token_type_ids"] if "token_type_ids" in takes and kinds else []))

    def draw(sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        shape = sizes[BATCH], sizes[SEQUENCE]
        mask = torch.ones(shape, dtype=torch.int64)
        mask[0, sizes[SEQUENCE] // 2 + 1 :] = 0  # the first text is shorter
        inputs = torch.randint(config.vocab_size, shape, generator=generator), mask
        if len(names) == 3:
            inputs += (torch.randint(kinds, shape, generator=generator),)
        return inputs

    axes = {key: {0: BATCH, 1: SEQUENCE} for key in names}
    return _signature(model, names, axes, draw, {BATCH: 2, SEQUENCE: 3})


def _signature(model: Any, names: tuple[str, ...], axes: Any, draw: Any, sizes: dict[str, int]) -> Signature:
    """The signature of a model that is called by keywords and keeps no state."""
    module = Flat(model, names)
    with torch.no_grad():
        example = draw(sizes, torch.Generator().manual_seed(0))
        outputs = tuple(named_tensors(model(**dict(zip(names, example, strict=True)))))
    return Signature(module, names, outputs, axes, draw, sizes, {})


class WithPast(nn.Module):
    """A causal language model that takes past keys and values as tensors, and returns those of all tokens.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> Any:
        """Call the model.

        Args:
            tensors: The new tokens ``(batch, sequence)``, the mask of past and new tokens ``(batch, past + sequence)``,
                the positions of the new tokens ``(batch, sequence)``; then the keys and values of the first layer, of
                the second, …, each ``(batch, heads, past, width)``.

        Returns:
            The logits, and the keys and values of all tokens in the same order.
        """
        input_ids, attention_mask, position_ids, *past = tensors
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, layer)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            position_ids=position_ids,
        )
        present = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return output.logits, *present


def _shape_of_past(model: Any) -> list[tuple[int, int]]:
    """The heads and the width of the keys of each layer; empty where the model has no plain cache of them."""
    if not {"past_key_values", "position_ids"} <= set(inspect.signature(model.forward).parameters):
        return []
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64), past_key_values=cache, use_cache=True)
    kept = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    plain = [k for k, v in kept if isinstance(k, Tensor) and isinstance(v, Tensor) and k.shape == v.shape]
    return [(keys.shape[1], keys.shape[3]) for keys in plain] if len(plain) == len(kept) else []


def _of_generation(model: Any) -> Signature:
    shapes = _shape_of_past(model)
    parts = [f"{layer}.{part}" for layer in range(len(shapes)) for part in ("key", "value")]
    past = tuple(f"past_key_values.{part}" for part in parts)
    axes: dict[str, dict[int, str]] = {key: {0: BATCH, 1: LENGTH} for key in ("input_ids", "position_ids")}
    axes |= {"attention_mask": {0: BATCH, 1: TOTAL}} | {key: {0: BATCH, 2: PAST} for key in past}
    return Signature(
        WithPast(model),
        ("input_ids", "attention_mask", "position_ids", *past),
        ("logits", *(f"present.{part}" for part in parts)),
        axes,
        functools.partial(_draw_with_past, model, shapes),
        {BATCH: 2, LENGTH: 3, PAST: 5, TOTAL: 8},
        {PAST: 0},
    )


def _draw_with_past(
    model: Any, shapes: list[tuple[int, int]], sizes: Mapping[str, int], generator: torch.Generator
) -> tuple[Tensor, ...]:
    batch, new, past = sizes[BATCH], sizes[LENGTH], sizes[PAST]
    tokens = torch.randint(model.config.get_text_config().vocab_size, (batch, new), generator=generator)
    positions = torch.arange(past, past + new).repeat(batch, 1)
    mask = torch.ones(batch, past + new, dtype=torch.int64)
    mask[0, : past // 2] = 0  # the first text began later
    cache = [
        torch.randn(batch, heads, past, width, generator=generator).to(model.dtype)
        for heads, width in shapes
        for _ in range(2)
    ]
    return tokens, mask, positions, *cache
