"""Learning the structure of Gaudi-GBLR layers within ``transformers.Trainer``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from structmat.training import StructureLearning, StructureState, set_sigma_, structure_state, structure_step_


class StructureCallback(TrainerCallback, ExportableState):
    """The proximal step after every step of the optimizer, and the share of the budget in the logs.

    It needs parameter groups as ``training.parameter_groups`` makes them, of which it takes the learning rate of the
    one named ``"structure"``; ``StructuredTrainer`` has them. All that it needs to go on is in the model and in the
    state of the trainer, so that a resumed run ends where an uninterrupted one does; checkpoints hold the history too.

    Args:
        settings: How the structure is learned.
        vectors: How many vectors each layer sees in a call, by name, where multiplications are the budget's unit.

    Attributes:
        history: At each logging step its number, and the share of the dense cost that all layers and each of them have.
    """

    def __init__(self, settings: StructureLearning, vectors: Mapping[str, float] | None = None) -> None:
        self.settings, self.vectors = settings, vectors
        self.history: list[dict[str, Any]] = []
        self._last: StructureState | None = None

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

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Shrink, clamp and wrap, and set the smoothing of the next step."""
        groups = kwargs["optimizer"].param_groups
        rate = next((group["lr"] for group in groups if group.get("name") == "structure"), None)
        if rate is None:
            raise ValueError(
                "expected an optimizer with a group named 'structure', got none; use StructuredTrainer, or make the "
                "groups with structmat.training.parameter_groups"
            )
        progress = (state.global_step + 1) / state.max_steps
        self._last = structure_step_(kwargs["model"], self.settings, float(rate), progress, self.vectors)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note where the budget is."""
        if self._last is None or "loss" not in kwargs.get("logs", {}):
            return
        found = {
            "structure_share": self._last.share, "structure_dead": self._last.dead, "structure_sigma": self._last.sigma
        }  # fmt: skip
        if state.log_history:
            state.log_history[-1].update(found)
        self.history.append(
            {"step": state.global_step, **found, "layers": dict(self._last.layers), "costs": dict(self._last.costs)}
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"args": {}, "attributes": {"history": self.history}}
