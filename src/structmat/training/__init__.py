"""What training a structured network needs beside a training loop: groups, balance, distillation; torch alone."""

from structmat.training.balancing import balance_
from structmat.training.diagnosis import structure_warnings
from structmat.training.distillation import distill_hidden, distill_logits
from structmat.training.groups import parameter_groups
from structmat.training.learning import (
    StructureLearning,
    StructureState,
    set_sigma_,
    structure_layers,
    structure_state,
    structure_step_,
)

__all__ = [
    "StructureLearning",
    "StructureState",
    "balance_",
    "distill_hidden",
    "distill_logits",
    "parameter_groups",
    "set_sigma_",
    "structure_layers",
    "structure_state",
    "structure_step_",
    "structure_warnings",
]
