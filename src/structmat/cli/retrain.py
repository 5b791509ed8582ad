"""``structmat retrain``."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from structmat import _checks
from structmat.cli import models, options
from structmat.cli.calibration import length_for
from structmat.cli.output import Output, fingerprint
from structmat.cli.show import say, table
from structmat.data.sources import Source

TRAINING, TEACHER = "Training", "Teacher"


def retrain(
    model: options.Model,
    out: options.Out,
    data: Annotated[
        str, typer.Option(metavar="SOURCE", help="What to learn from: texts, or texts or images with classes.")
    ],
    evaluation: Annotated[
        str | None, typer.Option("--eval", metavar="SOURCE", help="What to measure on in the end.")
    ] = None,
    split: options.Split = None,
    eval_split: Annotated[str | None, typer.Option(help="Of --eval.", rich_help_panel=options.DATA)] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens at which texts are cut; 512 or as many as the model takes.", rich_help_panel=options.DATA
        ),
    ] = None,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed", help="Cut rows from all documents, one after the other.", rich_help_panel=options.DATA
        ),
    ] = False,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Dense model to learn from.", rich_help_panel=TEACHER)
    ] = None,
    distill_logits: Annotated[
        float | None,
        typer.Option(help="Weight of the teacher's answers; 1 with a teacher.", rich_help_panel=TEACHER),
    ] = None,
    distill_hidden: Annotated[
        float, typer.Option(help="Weight of the teacher's hidden states.", rich_help_panel=TEACHER)
    ] = 0.0,
    task_weight: Annotated[float, typer.Option(help="Weight of the model's own loss.", rich_help_panel=TEACHER)] = 1.0,
    temperature: Annotated[
        float, typer.Option(help="Divides the answers that are compared.", rich_help_panel=TEACHER)
    ] = 1.0,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", rich_help_panel=TRAINING)] = 1.0,
    steps: Annotated[int | None, typer.Option(help="Steps, whatever the epochs.", rich_help_panel=TRAINING)] = None,
    learning_rate: Annotated[float, typer.Option(help="At its peak.", rich_help_panel=TRAINING)] = 5e-4,
    batch_size: Annotated[int, typer.Option(help="Of each device.", rich_help_panel=TRAINING)] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches of a step.", rich_help_panel=TRAINING)] = 1,
    warmup: Annotated[int, typer.Option(help="Steps of growing learning rate.", rich_help_panel=TRAINING)] = 0,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", rich_help_panel=TRAINING)] = 0.01,
    schedule: Annotated[str, typer.Option(help="Of the learning rate.", rich_help_panel=TRAINING)] = "cosine",
    seed: Annotated[int, typer.Option(help="Of the order of the data.", rich_help_panel=TRAINING)] = 0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.", rich_help_panel=TRAINING)] = False,
    save_steps: Annotated[
        int, typer.Option(help="An interrupted run goes on from the last multiple.", rich_help_panel=TRAINING)
    ] = 500,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE ...",
            help="Any other field of transformers.TrainingArguments or StructuredTrainingArguments.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
) -> None:
    """Train a structured model further; interrupted, it goes on from its last checkpoint when it is run again."""
    started = time.perf_counter()
    if teacher is None and distill_logits is not None:
        raise ValueError("expected --teacher with --distill-logits")
    for name in (model, *([] if teacher is None else [teacher])):
        models.check_name(name)
    chosen: dict[str, Any] = {
        "teacher": teacher,
        "distill_logits": (1.0 if teacher is not None else 0.0) if distill_logits is None else distill_logits,
        "distill_hidden": distill_hidden,
        "task_weight": task_weight,
        "temperature": temperature,
        "num_train_epochs": epochs,
        "max_steps": -1 if steps is None else _checks.positive_int(steps, "--steps"),
        "learning_rate": learning_rate,
        "per_device_train_batch_size": _checks.positive_int(batch_size, "--batch-size"),
        "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": _checks.positive_int(accumulate, "--accumulate"),
        "warmup_steps": _checks.natural_int(warmup, "--warmup"),
        "weight_decay": weight_decay,
        "lr_scheduler_type": schedule,
        "seed": seed,
        "bf16": bf16,
        "save_steps": _checks.positive_int(save_steps, "--save-steps"),
        "save_total_limit": 2,
        "logging_steps": 10,
        "report_to": "none",
        "use_cpu": models.device_named(device).type == "cpu",
        **read_settings(settings or ()),
    }
    record = {
        "model": model,
        "data": data,
        "split": split,
        "eval": evaluation,
        "eval_split": eval_split,
        "length": length,
        "packed": packed,
        "dtype": dtype,
        **chosen,
        "model_files": fingerprint(model),
        "teacher_files": fingerprint(teacher),
        "data_files": fingerprint(Source.parse(data).name),
    }
    output = Output(out, "retrain", record, overwrite=overwrite, resume=False)
    if output.said_finished():
        return
    training = Training(model, dtype, chosen, data, evaluation, split, eval_split, length, packed)
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process alone keeps the folders
        training.run(output.partial / "run")
        return
    with output:
        run = output.partial / "run"
        done = output.recorded(run)
        figures = training.run(run) if done is None else done["figures"]
        if done is None:
            output.record({"figures": figures, "seconds": time.perf_counter() - started}, run)
        for checkpoint in run.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        output.appear(run)
    table(("figure", "value"), [(name, f"{value:.4f}") for name, value in figures.items()], right=(1,))


@dataclass(frozen=True)
class Training:
    """A training run as the command line says.

    Attributes:
        model: Folder, or name on the Hub.
        dtype: Of its weights.
        settings: Fields of ``StructuredTrainingArguments``.
        data: Source to learn from.
        evaluation: Source to measure on, or None.
        split: Of the data.
        eval_split: Of the evaluation.
        length: Tokens at which texts are cut; None for the usual.
        packed: Whether rows are cut from all documents.
    """

    model: str
    dtype: str
    settings: dict[str, Any]
    data: str
    evaluation: str | None
    split: str | None
    eval_split: str | None
    length: int | None
    packed: bool

    def run(self, folder: Path) -> dict[str, float]:
        """Train, from the last checkpoint in the folder if there is one.

        Args:
            folder: Of checkpoints, and in the end of the model.

        Returns:
            The figures.
        """
        models.library()
        from structmat.integrations.transformers.arguments import StructuredTrainingArguments  # noqa: PLC0415 - likewise
        from structmat.integrations.transformers.retraining import retrain  # noqa: PLC0415 - imports transformers

        checkpoint = last_checkpoint(folder)
        if checkpoint is not None:
            say(f"going on from {checkpoint.name}")
        args = StructuredTrainingArguments(
            output_dir=str(folder),
            resume_from_checkpoint=None if checkpoint is None else str(checkpoint),
            **self.settings,
        )
        loaded = models.load(self.model, dtype=self.dtype, device=str(args.device))
        return retrain(
            loaded,
            models.processor_of(self.model),
            self.data,
            self.evaluation,
            args,
            length=length_for(loaded.config, self.length),
            packed=self.packed,
            train_split=self.split,
            evaluation_split=self.eval_split,
        )


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written to its end: the trainer writes its state last.

    Args:
        folder: Of the run.

    Returns:
        Its folder, or None.
    """
    numbered = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if path.is_dir()}
    for number in sorted(numbered, reverse=True):
        state = numbered[number] / "trainer_state.json"
        try:
            if json.loads(state.read_text(encoding="utf-8"))["global_step"] == number:
                return numbered[number]
        except (OSError, ValueError, KeyError):
            continue
    return None


def read_settings(texts: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Read ``--set NAME=VALUE``.

    Args:
        texts: The values of the option.

    Returns:
        The fields: numbers, ``true``, ``false``, ``null`` and other JSON as such, everything else as text.

    Raises:
        ValueError: If one has no value, or names no field that can be set here.
    """
    if not texts:
        return {}
    models.library()
    from structmat.integrations.transformers.arguments import StructuredTrainingArguments  # noqa: PLC0415 - transformers

    fields = {field.name for field in dataclasses.fields(StructuredTrainingArguments) if field.init}
    fields -= {"output_dir", "resume_from_checkpoint"}
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"expected NAME=VALUE for --set, got {text!r}")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"expected --set to name a field of TrainingArguments, got {name!r}{hint}")
        try:
            found[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            found[name] = value
    return found
