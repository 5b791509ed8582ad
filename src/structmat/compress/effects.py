"""What a change of a network's weights does to its output, measured on a few batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat import _checks
from structmat.network.calls import call, device_of, moved, same_draws, tensors_of
from structmat.network.masks import BatchMasks, find_masks

Effect = str | Callable[[Any, Any], Tensor]
"""``"kl"``, ``"error"``, ``"auto"``, or a function of a batch and of what the network returns for it: its loss."""

EFFECTS = ("auto", "kl", "error")
"""The effects that have a name."""

NAMES = ("loss", "KL divergence", "relative squared error")
"""What is measured, for people."""


class OutputEffect:
    """How far a network's output is from what it was when this was made.

    Args:
        model: The dense network, in evaluation mode.
        batches: The inputs of one call each.
        effect: ``"kl"`` for the Kullback-Leibler divergence of the logits, in nats for each vector of them; ``"error"``
            for the squared error of all outputs relative to their energy; ``"auto"`` for the first where the network
            returns ``logits`` of two classes or more, and the second elsewhere; or a function of a batch and of what
            the network returns for it, whose mean over the batches is compared with that of the dense network.
        references: Whether to call the network for what it returns now, with which ``measure`` compares.

    Raises:
        ValueError: If the effect is unknown.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Any], effect: Effect = "auto", *, references: bool = True
    ) -> None:
        if not callable(effect):
            _checks.one_of(effect, EFFECTS, "effect")
        self.model, self.batches, self.function = model, batches, effect if callable(effect) else None
        self.masks = find_masks(model, batches, {}, {"": model})
        self.of_logits = effect == "kl" or (effect == "auto" and self._returns_logits())
        with torch.no_grad():
            self.references = [self._read(i) for i in range(len(batches))] if references else []
        self.total = max(sum(self._weight(one) for one in self.references), 1e-300)

    @property
    def name(self) -> str:
        """What is measured, for people."""
        return NAMES[0 if self.function else 1 if self.of_logits else 2]

    @torch.no_grad()
    def measure(self) -> float:
        """How far the output of the network as it is now is from what it was."""
        return float(sum(float(self.part(i)) for i in range(len(self.batches))))

    def part(self, i: int) -> Tensor:
        """What batch ``i`` adds to ``measure``."""
        now, before = self._read(i), self.references[i]
        if self.function is not None:
            return (now[0] - before[0]) / len(self.batches)
        if self.of_logits:
            return F.kl_div(now[0], before[0], reduction="sum", log_target=True) / self.total
        return torch.stack([(a - b).square().sum() for a, b in zip(now, before, strict=True)]).sum() / self.total

    def _weight(self, reference: list[Tensor]) -> float:
        """What the sum over a batch's vectors is divided by, together with that of other batches."""
        if self.function is not None:
            return 1.0
        return len(reference[0]) if self.of_logits else sum(float(one.square().sum()) for one in reference)

    @torch.no_grad()
    def _returns_logits(self) -> bool:
        return _has_logits(self._call(0))

    def _call(self, i: int) -> Any:
        """Call the network on a batch, with the same random draws each time."""
        device = device_of(self.model)
        with same_draws(i, device):
            return call(self.model, moved(self.batches[i], device))

    def vectors(self, batch: Any, returned: Any, i: int) -> list[Tensor]:
        """What matters in what the network returned for batch ``i``: the vectors that count, or a loss."""
        if self.function is not None:
            return [self.function(batch, returned)]
        if self.of_logits:
            return [_counted(_logits(returned), self.masks[i], 0).float()]
        return [_counted(tensor, self.masks[i], k).float() for k, tensor in enumerate(tensors_of(returned))]

    def _read(self, i: int) -> list[Tensor]:
        """What matters in the output of a batch: logarithms of probabilities, other outputs, or the loss."""
        vectors = self.vectors(self.batches[i], self._call(i), i)
        if self.function is not None:
            return [vectors[0].double()]
        return [vectors[0].log_softmax(-1)] if self.of_logits else vectors


def _has_logits(returned: Any) -> bool:
    logits = returned.get("logits") if isinstance(returned, Mapping) else getattr(returned, "logits", None)
    return isinstance(logits, Tensor) and logits.ndim > 1 and logits.shape[-1] > 1


def _logits(returned: Any) -> Tensor:
    """The logits in what a network returns, or its first tensor."""
    found = returned.get("logits") if isinstance(returned, Mapping) else getattr(returned, "logits", None)
    return found if isinstance(found, Tensor) else tensors_of(returned)[0]


def _counted(tensor: Tensor, masks: BatchMasks, number: int) -> Tensor:
    """The vectors ``(T, C)`` of an output that count."""
    mask = masks.counted(f">{number}", tensor)
    return tensor.reshape(-1, tensor.shape[-1]) if mask is None else tensor[mask]
