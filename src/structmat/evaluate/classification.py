"""Accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from structmat.evaluate.outputs import logits_of
from structmat.network.calls import call, device_of, evaluating, moved


@dataclass(frozen=True)
class Accuracy:
    """How often the most probable class is the right one.

    Attributes:
        correct: How often.
        examples: Of how many.
    """

    correct: int
    examples: int

    @property
    def top1(self) -> float:
        """The share."""
        return self.correct / self.examples

    def __str__(self) -> str:
        return f"accuracy {self.top1:.4f} ({self.correct:,} of {self.examples:,})"


def accuracy(model: nn.Module, batches: Iterable[Mapping[str, Any] | tuple[Any, Any] | list[Any]]) -> Accuracy:
    """Count the right answers of a classifier of images or texts.

    Args:
        model: Returns logits ``(B, classes)``, or an object that has them.
        batches: Mappings of keyword arguments with the classes ``(B,)`` under ``"labels"``, or pairs
            ``(inputs, classes)``; a ``DataLoader``, say.

    Returns:
        The counts.

    Raises:
        TypeError: If a batch is neither.
        ValueError: If there is no example, a batch has no labels, or the logits have another shape.
    """
    correct = examples = 0
    device = device_of(model)
    with evaluating(model):
        for batch in batches:
            if isinstance(batch, Mapping):
                if "labels" not in batch:
                    raise ValueError(f"expected a batch with 'labels', got {', '.join(map(repr, batch))}")
                labels = batch["labels"]
                inputs = {name: value for name, value in batch.items() if name != "labels"}
            elif isinstance(batch, (tuple, list)) and len(batch) == 2:
                inputs, labels = batch
            else:
                raise TypeError(f"expected a mapping or a pair (inputs, labels) as batch, got {type(batch).__name__}")
            logits = logits_of(call(model, moved(inputs, device)))
            if logits.shape[:-1] != labels.shape:
                raise ValueError(f"expected logits ({len(labels)}, classes), got shape {tuple(logits.shape)}")
            correct += int((logits.argmax(-1) == labels.to(logits.device)).sum())
            examples += labels.numel()
    if not examples:
        raise ValueError("expected at least one example, got none")
    return Accuracy(correct, examples)
