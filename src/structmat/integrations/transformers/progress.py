"""What a training prints: one bar, or plain lines in a log, and a line for each evaluation."""

from __future__ import annotations

import sys
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from structmat._progress import progress_bar
from structmat.integrations.transformers.trainer import StructuredTrainer


class Progress(TrainerCallback):
    """The steps of a training as a bar with the last loss; what an evaluation finds stays on a line of its own."""

    def __init__(self) -> None:
        self._bar: Any = None

    @classmethod
    def into(cls, trainer: StructuredTrainer) -> None:
        """Let a trainer print this instead of what ``transformers`` prints.

        Args:
            trainer: The trainer; with ``disable_tqdm`` nothing is printed.
        """
        for other in (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK):
            trainer.remove_callback(other)
        if not trainer.args.disable_tqdm:
            trainer.add_callback(cls())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar; the steps that a resumed run has done already count as done."""
        if self._bar is not None:  # the trainer starts again with smaller batches
            self._bar.close()
        self._bar = progress_bar(
            show=state.is_world_process_zero, total=state.max_steps, initial=state.global_step, desc="training"
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the steps that are done."""
        self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show a loss beside the bar, and figures of an evaluation on a line."""
        if self._bar is None or not state.is_world_process_zero:
            return
        logs = logs or {}
        if "loss" in logs:
            self._bar.set_postfix_str(f"loss {float(logs['loss']):.4g}")
        found = {name: logs[f"eval_{name}"] for name in ("loss", "accuracy") if f"eval_{name}" in logs}
        if found:
            figures = ", ".join(f"{name} {float(value):.4g}" for name, value in found.items())
            self._bar.write(f"after {state.global_step} of {state.max_steps} steps, held out: {figures}", sys.stderr)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the bar."""
        self._bar.close()
        self._bar = None
