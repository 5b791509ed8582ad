"""Learning the structure of Gaudi-GBLR layers within ``transformers.Trainer``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from structmat.training import (
    StructureLearning,
    StructureState,
    set_sigma_,
    structure_state,
    structure_step_,
    structure_warnings,
)

SAMPLES = 256
"""The most steps, of those that are left, at which the learning rate is looked up."""


class StructureCallback(TrainerCallback, ExportableState):
    """The proximal step after every step of the optimizer, and the share of the budget in the logs.

    It needs parameter groups as ``training.parameter_groups`` makes them, and takes the learning rate of the group
    named ``"structure"``; ``StructuredTrainer`` has these groups. Its whole state is in the model and in the state of
    the trainer, so that a resumed run ends like an uninterrupted one; checkpoints hold the history too. The first
    process warns of what ``training.structure_warnings`` finds at the start and at each logging step, once each.

    Args:
        settings: The settings of the learning.
        vectors: The number of vectors that each layer sees in a call, by name; needed if the budget counts
            multiplications.

    Attributes:
        history: One entry per logging step: its number, and the share of the dense cost of all layers and of each.
    """

    def __init__(self, settings: StructureLearning, vectors: Mapping[str, float] | None = None) -> None:
        self.settings, self.vectors = settings, vectors
        self.history: list[dict[str, Any]] = []
        self._last: StructureState | None = None
        self._warned: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the smoothing of the first step; a network that cannot learn its structure is refused here."""
        model = kwargs["model"]
        structure_state(model, self.settings.unit, self.vectors)
        set_sigma_(model, self.settings.sigma_at(state.global_step / state.max_steps))
        saved = cast("dict[str, Any]", state.stateful_callbacks or {}).get(type(self).__name__)
        if state.global_step and isinstance(saved, dict):
            self.history = list(saved["attributes"]["history"])
        self._warn(state, kwargs)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shrink, clamp and wrap, and set the smoothing of the next step."""
        groups = kwargs["optimizer"].param_groups
        rate = float(groups[_structure_group(groups)]["lr"])
        progress = (state.global_step + 1) / state.max_steps
        self._last = structure_step_(kwargs["model"], self.settings, rate, progress, self.vectors)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the share of the budget in the logs and in the history."""
        if self._last is None or "loss" not in kwargs.get("logs", {}):
            return
        share, dead, sigma = self._last.share, self._last.dead, self._last.sigma
        found = {"structure_share": share, "structure_dead": dead, "structure_sigma": sigma}
        if state.log_history:
            state.log_history[-1].update(found)
        self.history.append(
            {"step": state.global_step, **found, "layers": dict(self._last.layers), "costs": dict(self._last.costs)}
        )
        self._warn(state, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the history to the trainer's state, since otherwise only checkpoints would have it."""
        cast("dict[str, Any]", state.stateful_callbacks)[type(self).__name__] = self.state()

    def state(self) -> dict[str, Any]:
        """The part of the callback that a checkpoint holds."""
        return {"args": {}, "attributes": {"history": self.history}}

    def _warn(self, state: TrainerState, kwargs: dict[str, Any]) -> None:
        rates = rates_left(self.settings, state, kwargs["optimizer"].param_groups, kwargs.get("lr_scheduler"))
        for name, text in structure_warnings(kwargs["model"], self.settings, rates, self.vectors).items():
            if name not in self._warned and state.is_world_process_zero:
                warnings.warn(text, stacklevel=2)
            self._warned.add(name)


def _structure_group(groups: list[dict[str, Any]]) -> int:
    index = next((k for k, group in enumerate(groups) if group.get("name") == "structure"), None)
    if index is None:
        raise ValueError(
            "expected an optimizer with a group named 'structure', got none; use StructuredTrainer, or make the groups "
            "with structmat.training.parameter_groups"
        )
    return index


def rates_left(settings: StructureLearning, state: TrainerState, groups: list[dict[str, Any]], scheduler: Any) -> float:
    """Sum the learning rates of the structure from the present step to the last phase.

    Args:
        settings: The settings of the learning.
        state: The state of the trainer.
        groups: The groups of the optimizer.
        scheduler: The schedule of the learning rates. A ``LambdaLR``, as most of the trainer's schedules are, is asked
            for the rates; with others every rate is taken for the peak, which warns too little rather than too much.

    Returns:
        The sum of the rates.
    """
    index, left = _structure_group(groups), range(state.global_step, state.max_steps)
    asked = left[:: 1 + len(left) // SAMPLES]
    soft = [step for step in asked if not settings.is_hard((step + 1) / state.max_steps)]
    if isinstance(scheduler, LambdaLR):
        rates = [scheduler.base_lrs[index] * scheduler.lr_lambdas[index](step) for step in soft]
    else:
        rates = [groups[index].get("initial_lr", groups[index]["lr"])] * len(soft)
    return float(sum(rates)) * len(left) / max(1, len(asked))
