"""``structmat retrain``."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structmat import _checks
from structmat._files import read_json
from structmat._tables import print_table
from structmat.cli import models
from structmat.cli.errors import door
from structmat.cli.fingerprints import fingerprint
from structmat.cli.models import Placement
from structmat.cli.options import Model, Target, command_line
from structmat.cli.output import RECORD, STATE_SCALE, Output
from structmat.cli.push import PushOptions
from structmat.cli.reading import length_for, measured_split
from structmat.cli.show import say
from structmat.cli.tracking import TrackingOptions
from structmat.cli.training import DataOptions, TeacherOptions, TrainingOptions, arguments_class
from structmat.data.tokens import TokenRows, token_rows


def retrain(
    model: Model,
    target: Target,
    data: DataOptions,
    teacher: TeacherOptions,
    training: TrainingOptions,
    placement: Placement,
    push: PushOptions,
    tracking: TrackingOptions,
) -> None:
    """Run ``structmat retrain``."""
    started = time.perf_counter()
    push.check()
    tracking.check()
    for name in (model, *([] if teacher.teacher is None else [teacher.teacher])):
        models.check_name(name)
    settings = {"use_cpu": models.device_named(placement.device).type == "cpu"}
    settings = {**settings, **teacher.record(), **training.record()}
    files = {"model_files": fingerprint(model), "teacher_files": fingerprint(teacher.teacher)}
    options = {"model": model, **data.record(), "dtype": placement.dtype, **settings, **files}
    spelled = command_line("retrain", model, data, teacher, training, placement)
    output = Output(target.out, "retrain", options, overwrite=target.overwrite, resume=False, spelled=spelled)
    reported = {"report_to": tracking.names, "run_name": target.out.name} if tracking.names else {}
    work = Training(model, placement.dtype, {**settings, **reported}, data)
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process alone keeps the folders
        if not output.said_finished():
            work.run(output.partial / "run")
        return
    if not output.said_finished():
        with output:
            if not output.said_finished():  # by a process that has ended since, or put back
                show_figures(train(work, output, started))
    push.upload(target.out)


def show_figures(figures: Mapping[str, float]) -> None:
    """Print the figures of a training, those of the start beside those of what was saved."""
    suffix = "_before"
    rows = [
        (name, f"{figures[name + suffix]:.4f}" if name + suffix in figures else "", f"{value:.4f}")
        for name, value in figures.items()
        if not name.endswith(suffix)
    ]
    print_table(("figure", "before", "after"), rows, right=(1, 2))


def train(work: Training, output: Output, started: float) -> dict[str, float]:
    """Train, or go on with what an interrupted run left, and let the result appear.

    Args:
        work: The training run.
        output: The output, which is entered.
        started: The time at which the command began.

    Returns:
        The figures.
    """
    run = output.partial / "run"
    done = output.recorded(run)
    if done is not None:
        figures = _figures(done, run)
    else:
        clear(run)
        figures = work.run(run)
        output.record({"figures": figures, "seconds": time.perf_counter() - started}, run)
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    output.appear(run)
    return figures


def clear(run: Path) -> None:
    """Remove what an interrupted run left in its folder beside the checkpoints: half a model, temporary files."""
    for path in run.glob("*"):
        if path.is_file() or path.is_symlink():
            path.unlink()


def _figures(record: dict[str, Any], folder: Path) -> dict[str, float]:
    """The figures in the record of a run that ended before its folder moved."""
    with _checks.about(str(folder / RECORD)):
        figures = _checks.fields(record, {"figures": dict}, "the record of a training")["figures"]
        return _checks.values(figures, float, "'figures' of the record")


@dataclass(frozen=True)
class Training:
    """A training run.

    Attributes:
        model: A folder, or a name on the Hub.
        dtype: The dtype of the weights.
        settings: Fields of ``StructuredTrainingArguments``.
        data: What to learn from and to measure on.
    """

    model: str
    dtype: str
    settings: dict[str, Any]
    data: DataOptions

    def run(self, folder: Path) -> dict[str, float]:
        """Train, from the last checkpoint in the folder if there is one.

        Args:
            folder: The folder of checkpoints, and in the end of the model.

        Returns:
            The figures.
        """
        checkpoint = last_checkpoint(folder)
        if checkpoint is not None:
            say(f"going on from {checkpoint.name}")
        args = self.arguments(folder, checkpoint)
        loaded = models.load(self.model, Placement(self.dtype, str(args.device)))
        processor, length = models.processor_of(self.model), length_for(loaded.config, self.data.length)
        retraining = importlib.import_module("structmat.integrations.transformers.retraining")
        tasks = importlib.import_module("structmat.integrations.transformers.tasks")
        train, held_out = self.data.data, self.data.eval
        if tasks.task_of(loaded) == "causal-lm":
            train, held_out = self.rows(processor, length), self.held_out(processor)
        splits = {"train_split": self.data.split, "evaluation_split": self.data.eval_split}
        return retraining.retrain(loaded, processor, train, held_out, args, length=length, **splits)

    def rows(self, tokenizer: Any, length: int) -> TokenRows:
        """The rows to learn from, of which the user is told.

        Args:
            tokenizer: The tokenizer.
            length: The largest number of tokens in a row.

        Returns:
            The rows.
        """
        texts = self.data.texts(self.data.data, split=self.data.split, tokenizer=tokenizer)
        rows = TokenRows(token_rows(tokenizer, texts, length=length, packed=self.data.packed))
        say(f"learning from {rows.size}")
        return rows

    def held_out(self, tokenizer: Any) -> list[str] | None:
        """The texts to measure on; None where the user names none."""
        source = self.data.eval
        if source is None:
            return None
        split = measured_split(source, self.data.eval_split)
        return self.data.texts(source, split=split, tokenizer=tokenizer)

    def arguments(self, folder: Path, checkpoint: Path | None) -> Any:
        """The training arguments.

        Args:
            folder: The folder of checkpoints.
            checkpoint: The one to resume from; None for the start.

        Returns:
            A ``StructuredTrainingArguments``.
        """
        places: dict[str, Any] = {"output_dir": str(folder), "disable_tqdm": False}
        places["resume_from_checkpoint"] = None if checkpoint is None else str(checkpoint)
        with door("transformers", "options of the training, --set included, that transformers takes"):
            return arguments_class()(**{**places, **self.settings})


def last_checkpoint(folder: Path) -> Path | None:
    """Find the last checkpoint that was written to its end: the trainer writes its state last.

    Args:
        folder: The folder of the run.

    Returns:
        The checkpoint's folder; None where there is none.
    """
    folders = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    numbered = {int(path.name[11:]): path for path in folders if re.fullmatch(r"checkpoint-\d{1,18}", path.name)}
    for number in sorted(numbered, reverse=True):
        state = numbered[number] / "trainer_state.json"
        try:
            found = read_json(state, "the state of a trainer", scale=STATE_SCALE)
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("global_step") == number:
            return numbered[number]
    return None
