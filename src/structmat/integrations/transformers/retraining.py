"""Retraining in one call, for the three tasks."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import Dataset
from transformers import DataCollatorWithPadding, default_data_collator
from transformers.integrations.integration_utils import TensorBoardCallback, default_logdir

from structmat.data import Images, LabelledTexts, read_images, read_labelled_texts, read_texts, token_rows
from structmat.data.tokens import language_collator
from structmat.evaluate import perplexity
from structmat.integrations.transformers.arguments import StructuredTrainingArguments
from structmat.integrations.transformers.keeping import (
    EVALUATED,
    apart,
    evaluated_arguments,
    spread,
    train_and_keep_the_best,
)
from structmat.integrations.transformers.progress import Progress
from structmat.integrations.transformers.tasks import task_of
from structmat.integrations.transformers.trainer import StructuredTrainer

Data = str | Sequence[str] | LabelledTexts | Dataset[Any]
"""A source as in ``structmat.data``, texts, texts with classes, or a data set of examples that the model takes."""


def retrain(
    model: nn.Module,
    processor: Any,
    train: Data,
    evaluation: Data | None,
    args: StructuredTrainingArguments,
    *,
    task: str | None = None,
    teacher: nn.Module | None = None,
    length: int = 512,
    packed: bool = False,
    train_split: str | None = None,
    evaluation_split: str | None = None,
    augment: Callable[[Any], Any] | None = None,
) -> dict[str, float]:
    """Train a structured network further, save it, and measure it.

    The model is measured before and after, and evaluated several times in between, on at most as many examples as
    ``keeping.EVALUATED`` says. The best of these states is kept, and the start where the training made it worse. Where
    the caller chose ``eval_strategy``, or saves nothing in between, only the last state and the start are compared; a
    training that learns a structure always ends with its last state.

    Model, processor and metrics are saved in ``args.output_dir``. Under ``torchrun``, processes share the batches.

    Args:
        model: A model of transformers, for one of the three tasks.
        processor: The model's tokenizer or image processor.
        train: The training data: a source as in ``read_texts``, ``read_labelled_texts`` or ``read_images``, a list of
            texts, a ``LabelledTexts``, or a data set of the examples themselves.
        evaluation: The data to measure on, in one of the forms of ``train`` (texts for a language model); None to hold
            a sixteenth of the training data out.
        args: The settings of the training.
        task: ``"causal-lm"``, ``"sequence-classification"`` or ``"image-classification"``; None to take it from the
            model's class.
        teacher: The dense model to learn from, where ``args.teacher`` does not name it.
        length: The largest number of tokens in a row, in training and in the measurement of perplexity.
        packed: Whether rows are cut from all documents one after the other, for a language model.
        train_split: The split of the training data, of a source with several.
        evaluation_split: The split of the data to measure on, of a source with several.
        augment: A function that changes the training images, as in ``read_images``.

    Returns:
        The figures: ``train_loss`` and others of ``Trainer``, and ``eval_perplexity``, ``eval_word_perplexity``,
        ``eval_bits_per_byte`` and ``eval_tokens``, or ``eval_accuracy``, of what is saved; and those of the start that
        tell what is better, with ``_before`` behind their names.

    Raises:
        ValueError: If data does not go with the task, or a class is not one of the model's.
    """
    task = task_of(model, task)
    prepare = Preparation(task, processor, length)
    learned = prepare(train, train_split, packed=packed, augment=augment)
    if task == "causal-lm" and evaluation is not None:
        evaluation = texts_of(evaluation, evaluation_split, processor)
    held_out = None if evaluation is None else prepare(evaluation, evaluation_split)
    for examples in (learned, held_out):
        _check_classes(model, examples)
    if held_out is None:
        learned, held_out = apart(learned, task)
    trainer = StructuredTrainer(
        model,
        _arguments(args, learned, held_out),
        teacher=teacher,
        task=task,
        train_dataset=learned,
        eval_dataset=None if held_out is None else spread(held_out, EVALUATED[task]),
        data_collator=COLLATORS[task](processor),
        processing_class=processor,
        compute_metrics=None if task == "causal-lm" else _accuracy,
    )
    Progress.into(trainer)
    set_logging_folder(trainer)
    texts = texts_of(evaluation, None) if task == "causal-lm" and evaluation is not None else None
    measure = _measure(trainer, processor, texts, held_out, length)
    figures = train_and_keep_the_best(trainer, args.resume_from_checkpoint, measure)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("all", figures, combined=False)
    trainer.accelerator.wait_for_everyone()  # the folder is complete when any process returns
    return figures


def set_logging_folder(trainer: StructuredTrainer) -> None:
    """Let TensorBoard's files lie in the folder of the run, also those of the measurement before the training begins.

    Args:
        trainer: The trainer.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = os.path.join(str(trainer.args.output_dir), default_logdir())


COLLATORS: dict[str, Callable[[Any], Callable[[Any], Any]]] = {
    "causal-lm": language_collator,
    "sequence-classification": DataCollatorWithPadding,
    "image-classification": lambda processor: default_data_collator,
}
"""The function of each task that makes, of the processor, what turns examples into a batch."""


@dataclass(frozen=True)
class Preparation:
    """What turns data into examples that a model takes.

    Attributes:
        task: The task of the model.
        processor: The model's tokenizer or image processor.
        length: The number of tokens at which texts are cut.
    """

    task: str
    processor: Any
    length: int

    def __call__(
        self,
        data: Data,
        split: str | None = None,
        *,
        packed: bool = False,
        augment: Callable[[Any], Any] | None = None,
    ) -> Any:
        """Read and process.

        Args:
            data: The data, in one of the forms that ``retrain`` takes.
            split: The split, of a source with several.
            packed: Whether rows are cut from all documents one after the other, for a language model.
            augment: A function that changes images.

        Returns:
            The examples; a ``Dataset`` is returned unchanged.

        Raises:
            ValueError: If the data does not go with the task.
        """
        if isinstance(data, Dataset):
            return data
        if self.task == "causal-lm":
            return token_rows(self.processor, texts_of(data, split, self.processor), length=self.length, packed=packed)
        if self.task == "sequence-classification":
            texts = read_labelled_texts(data, split=split) if isinstance(data, str) else data
            if isinstance(texts, LabelledTexts):
                return texts.examples(self.processor, length=self.length)
        elif isinstance(data, str):
            return read_images(data, self.processor, split=split, augment=augment)
        raise ValueError(
            f"expected a source, a data set or (for texts) LabelledTexts for {self.task}, got {type(data).__name__}"
        )


def texts_of(data: Data, split: str | None, tokenizer: Any = None) -> list[str]:
    """Read the documents of a source, or return those given.

    Args:
        data: A source or documents.
        split: The split, of a source with several.
        tokenizer: The tokenizer whose chat template makes texts of chats.

    Returns:
        The documents.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(data, str):
        return read_texts(data, split=split, tokenizer=tokenizer)
    if not isinstance(data, (list, tuple)) or not all(isinstance(text, str) for text in data):
        raise ValueError(f"expected a source or a list of texts for a language model, got {type(data).__name__}")
    return list(data)


def _check_classes(model: Any, examples: Any) -> None:
    labels: list[int] = []
    if isinstance(examples, Images):
        labels = examples.labels
    elif isinstance(examples, list) and isinstance(examples[0], dict):
        labels = [example["labels"] for example in examples]
    if labels and max(labels) >= model.config.num_labels:
        raise ValueError(
            f"expected classes below the model's {model.config.num_labels}, got {max(labels)}; load the model with "
            f"num_labels={max(labels) + 1}"
        )


def _arguments(args: StructuredTrainingArguments, learned: Any, held_out: Any) -> StructuredTrainingArguments:
    """The arguments of the trainer, which are saved: those of a run without an interrupt."""
    args = copy.copy(args) if held_out is None else evaluated_arguments(args, len(learned))
    args.resume_from_checkpoint = None
    return args


def _measure(
    trainer: StructuredTrainer, processor: Any, texts: list[str] | None, held_out: Any, length: int
) -> Callable[[], dict[str, float]] | None:
    """What measures the model: on texts, or on the examples that are held out; None where there are neither."""
    if texts is not None:
        return functools.partial(_perplexities, trainer, processor, texts, length)
    return None if held_out is None else functools.partial(_evaluated, trainer, held_out)


def _evaluated(trainer: StructuredTrainer, examples: Any) -> dict[str, float]:
    """The loss on examples, with the accuracy of a classifier, or the perplexity of a language model."""
    figures = trainer.evaluate(examples)
    figures.pop("eval_model_preparation_time", None)  # the trainer tells it once, with its first evaluation
    if trainer.compute_metrics is None:
        figures["eval_perplexity"] = math.exp(min(figures["eval_loss"], 700))
    return figures


def _perplexities(trainer: StructuredTrainer, tokenizer: Any, texts: list[str], length: int) -> dict[str, float]:
    model: Any = trainer.model
    size = trainer.args.per_device_eval_batch_size
    shown = trainer.is_world_process_zero() and not trainer.args.disable_tqdm
    found = perplexity(model, tokenizer, texts, length=length, batch_size=size, progress=shown)
    return {
        "eval_perplexity": found.token,
        "eval_word_perplexity": found.word,
        "eval_bits_per_byte": found.bits_per_byte,
        "eval_tokens": found.tokens,
    }


def _accuracy(prediction: Any) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}
