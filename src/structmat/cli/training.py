"""The options of a training run."""

from __future__ import annotations

import dataclasses
import importlib
import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from structmat import _checks
from structmat._names import meant
from structmat.cli import models
from structmat.cli.fingerprints import fingerprint
from structmat.cli.options import DATA, Options
from structmat.cli.reading import WHAT, Reading
from structmat.data.sources import Source

TRAINING, TEACHER = "Training", "Teacher"


@dataclass(frozen=True)
class DataOptions(Reading):
    """What to learn from and to measure on.

    Attributes:
        data: The data to learn from.
        eval: The data to measure on; None for no measurement.
        split: The split of the data; None where it has only one.
        eval_split: The split of the data to measure on; None where it has only one.
        length: The largest number of tokens in a row; None for 512, or as many as the model takes.
        packed: Whether rows are cut from all documents joined together.
    """

    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help=f"The data to learn from: {WHAT}; for a classifier, texts or images with classes.",
        ),
    ]
    eval: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="SOURCE",
            help="The data to measure on before and after; by default a sixteenth of --data is held out.",
        ),
    ] = None
    split: Annotated[
        str | None, typer.Option(help="The split of the data, where it has several.", rich_help_panel=DATA)
    ] = None
    eval_split: Annotated[
        str | None, typer.Option(help="The split of the data of --eval, where it has several.", rich_help_panel=DATA)
    ] = None
    length: Annotated[
        int | None,
        typer.Option(
            help="The largest number of tokens in a row; by default 512, or as many as the model takes.",
            rich_help_panel=DATA,
        ),
    ] = None
    packed: Annotated[
        bool,
        typer.Option(
            "--packed",
            help="Cut rows from all documents joined together; by default a row is of one document, and a long "
            "document becomes several rows.",
            rich_help_panel=DATA,
        ),
    ] = False

    def __post_init__(self) -> None:
        for source in (self.data, self.eval):
            if source is not None:
                Source.parse(source)  # a misspelt path fails before anything is loaded

    def record(self) -> dict[str, Any]:
        """What the training depends on, as JSON-compatible data."""
        return {**super().record(), "data_files": fingerprint(Source.parse(self.data))}


@dataclass(frozen=True)
class Field:
    """What an option sets in the training arguments of transformers, where it has another name there.

    Attributes:
        name: The name of the field.
    """

    name: str


@dataclass(frozen=True)
class TeacherOptions(Options):
    """How a dense model teaches.

    Attributes:
        teacher: The dense model to learn from; None for none.
        distill_logits: The weight of the teacher's answers; None for 1 with a teacher.
        distill_hidden: The weight of the teacher's hidden states.
        task_weight: The weight of the model's own loss.
        temperature: The temperature of the answers that are compared.
    """

    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The dense model to learn from.", rich_help_panel=TEACHER)
    ] = None
    distill_logits: Annotated[
        float | None,
        typer.Option(help="The weight of the teacher's answers; by default 1 with a teacher.", rich_help_panel=TEACHER),
    ] = None
    distill_hidden: Annotated[
        float, typer.Option(help="The weight of the teacher's hidden states.", rich_help_panel=TEACHER)
    ] = 0.0
    task_weight: Annotated[float, typer.Option(help="The weight of the model's own loss.", rich_help_panel=TEACHER)] = (
        1.0
    )
    temperature: Annotated[
        float,
        typer.Option(help="The temperature that divides the answers which are compared.", rich_help_panel=TEACHER),
    ] = 1.0

    def __post_init__(self) -> None:
        if self.teacher is None and self.distill_logits is not None:
            raise ValueError("expected --teacher with --distill-logits")

    def record(self) -> dict[str, Any]:
        """The fields of the training arguments."""
        logits = float(self.teacher is not None) if self.distill_logits is None else self.distill_logits
        return {**super().record(), "distill_logits": logits}


@dataclass(frozen=True)
class TrainingOptions(Options):
    """How to train.

    Attributes:
        epochs: The number of passes over the data.
        steps: The number of steps, in place of the epochs; None for the epochs.
        learning_rate: The highest learning rate.
        batch_size: The number of rows or images in a batch of each device.
        accumulate: The number of batches in a step.
        warmup: The number of steps in which the learning rate grows, or their share below 1.
        weight_decay: The weight decay of AdamW.
        schedule: The schedule of the learning rate.
        seed: The seed of the order of the data.
        bf16: Whether to compute in bfloat16 with float32 weights.
        save_steps: The number of steps between checkpoints.
        settings: Other fields, ``NAME=VALUE`` each.
    """

    epochs: Annotated[
        float,
        typer.Option(help="The number of passes over the data.", rich_help_panel=TRAINING),
        Field("num_train_epochs"),
    ] = 1.0
    steps: Annotated[
        int | None,
        typer.Option(help="The number of steps, in place of --epochs.", rich_help_panel=TRAINING),
        Field("max_steps"),
    ] = None
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate.", rich_help_panel=TRAINING)] = 1e-4
    batch_size: Annotated[
        int,
        typer.Option(help="The number of rows or images in a batch of each device.", rich_help_panel=TRAINING),
        Field("per_device_train_batch_size"),
    ] = 8
    accumulate: Annotated[
        int,
        typer.Option(help="The number of batches in a step.", rich_help_panel=TRAINING),
        Field("gradient_accumulation_steps"),
    ] = 1
    warmup: Annotated[
        float,
        typer.Option(
            help="The number of steps in which the learning rate grows, or their share where it is below 1.",
            rich_help_panel=TRAINING,
        ),
        Field("warmup_steps"),
    ] = 0.1
    weight_decay: Annotated[float, typer.Option(help="The weight decay of AdamW.", rich_help_panel=TRAINING)] = 0.01
    schedule: Annotated[
        str,
        typer.Option(
            help="The schedule of the learning rate, such as cosine, linear or constant.", rich_help_panel=TRAINING
        ),
        Field("lr_scheduler_type"),
    ] = "cosine"
    seed: Annotated[int, typer.Option(help="The seed of the order of the data.", rich_help_panel=TRAINING)] = 0
    bf16: Annotated[
        bool,
        typer.Option("--bf16", help="Compute in bfloat16 with weights in float32.", rich_help_panel=TRAINING),
    ] = False
    save_steps: Annotated[
        int,
        typer.Option(
            help="The number of steps between checkpoints, from which an interrupted run resumes.",
            rich_help_panel=TRAINING,
        ),
    ] = 500
    settings: Annotated[
        tuple[str, ...],
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other field of transformers.TrainingArguments or StructuredTrainingArguments, repeated for "
            "several fields.",
            rich_help_panel=TRAINING,
        ),
    ] = ()

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "save_steps"):
            _checks.positive_int(getattr(self, name), f"--{name.replace('_', '-')}")
        if not self.warmup >= 0:
            raise ValueError(f"expected --warmup of at least 0, got {self.warmup}")
        if self.steps is not None:
            _checks.positive_int(self.steps, "--steps")

    def record(self) -> dict[str, Any]:
        """The fields of the training arguments."""
        hints = typing.get_type_hints(type(self), include_extras=True)
        renamed = {
            name: mark.name for name, hint in hints.items() for mark in hint.__metadata__ if isinstance(mark, Field)
        }
        own = {renamed.get(name, name): value for name, value in super().record().items() if name != "settings"}
        own["max_steps"] = -1 if self.steps is None else self.steps
        return {**own, **ALWAYS, "per_device_eval_batch_size": self.batch_size, **read_settings(self.settings)}


ALWAYS = {"save_total_limit": 2, "logging_steps": 10, "report_to": "none"}
"""The fields of the training arguments that only ``--set`` changes."""


def arguments_class() -> Any:
    """The class ``StructuredTrainingArguments``, whose module imports transformers."""
    models.library()
    return importlib.import_module("structmat.integrations.transformers.arguments").StructuredTrainingArguments


def read_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Read ``--set NAME=VALUE``.

    Args:
        texts: The values of the option.

    Returns:
        The fields: numbers, ``true``, ``false``, ``null`` and other JSON as such, anything else as text.

    Raises:
        ValueError: If one has no value, or names no field that can be set here.
    """
    if not texts:
        return {}
    fields = {field.name for field in dataclasses.fields(arguments_class()) if field.init}
    fields -= {"output_dir", "resume_from_checkpoint"}
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"expected NAME=VALUE for --set, got {text!r}")
        if name not in fields:
            raise ValueError(
                f"expected --set to name a field of TrainingArguments, got {name!r}{meant(name, sorted(fields))}"
            )
        try:
            found[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            found[name] = value
    return found
