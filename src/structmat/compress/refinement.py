"""Refinement: a compressed block's factors are tuned so that its outputs match the dense block's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat.compress.states import Block
from structmat.compress.store import FitStore
from structmat.compress.tasks import FitBar
from structmat.fit import Fit
from structmat.network.calls import copied, moved, widened

EVALUATIONS = 10
"""How often the held-out error is measured on the way."""


@dataclass(frozen=True)
class Refinement:
    """Adam on the factors (and biases) of one block at a time, without labels.

    The loss is the squared error of the compressed block's output, which reads what the compressed blocks before it
    give it, relative to the energy of the dense block's. The best factors by held-out error are kept, the start being
    among the candidates. Batches are what a step sees: about 2,000 tokens are a good size. The defaults were chosen
    with ``benchmarks/compress_llm.py``, on stories that no reported figure uses.

    Attributes:
        steps: The number of steps for each block.
        learning_rate: The rate at the start of the cosine schedule, relative to the root mean square of each factor.
        held_out: The share of the batches that are held out, at least one.
        seed: The seed of the batches' order.

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
        """The numbers of the batches to learn from, and of those held out, spread evenly."""
        held = min(count - 1, max(1, round(self.held_out * count)))
        chosen = {(2 * k + 1) * count // (2 * held) for k in range(held)}
        return [k for k in range(count) if k not in chosen], sorted(chosen)


def refined(
    block: Block,
    fits: Mapping[str, Fit],
    targets: Sequence[Sequence[Tensor]],
    settings: Refinement,
    store: FitStore | None,
    bar: FitBar,
    cost: float = 0.0,
) -> dict[str, Fit]:
    """Tune the fits of one block.

    Args:
        block: The block; its working copy has the fits in place and is left alone.
        fits: The fits by the layers' names within the block.
        targets: The tensors that matter in the outputs of the dense block, batch by batch.
        settings: How to tune.
        store: Where finished fits are kept; None for nowhere.
        bar: The progress bar.
        cost: The multiplications that the bar counts for this.

    Returns:
        The fits, at least as good on the held-out batches; their errors are those that they had.
    """
    keys = _keys(block, fits, targets, settings) if store else {}
    if store:
        found = {
            name: store.read(keys[name], fit.format, next(iter(fit.factors.values())).device)
            for name, fit in fits.items()
        }
        kept = {name: fit for name, fit in found.items() if fit is not None}
        if len(kept) == len(fits):
            bar.skip(cost, "refinement")
            return kept
    best = _Tuning(block, fits, targets, settings).run(bar, cost)
    bar.advance(cost, "refinement")
    new = {name: fit if best is None else _updated(name, fit, best) for name, fit in fits.items()}
    if store:
        for name, fit in new.items():
            store.write(keys[name], fit)
    return new


def _keys(
    block: Block, fits: Mapping[str, Fit], targets: Sequence[Sequence[Tensor]], settings: Refinement
) -> dict[str, str]:
    """The hash of everything that each refined fit depends on."""
    states = block.states
    inputs = [state for state in states.compressed if isinstance(state, Tensor)]
    masks = [mask for one in states.masks for mask in one.masks.values()]
    own = block.working.state_dict().values()
    key = FitStore.digest(
        f"refined|{settings!r}|{sorted(fits)}", *own, *inputs, *(t for one in targets for t in one), *masks
    )
    return {name: FitStore.digest(f"{key}|{name}") for name in fits}


class _Tuning:
    """The tuning of one block: a student in float32 (or float64) that learns from the dense block's outputs."""

    def __init__(
        self, block: Block, fits: Mapping[str, Fit], targets: Sequence[Sequence[Tensor]], settings: Refinement
    ) -> None:
        self.block, self.targets, self.settings = block, targets, settings
        double = any(factor.dtype == torch.float64 for fit in fits.values() for factor in fit.factors.values())
        self.compute = torch.float64 if double else torch.float32
        self.student = copied(block.working).to(self.compute)
        self.tuned = _trainable(self.student, fits)
        self.learn, self.held = settings.split(len(targets))

    def run(self, bar: FitBar, cost: float) -> dict[str, Tensor] | None:
        """Tune, and return the best factors and biases by name; None where the start is the best."""
        settings, tensors = self.settings, list(self.tuned.values())
        best: dict[str, Tensor] | None = None
        least = start = self._held_out_error()
        if not tensors:
            return None
        optimizer, schedule = self._optimizer()
        generator = torch.Generator().manual_seed(settings.seed)
        order: list[int] = []
        for step in range(1, settings.steps + 1):
            order = order or [self.learn[k] for k in torch.randperm(len(self.learn), generator=generator).tolist()]
            with torch.enable_grad():
                grads = torch.autograd.grad(self._loss(order.pop()), tensors, allow_unused=True)
            for tensor, grad in zip(tensors, grads, strict=True):
                tensor.grad = grad  # None for what this batch does not reach
            optimizer.step()
            schedule.step()
            if step % max(1, settings.steps // EVALUATIONS) == 0 or step == settings.steps:
                error = self._held_out_error()
                if error < least:
                    least, best = error, {name: tensor.detach().clone() for name, tensor in self.tuned.items()}
            bar.advance_within(cost, step / settings.steps, "refinement")
            bar.say(f"refining, {step}/{settings.steps}, held-out error {start:.4f} -> {least:.4f}")
        return best

    def _optimizer(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Make the optimizer, each tensor with a rate that suits its size, and the schedule of the rates."""
        rate = self.settings.learning_rate
        groups = [{"params": [tensor], "lr": rate * _size(tensor)} for tensor in self.tuned.values()]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.settings.steps)

    def _loss(self, i: int) -> Tensor:
        """The relative squared error on batch ``i``, the mean over all tensors that matter."""
        block = self.block
        returned = block.call(self.student, widened(block.states.compressed[i], self.compute), i)
        losses = []
        for number, (output, expected) in enumerate(zip(block.matters(returned), self.targets[i], strict=True)):
            target = moved(expected, output.device).to(self.compute)
            losses.append(_relative(output.to(self.compute), target, block.counted_output(i, number, output)))
        return torch.stack(losses).mean()

    def _held_out_error(self) -> float:
        """The relative error on the held-out batches, the root of a mean of squares."""
        return float(torch.stack([self._loss(i) for i in self.held]).mean().sqrt())


def _trainable(student: nn.Module, fits: Mapping[str, Fit]) -> dict[str, Tensor]:
    """The factors and biases to tune by name; they alone have gradients."""
    student.requires_grad_(False)
    tuned: dict[str, Tensor] = {}
    for name, fit in fits.items():
        module = student.get_submodule(name)
        own = [*fit.factors, *(["bias"] if fit.bias is not None else [])]
        tuned |= {f"{name}.{key}": p.requires_grad_() for key, p in module.named_parameters() if key in own}
    return tuned


def _updated(name: str, fit: Fit, best: Mapping[str, Tensor]) -> Fit:
    """A fit with the tuned factors and bias."""
    factors = {key: best.get(f"{name}.{key}", factor).to(factor.dtype) for key, factor in fit.factors.items()}
    bias = None if fit.bias is None else best[f"{name}.bias"].to(fit.bias.dtype)
    return dataclasses.replace(fit, factors=factors, bias=bias)


def _size(tensor: Tensor) -> float:
    """The root mean square of a tensor, not quite 0."""
    return max(float(tensor.detach().square().mean().sqrt()), 1e-8)


def _relative(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """The squared error over the energy, on the tokens that count."""
    if mask is not None:
        output, target = output[mask], target[mask]
    energy = target.square().mean()
    return (output - target).square().mean() / energy.clamp_min(torch.finfo(energy.dtype).tiny)
