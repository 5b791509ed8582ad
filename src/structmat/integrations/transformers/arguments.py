"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from structmat.training import StructureLearning


@dataclass
class StructuredTrainingArguments(TrainingArguments):
    """The arguments of ``transformers.TrainingArguments``, and what structured networks need beside them.

    The loss is ``task_weight`` times the model's own, plus the weighted distillation losses.

    Attributes:
        structured_learning_rate: Peak learning rate of the factors of structured layers; None for ``learning_rate``.
        structure_learning_rate: Peak learning rate of the widths and locations of Gaudi-GBLR layers; None for that of
            the factors.
        structure_target: Budget of the Gaudi-GBLR layers, as a share of the dense cost; None to leave their structure
            to the optimizer alone. This and the next ones are those of ``training.StructureLearning``.
        structure_unit: What the budget counts.
        structure_rule: How widths are held to it.
        structure_shrinkage: ``lambda``.
        structure_sigma_start: Smoothing of the masks at the start; infinite for none.
        structure_sigma_end: Likewise, where its schedule ends; finite.
        structure_hard_share: Of the training, at its end, without smoothing.
        decay_embeddings: Whether embeddings have weight decay.
        balance: Whether the components of BLAST and low-rank layers are balanced before the first step.
        teacher: Name or folder of the dense model to learn from.
        teacher_dtype: Of the teacher's weights; ``"auto"`` for that of its checkpoint.
        task_weight: Of the model's own loss.
        distill_logits: Weight of the divergence from the teacher's answers.
        distill_hidden: Weight of the relative error of the hidden states behind each block.
        temperature: Of the divergence.

    Raises:
        ValueError: If a weight is negative, the temperature is not positive, or there is a teacher without a weight.
    """

    structured_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of structured layers; that of the others by default."}
    )
    structure_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of Gaudi-GBLR widths and locations."}
    )
    structure_target: float | None = field(
        default=None, metadata={"help": "Budget of Gaudi-GBLR layers, as a share of the dense cost."}
    )
    structure_unit: str = field(default="parameters", metadata={"help": "Of that budget."})
    structure_rule: str = field(default="switch", metadata={"help": "How widths are held to that budget."})
    structure_shrinkage: float = field(default=0.04, metadata={"help": "Times the learning rate: what a step takes."})
    structure_sigma_start: float = field(default=1.0, metadata={"help": "Smoothing of the masks at the start."})
    structure_sigma_end: float = field(default=100.0, metadata={"help": "Where the schedule of the smoothing ends."})
    structure_hard_share: float = field(default=0.1, metadata={"help": "Of the training, without smoothing."})
    decay_embeddings: bool = field(default=False, metadata={"help": "Whether embeddings have weight decay."})
    balance: bool = field(default=True, metadata={"help": "Whether to balance BLAST and low-rank layers first."})
    teacher: str | None = field(default=None, metadata={"help": "Name or folder of the dense model to learn from."})
    teacher_dtype: str = field(default="auto", metadata={"help": "Of the teacher's weights, 'bfloat16', say."})
    task_weight: float = field(default=1.0, metadata={"help": "Weight of the model's own loss."})
    distill_logits: float = field(default=0.0, metadata={"help": "Weight of the divergence from the teacher."})
    distill_hidden: float = field(default=0.0, metadata={"help": "Weight of the error of the hidden states."})
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits that are compared."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("task_weight", "distill_logits", "distill_hidden"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} to be at least 0, got {getattr(self, name)}")
        self.structure  # noqa: B018 - checks its settings
        if not self.temperature > 0:
            raise ValueError(f"expected a positive temperature, got {self.temperature}")
        if self.teacher is not None and not self.distills:
            raise ValueError(
                f"expected distill_logits or distill_hidden above 0 for the teacher {self.teacher!r}, got 0 for both"
            )

    @property
    def structure(self) -> StructureLearning | None:
        """How the structure of Gaudi-GBLR layers is learned; None where no budget is given."""
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
        """Whether a teacher is wanted."""
        return self.distill_logits > 0 or self.distill_hidden > 0
