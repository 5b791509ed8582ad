"""What training a structured network needs beside a training loop: groups, balance, distillation; torch alone."""

from structmat.training.balance import balance_
from structmat.training.distillation import distill_hidden, distill_logits
from structmat.training.groups import parameter_groups

__all__ = ["balance_", "distill_hidden", "distill_logits", "parameter_groups"]
