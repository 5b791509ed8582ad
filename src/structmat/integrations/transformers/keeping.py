"""Evaluation before, during and after a training, so that what is saved is never worse than the start."""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from structmat.integrations.transformers.arguments import StructuredTrainingArguments
from structmat.integrations.transformers.trainer import StructuredTrainer, load_tensors_

EVALUATIONS = 5
"""How often a model is evaluated while it is trained."""

EVALUATED = {"causal-lm": 64, "sequence-classification": 256, "image-classification": 256}
"""The most examples of an evaluation while the model is trained, by task."""

BETTER = {"eval_perplexity": -1, "eval_accuracy": 1, "eval_loss": -1}
"""The figures that decide, the first that there is, and the sign of what is better."""

Figures = dict[str, float]


def spread(examples: Any, most: int) -> Any:
    """At most this many examples, taken from all over the data."""
    count = len(examples)
    return examples if count <= most else Subset(examples, [k * count // most for k in range(most)])


def apart(examples: Any, task: str) -> tuple[Any, Any]:
    """Hold examples out of those to learn from.

    Args:
        examples: The examples.
        task: The task of the model.

    Returns:
        What is left, and a sixteenth of the examples from all over the data, or at most as many as an evaluation
        takes; None where there are fewer than 32 examples.
    """
    count = len(examples)
    held = min(EVALUATED[task], count // 16)
    if held < 2:
        return examples, None
    chosen = [(2 * k + 1) * count // (2 * held) for k in range(held)]
    others = sorted(set(range(count)) - set(chosen))
    return Subset(examples, others), Subset(examples, chosen)


def evaluated_arguments(args: StructuredTrainingArguments, rows: int) -> StructuredTrainingArguments:
    """The arguments of a run that is evaluated several times, and ends with the best of its checkpoints.

    Args:
        args: The arguments as the caller gave them.
        rows: The number of examples to learn from.

    Returns:
        A copy; unchanged where the caller chose when to evaluate, or to save nothing, and where a structure is learned,
        since the loss grows with what is removed.
    """
    args = copy.copy(args)
    chosen = args.eval_strategy != IntervalStrategy.NO or args.save_strategy != SaveStrategy.STEPS
    if chosen or args.structure is not None:
        return args
    steps = args.max_steps
    if steps <= 0:
        batches = math.ceil(rows / (args.train_batch_size * args.world_size))
        steps = math.ceil(args.num_train_epochs * max(1, batches // args.gradient_accumulation_steps))
    every = max(1, math.ceil(steps / EVALUATIONS))
    args.eval_strategy = IntervalStrategy.STEPS
    args.eval_steps = args.save_steps = min(every, int(args.save_steps)) if args.save_steps >= 1 else every
    args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better = True, "loss", False
    return args


def train_and_keep_the_best(
    trainer: StructuredTrainer, checkpoint: str | None, measure: Callable[[], Figures] | None
) -> Figures:
    """Train, measure before and after, and end with the start where that is better.

    Args:
        trainer: The trainer.
        checkpoint: The checkpoint to resume from; None for none.
        measure: The function that measures the model; None where there is nothing to measure on.

    Returns:
        The figures of the training; those of the measurement, and, with ``_before`` behind their names, those of the
        start.

    Warns:
        UserWarning: If the training did not make the model better.
    """
    if measure is None:
        return dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    start = Path(str(trainer.args.output_dir)) / "start"
    keeps = trainer.args.structure is None and not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
    before = measure()
    if keeps:
        trainer.save_model(str(start))
    figures = dict(trainer.train(resume_from_checkpoint=checkpoint).metrics)
    after = measure()
    if keeps:
        if worse(after, before):
            name = deciding(before)
            warnings.warn(
                f"the training made the model worse ({name} {before[name]:.4g} before, {after[name]:.4g} after), so "
                "that the start is saved; lower the learning rate, or give more data or a teacher",
                stacklevel=3,
            )
            load_tensors_(trainer.model, str(start))  # pyright: ignore[reportArgumentType] - a model of transformers
            after = before
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            shutil.rmtree(start)
    return {**figures, **after, **{f"{name}_before": before[name] for name in BETTER if name in before}}


def deciding(figures: Mapping[str, float]) -> str:
    """The name of the figure that decides."""
    return next(name for name in BETTER if name in figures)


def worse(after: Mapping[str, float], before: Mapping[str, float]) -> bool:
    """Whether the figure that decides is worse after than before, or is no number."""
    name = deciding(before)
    return not BETTER[name] * after[name] >= BETTER[name] * before[name]
