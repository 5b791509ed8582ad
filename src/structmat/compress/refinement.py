"""Refinement: a compressed block's factors are tuned so that its outputs match the dense block's."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat.compress.tasks import FitBar, FitStore, digest
from structmat.fit import Fit
from structmat.network.calls import tensor_of, widened

EVALUATIONS = 10
"""How often the held-out error is measured on the way."""


@dataclass(frozen=True)
class Refinement:
    """Adam on the factors (and biases) of one block at a time, without labels.

    The loss is the squared error of the compressed block's output, which reads what the compressed blocks before it
    give it, relative to the energy of the dense block's. The best factors by held-out error are kept, the start being
    among the candidates. Batches are what a step sees: about 2,000 tokens are a good size.

    Attributes:
        steps: For each block.
        learning_rate: At the start of the cosine schedule, relative to the root mean square of each factor.
        held_out: Share of the batches that are held out, at least one.
        seed: Of the batches' order.

    Raises:
        ValueError: If a setting is out of range.
    """

    steps: int = 500
    learning_rate: float = 2e-3
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        _checks.positive_int(self.steps, "steps")
        if not self.learning_rate > 0:
            raise ValueError(f"expected a positive learning_rate, got {self.learning_rate}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"expected held_out to be in (0, 1), got {self.held_out}")

    def check_batches(self, count: int) -> None:
        """Check that there are enough batches.

        Args:
            count: How many there are.

        Raises:
            ValueError: If there are fewer than two.
        """
        if count < 2:
            raise ValueError(f"expected at least 2 batches to refine on, one of them held out, got {count}")

    def split(self, count: int) -> tuple[list[int], list[int]]:
        """Numbers of the batches to learn from, and of those held out, spread evenly."""
        held = min(count - 1, max(1, round(self.held_out * count)))
        chosen = {(2 * k + 1) * count // (2 * held) for k in range(held)}
        return [k for k in range(count) if k not in chosen], sorted(chosen)


def refined(
    compressed: nn.Module,
    fits: Mapping[str, Fit],
    inputs: Sequence[Any],
    targets: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    forward: Callable[[nn.Module, Any, int], Any],
    settings: Refinement,
    store: FitStore | None,
    bar: FitBar,
) -> dict[str, Fit]:
    """Tune the fits of one block.

    Args:
        compressed: The block with the fits in place; left alone.
        fits: By name within the block.
        inputs: What it reads, batch by batch.
        targets: What the dense block returns, likewise.
        masks: Which tokens count, likewise.
        forward: Calls a block on the input of a batch, given with the batch's number.
        settings: How.
        store: Where finished fits are kept; None for nowhere.
        bar: The progress bar.

    Returns:
        The fits, at least as good on the held-out batches; their errors are those that they had.
    """
    keys: dict[str, str] = {}
    if store:
        tensors = [*(i for i in inputs if isinstance(i, Tensor)), *targets, *(m for m in masks if m is not None)]
        key = digest(f"refined|{settings!r}|{sorted(fits)}", *compressed.state_dict().values(), *tensors)
        keys = {name: digest(f"{key}|{name}") for name in fits}
        found = {
            name: store.read(keys[name], fit.format, next(iter(fit.factors.values())).device)
            for name, fit in fits.items()
        }
        if all(fit is not None for fit in found.values()):
            return {name: fit for name, fit in found.items() if fit is not None}

    double = any(factor.dtype == torch.float64 for fit in fits.values() for factor in fit.factors.values())
    compute = torch.float64 if double else torch.float32
    student = copy.deepcopy(compressed).to(compute)
    factors = _trainable(student, fits)
    best = {name: tensor.detach().clone() for name, tensor in factors.items()}
    learn, held = settings.split(len(inputs))

    def loss_of(i: int) -> Tensor:
        output = tensor_of(forward(student, widened(inputs[i], compute), i))
        return _relative(output.to(compute), targets[i].to(compute), masks[i])

    def held_out_error() -> float:
        return float(torch.stack([loss_of(i) for i in held]).mean().sqrt())

    least = start = held_out_error()
    optimizer = torch.optim.Adam(
        [{"params": [t], "lr": settings.learning_rate * _size(t)} for t in factors.values()], betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    generator = torch.Generator().manual_seed(settings.seed)
    order: list[int] = []
    for step in range(settings.steps):
        order = order or [learn[k] for k in torch.randperm(len(learn), generator=generator).tolist()]
        with torch.enable_grad():
            grads = torch.autograd.grad(loss_of(order.pop()), list(factors.values()))
        for tensor, grad in zip(factors.values(), grads, strict=True):
            tensor.grad = grad
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, settings.steps // EVALUATIONS) == 0 or step + 1 == settings.steps:
            error = held_out_error()
            if error < least:
                least, best = error, {name: tensor.detach().clone() for name, tensor in factors.items()}
        bar.say(f"refining, {step + 1}/{settings.steps}, held-out error {start:.4f} -> {least:.4f}")

    new = {name: _updated(name, fit, best) if least < start else fit for name, fit in fits.items()}
    if store:
        for name, fit in new.items():
            store.write(keys[name], fit)
    return new


def _trainable(student: nn.Module, fits: Mapping[str, Fit]) -> dict[str, Tensor]:
    """The factors and biases to tune, by name, alone with gradients."""
    student.requires_grad_(False)
    factors: dict[str, Tensor] = {}
    for name, fit in fits.items():
        module = student.get_submodule(name)
        own = [*fit.factors, *(["bias"] if fit.bias is not None else [])]
        factors |= {f"{name}.{key}": p.requires_grad_() for key, p in module.named_parameters() if key in own}
    return factors


def _updated(name: str, fit: Fit, best: Mapping[str, Tensor]) -> Fit:
    factors = {key: best.get(f"{name}.{key}", factor).to(factor.dtype) for key, factor in fit.factors.items()}
    bias = None if fit.bias is None else best[f"{name}.bias"].to(fit.bias.dtype)
    return dataclasses.replace(fit, factors=factors, bias=bias)


def _size(tensor: Tensor) -> float:
    return max(float(tensor.detach().square().mean().sqrt()), 1e-8)


def _relative(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Squared error over energy, of the tokens that count."""
    if mask is not None and mask.shape == target.shape[: mask.ndim]:
        output, target = output[mask], target[mask]
    energy = target.square().mean()
    return (output - target).square().mean() / energy.clamp_min(torch.finfo(energy.dtype).tiny)
