"""How good a network is on the same batches before and after a change of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from structmat.evaluate.classification import accuracy
from structmat.evaluate.language import row_loss
from structmat.network.calls import HOST, call, device_of, evaluating, moved, tensor_of

UNITS = ("perplexity", "accuracy", "output error")
"""What can be measured."""


class HeldOut:
    """Batches on which a network is measured twice.

    Perplexity is measured for a causal language model, accuracy where the batches have labels, and otherwise the
    relative error of the outputs, towards those of the first measurement.

    Args:
        batches: The batches: mappings of keyword arguments.
        causal: Whether the network is a causal language model.
    """

    def __init__(self, batches: Sequence[Mapping[str, Any]], *, causal: bool) -> None:
        self.batches = list(batches)
        self.unit = "perplexity" if causal else "accuracy" if "labels" in self.batches[0] else "output error"
        self._first: list[Tensor] = []

    def measure(self, model: nn.Module) -> float:
        """Measure a network.

        Args:
            model: The network.

        Returns:
            The perplexity per token, the accuracy, or the error of the outputs, which is 0 the first time.
        """
        if self.unit == "perplexity":
            loss, tokens = row_loss(model, self.batches)
            return math.exp(min(loss / max(tokens, 1), 700))
        if self.unit == "accuracy":
            return accuracy(model, self.batches).top1
        outputs = self._outputs(model)
        if not self._first:
            self._first = outputs
        return relative_error(outputs, self._first)

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        """What the network returns for each batch."""
        with evaluating(model):
            return [tensor_of(call(model, moved(batch, device_of(model)))).to(HOST) for batch in self.batches]


def relative_error(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """The norm of the difference of outputs from targets, relative to the norm of the targets."""
    rest = sum(
        float((one.double() - other.double()).square().sum()) for one, other in zip(outputs, targets, strict=True)
    )
    norm = sum(float(other.double().square().sum()) for other in targets)
    return math.sqrt(rest / norm) if norm > 0 else math.sqrt(rest)
