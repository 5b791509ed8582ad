"""Accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from structmat.network.calls import call, device_of, evaluating, moved, tensor_of


@dataclass(frozen=True)
class Accuracy:
    """How often the most probable class is the right one.

    Attributes:
        correct: The number of examples whose most probable class is the right one.
        examples: The number of all examples.
    """

    correct: int
    examples: int

    @property
    def top1(self) -> float:
        """The share of right answers."""
        return self.correct / self.examples

    def __str__(self) -> str:
        return f"accuracy {self.top1:.4f} ({self.correct:,} of {self.examples:,})"


def accuracy(model: nn.Module, batches: Iterable[Mapping[str, Any] | tuple[Any, Any] | list[Any]]) -> Accuracy:
    """Count the right answers of a classifier of images or texts.

    Args:
        model: A network that returns logits ``(B, classes)``, or an object that has them.
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
            inputs, labels = _split(batch)
            logits = tensor_of(call(model, moved(inputs, device)), ["logits"])
            if logits.shape[:-1] != labels.shape:
                raise ValueError(f"expected logits ({len(labels)}, classes), got shape {tuple(logits.shape)}")
            correct += int((logits.argmax(-1) == labels.to(logits.device)).sum())
            examples += labels.numel()
    if not examples:
        raise ValueError("expected at least one example, got none")
    return Accuracy(correct, examples)


def _split(batch: Any) -> tuple[Any, Tensor]:
    """The inputs and the labels of a batch."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise ValueError(f"expected a batch with 'labels', got {', '.join(map(repr, batch))}")
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    raise TypeError(f"expected a mapping or a pair (inputs, labels) as batch, got {type(batch).__name__}")
