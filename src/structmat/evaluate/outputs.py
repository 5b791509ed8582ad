"""What a network returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def logits_of(output: Any) -> Tensor:
    """The logits that a network returned, as a tensor or in an object."""
    return output if isinstance(output, Tensor) else output["logits"] if isinstance(output, dict) else output.logits
