"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from structmat.training import StructureLearning


@dataclass
class StructuredTrainingArguments(TrainingArguments):
    """The arguments of ``transformers.TrainingArguments``, and those of structured networks.

    The loss is ``task_weight`` times the model's own, plus the weighted distillation losses.

    Attributes:
        structured_learning_rate: The peak learning rate of the factors of structured layers; None for
            ``learning_rate``.
        structure_learning_rate: The peak learning rate of the widths and locations of Gaudi-GBLR layers; None for that
            of the factors.
        structure_target: The budget of the Gaudi-GBLR layers, as a share of the dense cost; None to leave their
            structure to the optimizer alone. The arguments from here to ``structure_hard_share`` are those of
            ``training.StructureLearning``.
        structure_unit: The unit of the budget, ``"parameters"`` or ``"multiplications"``.
        structure_rule: The rule that holds the widths to the budget.
        structure_shrinkage: The shrinkage of the widths, ``lambda``.
        structure_sigma_start: The smoothing of the masks at the start; infinite for none.
        structure_sigma_end: The smoothing of the masks at the end of its schedule; finite.
        structure_hard_share: The share of the training, at its end, that is without smoothing.
        decay_embeddings: Whether embeddings have weight decay.
        balance: Whether structured layers whose components can be balanced are balanced before the first step.
        teacher: The name or folder of the dense model to learn from.
        teacher_dtype: The dtype of the teacher's weights; ``"auto"`` for that of its checkpoint.
        task_weight: The weight of the model's own loss.
        distill_logits: The weight of the divergence from the teacher's answers.
        distill_hidden: The weight of the relative error of the hidden states behind each block.
        temperature: The temperature of the divergence, by which logits are divided.

    Raises:
        ValueError: If a weight is negative, the temperature is not positive, or there is a teacher without a weight.
    """

    structured_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of structured layers; by default, that of the other layers."},
    )
    structure_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of Gaudi-GBLR widths and locations."}
    )
    structure_target: float | None = field(
        default=None, metadata={"help": "Budget of Gaudi-GBLR layers, as a share of the dense cost."}
    )
    structure_unit: str = field(default="parameters", metadata={"help": "Unit of the budget of Gaudi-GBLR layers."})
    structure_rule: str = field(default="switch", metadata={"help": "Rule that holds widths to their budget."})
    structure_shrinkage: float = field(default=0.04, metadata={"help": "Shrinkage of a step, per learning rate."})
    structure_sigma_start: float = field(default=1.0, metadata={"help": "Smoothing of the masks at the start."})
    structure_sigma_end: float = field(default=100.0, metadata={"help": "Smoothing of the masks at the end."})
    structure_hard_share: float = field(default=0.1, metadata={"help": "Share of the training without smoothing."})
    decay_embeddings: bool = field(default=False, metadata={"help": "Whether embeddings have weight decay."})
    balance: bool = field(default=True, metadata={"help": "Whether to balance structured layers first."})
    teacher: str | None = field(default=None, metadata={"help": "Name or folder of the dense model to learn from."})
    teacher_dtype: str = field(default="auto", metadata={"help": "Dtype of the teacher's weights."})
    task_weight: float = field(default=1.0, metadata={"help": "Weight of the model's own loss."})
    distill_logits: float = field(default=0.0, metadata={"help": "Weight of the divergence from the teacher."})
    distill_hidden: float = field(default=0.0, metadata={"help": "Weight of the error of the hidden states."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the divergence."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("task_weight", "distill_logits", "distill_hidden"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} to be at least 0, got {getattr(self, name)}")
        _ = self.structure  # which checks its settings
        if not self.temperature > 0:
            raise ValueError(f"expected a positive temperature, got {self.temperature}")
        if self.teacher is not None and not self.distills:
            raise ValueError(
                f"expected distill_logits or distill_hidden above 0 for the teacher {self.teacher!r}, got 0 for both"
            )

    @property
    def structure(self) -> StructureLearning | None:
        """The settings with which Gaudi-GBLR layers learn their structure; None where no budget is given."""
        if self.structure_target is None:
            return None
        smoothing = (self.structure_sigma_start, self.structure_sigma_end)
        return StructureLearning(
            self.structure_target,
            self.structure_unit,  # pyright: ignore[reportArgumentType] - checked there
            self.structure_rule,
            self.structure_shrinkage,
            sigma=None if math.isinf(self.structure_sigma_start) else smoothing,
            hard_share=self.structure_hard_share,
        )

    @property
    def distills(self) -> bool:
        """Whether there is to be a teacher."""
        return self.distill_logits > 0 or self.distill_hidden > 0
