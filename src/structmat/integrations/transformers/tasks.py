"""The tasks of models of transformers that can be retrained and evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from structmat import _checks


@dataclass(frozen=True)
class Task:
    """What is common to the models of one task.

    Attributes:
        loader: The class whose ``from_pretrained`` loads the models.
        models: The name of the model's class, by architecture.
    """

    loader: Any
    models: Mapping[Any, Any]


TASKS: dict[str, Task] = {
    "causal-lm": Task(AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "sequence-classification": Task(
        AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    ),
    "image-classification": Task(AutoModelForImageClassification, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
}


def task_of(model: nn.Module, task: str | None = None) -> str:
    """Find the task of a model.

    Args:
        model: A model of transformers.
        task: The task that the caller gave; None to take it from the model's class.

    Returns:
        A key of ``TASKS``.

    Raises:
        ValueError: If the given task is unknown, or the class does not tell one.
    """
    if task is not None:
        _checks.one_of(task, TASKS, "task")
        return task
    found = known_task(model)
    if found is None:
        raise ValueError(
            f"expected a model whose class tells its task, got {type(model).__name__}; pass task, one of "
            f"{', '.join(TASKS)}"
        )
    return found


def known_task(model: nn.Module) -> str | None:
    """The task that a model's class tells, a key of ``TASKS``; None where it tells none."""
    names = {kind.__name__ for kind in type(model).__mro__}  # sharding makes a subclass
    for name, known in TASKS.items():
        classes = {c for entry in known.models.values() for c in ((entry,) if isinstance(entry, str) else entry)}
        if names & classes:
            return name
    return None
