"""Language models of a given shape with random weights: time does not depend on the values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from structmat import _checks
from structmat.bench.models import SHAPES
from structmat.formats import Format
from structmat.integrations.transformers.skeletons import empty_model
from structmat.network.surgery import apply_plan_
from structmat.nn import StructuredModule
from structmat.plan import Rule, make_plan


def random_llama(
    shape: str,
    rule: Rule | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **changes: int,
) -> LlamaForCausalLM:
    """A Llama of a shape with random weights, dense or with structured attention and MLPs.

    Nothing is fitted, and a layer that is structured never has a dense weight.

    Args:
        shape: A key of ``SHAPES``.
        rule: The rule for every linear layer but the output head; None for a dense network.
        dtype: The dtype of the weights.
        device: The device on which the weights are drawn.
        **changes: Changes of the configuration, such as ``vocab_size=32000``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If there is no such shape, or the rule does not fit it.
    """
    _checks.one_of(shape, SHAPES, "a shape")
    facts: dict[str, Any] = {**SHAPES[shape], "max_position_embeddings": 8192, **changes}
    config = LlamaConfig(**facts)
    model = empty_model(LlamaForCausalLM, config, dtype)
    if rule is not None:
        apply_plan_(model, make_plan(model, {r"model\.layers\..*": rule}))
    model.to_empty(device=device)  # it empties the frequencies too, which are buffers
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    fill_(model)
    return model


@torch.no_grad()
def fill_(model: nn.Module) -> nn.Module:
    """Draw structured weights and matrices at random where they are, in place, and set all other weights to 1."""
    done: set[int] = set()
    for module in model.modules():
        if isinstance(module, StructuredModule):
            for name, value in random_factors(module.format, module.factors).items():
                getattr(module, name).copy_(value)
                done.add(id(getattr(module, name)))
    for parameter in model.parameters():
        if id(parameter) not in done:
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    return model


def random_factors(format: Format, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random factors, drawn on the device, whose matrix keeps the size of its input within a small factor.

    Args:
        format: The format.
        like: Tensors with the dtypes and the device of the factors.

    Returns:
        The factors.
    """
    if any(not spec.trainable or spec.dtype is not None for spec in format.factor_specs().values()):
        return format.init(dtype=next(iter(like.values())).dtype)
    factors = {name: torch.randn_like(tensor) / math.sqrt(tensor.shape[-1]) for name, tensor in like.items()}
    first = next(iter(factors.values()))
    x = torch.randn(4, format.N, dtype=first.dtype, device=first.device)
    size = float(format.matmul(x, factors).float().square().mean().sqrt())
    return format.scaled(factors, 1 / (math.sqrt(3) * size))
