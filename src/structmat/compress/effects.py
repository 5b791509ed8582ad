"""What a change of a network's weights does to its output, measured on a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat import _checks
from structmat.network.calls import call, device_of, moved, same_draws, tensors_of
from structmat.network.masks import BatchMasks, find_masks
from structmat.network.sites import Site

Effect = str | Callable[[Any, Any], Tensor]
"""``"kl"``, ``"error"``, ``"auto"``, or a function of a batch and of what the network returns for it: its loss."""

EFFECTS = ("auto", "kl", "error")
"""The effects that have a name."""


class OutputEffect:
    """How far a network's output is from what it was when this was made.

    Args:
        model: The dense network, in evaluation mode.
        batches: The inputs of one call each.
        effect: ``"kl"`` for the Kullback-Leibler divergence of the logits, in nats for each vector of them; ``"error"``
            for the squared error of all outputs relative to their energy; ``"auto"`` for the first where the network
            returns ``logits`` of two classes or more, and the second elsewhere; or a function of a batch and of what
            the network returns for it, whose mean over the batches is compared with that of the dense network.

    Raises:
        ValueError: If the effect is unknown.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], effect: Effect = "auto") -> None:
        if not callable(effect):
            _checks.one_of(effect, EFFECTS, "effect")
        self.model, self.batches, self.function = model, batches, effect if callable(effect) else None
        self.masks = find_masks(model, batches, {}, {"": model})
        self.of_logits = effect == "kl" or (effect == "auto" and _has_logits(self._call(0)))
        self.references = [self._read(i) for i in range(len(batches))]

    @property
    def name(self) -> str:
        """What is measured, for people."""
        return "loss" if self.function else "KL divergence" if self.of_logits else "relative squared error"

    @torch.no_grad()
    def measure(self) -> float:
        """How far the output of the network as it is now is from what it was."""
        parts = [self._compare(i) for i in range(len(self.batches))]
        return float(sum(part for part, _ in parts) / max(sum(whole for _, whole in parts), 1e-300))

    def _call(self, i: int) -> Any:
        """Call the network on a batch, with the same random draws each time."""
        device = device_of(self.model)
        with torch.no_grad(), same_draws(i, device):
            return call(self.model, moved(self.batches[i], device))

    def _read(self, i: int) -> list[Tensor]:
        """What matters in the output of a batch, as vectors that count."""
        returned = self._call(i)
        if self.function is not None:
            return [self.function(self.batches[i], returned).detach().double()]
        if self.of_logits:
            return [_counted(_logits(returned), self.masks[i], 0).float().log_softmax(-1)]
        return [_counted(tensor, self.masks[i], k).float() for k, tensor in enumerate(tensors_of(returned))]

    def _compare(self, i: int) -> tuple[float, float]:
        """The sum over a batch's vectors, and what it is divided by."""
        now, before = self._read(i), self.references[i]
        if self.function is not None:
            return float(now[0] - before[0]), 1.0
        if self.of_logits:
            return float(F.kl_div(now[0], before[0], reduction="sum", log_target=True)), float(len(now[0]))
        missed = sum(float((a - b).square().sum()) for a, b in zip(now, before, strict=True))
        return missed, sum(float(one.square().sum()) for one in before)


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


@contextmanager
def dense_weights(sites: Mapping[str, Site]) -> Iterator[Callable[[str, Tensor | None, Tensor | None], None]]:
    """Let the dense weights of layers be overwritten while the context is entered; then they are as before.

    Args:
        sites: The layers by name.

    Yields:
        A function of a layer's name, a weight ``(M, N)`` and a bias ``(M,)``; None for those of the dense network.
    """
    before = {name: site.matrix.detach().clone() for name, site in sites.items()}
    biases = {name: site.own_bias.detach().clone() for name, site in sites.items() if site.own_bias is not None}

    @torch.no_grad()
    def put(name: str, weight: Tensor | None, bias: Tensor | None = None) -> None:
        sites[name].matrix.copy_(before[name] if weight is None else weight)
        own = sites[name].own_bias
        if own is not None:
            own.copy_(biases[name] if bias is None else bias)

    try:
        yield put
    finally:
        for name in before:
            put(name, None, None)
