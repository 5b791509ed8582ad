"""The product of a layer of vLLM, which may have several parts that read one input, as one operator.

A compiled graph sees the operator alone, so that the way to multiply is chosen when the number of tokens is known.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat.bench import Tuning, autotune_
from structmat.formats import Format, format_from_json
from structmat.nn import StructuredLinear
from structmat.nn.linear import bucket

_LIBRARY = torch.library.Library("structmat", "FRAGMENT")
_LIBRARY.define("merged_matmul(Tensor x, Tensor[] factors, str layout, int height) -> Tensor")


def merged_matmul(x: Tensor, factors: Sequence[Tensor], layout: str, height: int) -> Tensor:
    """The products of one input with several matrices, side by side; the operator is ``structmat::merged_matmul``.

    Args:
        x: ``(..., N)``.
        factors: The factors of all parts, one part after the other.
        layout: What ``layout_of`` returns.
        height: The number of features of the output; those beyond the parts are 0.

    Returns:
        ``(..., height)``.
    """
    return torch.ops.structmat.merged_matmul(x, factors, layout, height)


def _merged_matmul(x: Tensor, factors: Sequence[Tensor], layout: str, height: int) -> Tensor:
    count, first, found = bucket(x.numel() // x.shape[-1]), 0, []
    parts, tokens = _read(layout)
    for format, names in parts:
        own = dict(zip(names, factors[first : first + len(names)], strict=True))
        first += len(names)
        algorithm = tuned(format, tokens, x.dtype, x.device)[1].get(count, "") if tokens and format.algorithms else ""
        found.append(format.matmul(x, own, algorithm))
    y = found[0] if len(found) == 1 else torch.cat(found, -1)
    return y if y.shape[-1] == height else F.pad(y, (0, height - y.shape[-1]))


_LIBRARY.impl("merged_matmul", _merged_matmul, "CompositeExplicitAutograd")


@torch.library.register_fake("structmat::merged_matmul", lib=_LIBRARY)
def _(x: Tensor, factors: Sequence[Tensor], layout: str, height: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], height)


def layout_of(formats: Sequence[Format], tokens: Sequence[int] = ()) -> str:
    """Describe the parts of a layer for the operator, as text, since it becomes part of a compiled graph.

    Args:
        formats: The format of each part.
        tokens: The numbers of tokens at which ``tuned`` measures how to multiply; none for the automatic ways. What it
            finds is no part of the text: a graph may come from a cache.

    Returns:
        The description.
    """
    return json.dumps({"parts": [format.to_json() for format in formats], "tokens": list(tokens)})


@functools.cache
def _read(layout: str) -> tuple[tuple[tuple[Format, tuple[str, ...]], ...], tuple[int, ...]]:
    """The format and the names of the factors of each part, and the numbers of tokens."""
    found = json.loads(layout)
    formats = [format_from_json(data) for data in found["parts"]]
    return tuple((format, tuple(format.factor_specs())) for format in formats), tuple(found["tokens"])


@functools.cache
def tuned(format: Format, tokens: tuple[int, ...], dtype: torch.dtype, device: Any) -> tuple[Tuning, dict[int, str]]:
    """Measure how a matrix of this format is multiplied fastest here; one that was measured is not measured again.

    Args:
        format: The format, which has several ways to multiply.
        tokens: The numbers of tokens.
        dtype: The dtype of the product.
        device: The device.

    Returns:
        The choices, which can be printed, and the ways to multiply by number of tokens.
    """
    layer = StructuredLinear(format, bias=False, dtype=dtype, device=device)
    with torch.inference_mode(False):
        tuning = autotune_(nn.Sequential(layer), tokens=tokens)  # in training mode, in which no layer becomes tiles
    return tuning, dict(layer.algorithms)
