"""Figures of work that is no training, for the trackers that ``Trainer`` reports to: TensorBoard, trackio, wandb."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from structmat._progress import watched

PARTS = 100
"""The most points of the curve that shows how far one piece of work is."""


class Tracker:
    """Reports figures through the callbacks of ``Trainer``, while it is entered.

    Args:
        reporters: The names of trackers, as ``TrainingArguments.report_to`` takes them.
        folder: The folder in which TensorBoard's files get a folder ``runs``, where its own environment variable does
            not say another.
        model: The model, whose configuration the trackers keep.
        name: The name of the run.
    """

    def __init__(
        self, reporters: Sequence[str], folder: str | os.PathLike[str], model: nn.Module, name: str | None = None
    ) -> None:
        arguments: dict[str, Any] = {"output_dir": os.fspath(folder), "run_name": name, "use_cpu": True}
        self._args = TrainingArguments(report_to=list(reporters), **arguments)
        self._callbacks = [kind() for kind in get_reporting_integration_callbacks(list(reporters))]
        self._state, self._control, self._model = TrainerState(), TrainerControl(), model
        self._shown: dict[str, int] = {}
        self._watching = watched(self._see)

    def __enter__(self) -> Tracker:
        for callback in self._callbacks:
            callback.on_train_begin(self._args, self._state, self._control, model=self._model)
        self._watching.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watching.__exit__(kind, error, trace)
        for callback in self._callbacks:
            callback.on_train_end(self._args, self._state, self._control, model=self._model)

    def report(self, figures: Mapping[str, float]) -> None:
        """Report figures as the next step.

        Args:
            figures: The figures by name; names that begin with ``eval_`` are those of a measurement.
        """
        for callback in self._callbacks:
            callback.on_log(self._args, self._state, self._control, model=self._model, logs=dict(figures))
        self._state.global_step += 1

    def _see(self, title: str, share: float) -> None:
        """Report how far a piece of work is, when it is a part further than at the last time."""
        part = int(share * PARTS + 1e-6)
        if part > self._shown.get(title, -1):
            self._shown[title] = part
            self.report({f"{re.sub(r'[^a-z]+', '_', title)}_done": part / PARTS})
