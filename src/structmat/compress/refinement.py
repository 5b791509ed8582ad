"""Refinement: a compressed block's factors are tuned so that its outputs match the dense block's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat._ranks import Sums, current
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
    among the candidates. A step sees one batch, or several that are alike in size and come one after the other, which
    processes share: about 2,000 tokens are a good size. The defaults were chosen with ``benchmarks/compress_llm.py``,
    on stories that no reported figure uses.

    Attributes:
        steps: The number of steps for each block.
        learning_rate: The rate at the start of the cosine schedule, relative to the root mean square of each factor.
        held_out: The share of the steps' batches that are held out, at least one.
        seed: The seed of the order of the batches.
        batches: The number of batches that a step sees.

    Raises:
        ValueError: If a setting is out of range.
    """

    steps: int = 500
    learning_rate: float = 2e-3
    held_out: float = 0.1
    seed: int = 0
    batches: int = 1

    def __post_init__(self) -> None:
        _checks.positive_int(self.steps, "steps")
        _checks.positive_int(self.batches, "batches")
        if not self.learning_rate > 0:
            raise ValueError(f"expected a positive learning_rate, got {self.learning_rate}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"expected held_out to be in (0, 1), got {self.held_out}")

    def check_batches(self, count: int) -> None:
        """Check that there are enough batches.

        Args:
            count: How many there are.

        Raises:
            ValueError: If there are not enough for two steps.
        """
        if count <= self.batches:
            raise ValueError(
                f"expected at least {self.batches + 1} batches to refine on, those of one step held out, got {count}"
            )

    def passes(self, count: int) -> float:
        """The number of passes over data of a number of batches, backward ones included."""
        return 3 * self.steps * self.batches / count

    def groups(self, count: int) -> list[list[int]]:
        """The numbers of the batches of each step."""
        return [list(range(k, min(k + self.batches, count))) for k in range(0, count, self.batches)]

    def split(self, count: int) -> tuple[list[int], list[int]]:
        """The numbers of the groups of batches to learn from, and of those held out, spread evenly."""
        held = min(count - 1, max(1, round(self.held_out * count)))
        chosen = {(2 * k + 1) * count // (2 * held) for k in range(held)}
        return [k for k in range(count) if k not in chosen], sorted(chosen)


def refined(
    block: Block,
    fits: Mapping[str, Fit],
    targets: Mapping[int, Sequence[Tensor]],
    settings: Refinement,
    store: FitStore | None,
    bar: FitBar,
    cost: float = 0.0,
) -> dict[str, Fit]:
    """Tune the fits of one block.

    Args:
        block: The block; its working copy has the fits in place and is left alone.
        fits: The fits by the layers' names within the block.
        targets: The tensors that matter in the outputs of the dense block, by the number of each batch of this process.
        settings: How to tune.
        store: Where finished fits are kept; None for nowhere.
        bar: The progress bar.
        cost: The multiplications that the bar counts for this.

    Returns:
        The fits, at least as good on the held-out batches; their errors are those that they had.
    """
    keys = _keys(block, fits, targets, settings) if store else {}
    if store:
        found = current().of(
            0,
            lambda: {
                name: store.read(keys[name], fit.format, next(iter(fit.factors.values())).device)
                for name, fit in fits.items()
            },
        )
        kept = {name: fit for name, fit in found.items() if fit is not None}
        if len(kept) == len(fits):
            bar.skip(cost, "refinement")
            return kept
    best = _Tuning(block, fits, targets, settings).run(bar, cost)
    bar.advance(cost, "refinement")
    new = {name: fit if best is None else _updated(name, fit, best) for name, fit in fits.items()}
    if store and current().leads:
        for name, fit in new.items():
            store.write(keys[name], fit)
    return new


def _keys(
    block: Block, fits: Mapping[str, Fit], targets: Mapping[int, Sequence[Tensor]], settings: Refinement
) -> dict[str, str]:
    """The hash of everything that each refined fit depends on."""
    states = block.states
    read = {i: [state] if isinstance(state := states.compressed[i], Tensor) else [] for i in states.mine}
    masks = [mask for one in states.masks for mask in one.masks.values()]
    own = block.working.state_dict().values()
    data = current().merged({i: FitStore.digest("", *read[i], *targets[i]) for i in states.mine})
    key = FitStore.digest(f"refined|{settings!r}|{sorted(fits)}|{list(data.values())}", *own, *masks)
    return {name: FitStore.digest(f"{key}|{name}") for name in fits}


class _Tuning:
    """The tuning of one block: a student in float32 (or float64) that learns from the dense block's outputs."""

    def __init__(
        self, block: Block, fits: Mapping[str, Fit], targets: Mapping[int, Sequence[Tensor]], settings: Refinement
    ) -> None:
        self.block, self.targets, self.settings = block, targets, settings
        double = any(factor.dtype == torch.float64 for fit in fits.values() for factor in fit.factors.values())
        self.compute = torch.float64 if double else torch.float32
        self.student = copied(block.working).to(self.compute)
        self.tuned = _trainable(self.student, fits)
        self.groups = settings.groups(len(block.states.masks))
        self.learn, self.held = settings.split(len(self.groups))
        self.energies = self._energies()

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
            grads = self._gradients(order.pop(), tensors)
            for k, tensor in enumerate(tensors):
                tensor.grad = grads.get(k)  # None for what these batches do not reach
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

    def _energies(self) -> list[list[float]]:
        """The energy of each tensor that matters, of each group of batches."""
        own = {i: [self._energy(i, k) for k in range(len(self.targets[i]))] for i in self.block.states.mine}
        found = current().merged(own)
        return [[sum(one) for one in zip(*(found[i] for i in group), strict=True)] for group in self.groups]

    def _energy(self, i: int, number: int) -> float:
        """The energy of one tensor that matters in the dense block's output for batch ``i``, on tokens that count."""
        target = self.targets[i][number]
        mask = self.block.counted_output(i, number, target)
        return float((target if mask is None else target[mask]).double().square().sum())

    def _gradients(self, group: int, tensors: Sequence[Tensor]) -> dict[int, Tensor]:
        """The gradients of the loss on a group of batches by the tensor's number; those that it reaches."""
        sums = Sums()
        for i in self._mine(group):
            with torch.enable_grad():
                grads = torch.autograd.grad(self._loss(group, i), tensors, allow_unused=True)
            sums.add(i, {k: grad for k, grad in enumerate(grads) if grad is not None})
        return sums.total()

    def _mine(self, group: int) -> list[int]:
        """The batches of a group that this process works on, in its order."""
        wanted = set(self.groups[group])
        return [i for i in self.block.states.mine if i in wanted]

    def _loss(self, group: int, i: int) -> Tensor:
        """What batch ``i`` adds to the relative squared error of its group, the mean over all tensors that matter."""
        block = self.block
        returned = block.call(self.student, widened(block.states.compressed[i], self.compute), i)
        losses = []
        for number, (output, expected) in enumerate(zip(block.matters(returned), self.targets[i], strict=True)):
            target = moved(expected, output.device).to(self.compute)
            mask, energy = block.counted_output(i, number, output), self.energies[group][number]
            losses.append(_squared(output.to(self.compute), target, mask) / max(energy, torch.finfo(self.compute).tiny))
        return torch.stack(losses).mean()

    def _held_out_error(self) -> float:
        """The relative error on the held-out batches, the root of a mean of squares."""
        own = {i: float(self._loss(group, i)) for group in self.held for i in self._mine(group)}
        found = current().merged(own)
        return math.sqrt(sum(found.values()) / len(self.held))


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


def _squared(output: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """The sum of the squared errors on the tokens that count."""
    if mask is not None:
        output, target = output[mask], target[mask]
    return (output - target).square().sum()
