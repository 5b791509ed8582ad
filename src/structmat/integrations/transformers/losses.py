"""The losses that a training logs, which are the same whether it was interrupted or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class LossSums(TrainerCallback, ExportableState):
    """The sums of the losses since the last entry of the log and since the start, which checkpoints hold.

    ``Trainer`` counts from the step at which it resumes, so that its first entry then leaves steps out, and its mean of
    the whole training too.

    Attributes:
        sums: The sum of each loss over the steps since the last entry, by name.
        logged: The step of the last entry.
        total: The sum of the loss over the steps up to the last entry.
        first: The step from which ``total`` counts: 0, but for a checkpoint of an earlier version.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}
        self.logged, self.total, self.first = 0, 0.0, 0

    def add(self, losses: dict[str, Tensor | float], share: float = 1.0) -> None:
        """Add the losses of a batch.

        Args:
            losses: The losses by name.
            share: The weight of the batch in the mean of its step.
        """
        for name, loss in losses.items():
            own = loss.detach().float() if isinstance(loss, Tensor) else loss
            self.sums[name] = self.sums.get(name, 0.0) + own * share

    def usual(self, step: int) -> Tensor | float:
        """The loss that counts in place of one that is not finite, as in ``Trainer``: the mean since the last entry.

        Args:
            step: The number of steps that are done.

        Returns:
            The loss.
        """
        return self.sums.get("loss", 0.0) / (1 + step - self.logged)

    def take(self, step: int, gather: Callable[[Any], Any]) -> dict[str, float]:
        """The means of the losses since the last entry, which ends here.

        Args:
            step: The number of steps that are done.
            gather: The function that fetches a tensor from all processes.

        Returns:
            The means by name.
        """
        found = {name: float(torch.as_tensor(gather(total)).mean()) for name, total in self.sums.items()}
        steps, self.sums, self.logged = step - self.logged, {}, step
        self.total += found["loss"]
        return {name: total / steps for name, total in found.items()}

    def mean(self, step: int) -> float:
        """The mean of the loss over the whole training.

        Args:
            step: The number of steps that are done.

        Returns:
            The mean.
        """
        return (self.total + float(self.sums.get("loss", 0.0))) / max(1, step - self.first)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the sums from the checkpoint, or begin anew."""
        kept, name = cast("dict[str, Any]", state.stateful_callbacks), type(self).__name__
        fresh = {"sums": {}, "logged": state.global_step, "total": 0.0, "first": state.global_step}
        found = kept[name]["attributes"] if state.global_step and name in kept else fresh
        vars(self).update({**found, "sums": dict(found["sums"])})
        kept[name] = self.state()  # which ``Trainer`` expects to be there when it writes a checkpoint

    def state(self) -> dict[str, Any]:
        """The part of the callback that a checkpoint holds."""
        sums = {name: float(total) for name, total in self.sums.items()}
        return {"args": {}, "attributes": {**vars(self), "sums": sums}}
