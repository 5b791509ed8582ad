"""Preconditioned L-BFGS over all factors of a batch of weights at once (Nocedal & Wright 2006, algorithm 7.4)."""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch
from torch import Tensor

MEMORY = 6
"""The number of steps that the quasi-Newton direction remembers."""

REFRESH = 20
"""The number of iterations after which the preconditioner is made anew."""

DECREASE = 1e-4
"""The share of the predicted decrease that a step has to reach (Armijo's condition)."""

SHORTEST = 1e-3
"""The shortest step that is tried; a weight for which that does not help stays where it is."""

FIRST = 0.5
"""The length of the first step, in units of the preconditioned gradient."""


class Descent(abc.ABC):
    """A loss of the factors of ``B`` weights that is quadratic in each factor; factors are vectors ``(B, n)``."""

    @abc.abstractmethod
    def loss(self, factors: Tensor) -> Tensor:
        """The loss ``(B,)`` in float64; what it takes for the gradient there is remembered."""

    @abc.abstractmethod
    def gradient(self, factors: Tensor) -> Tensor:
        """Half the gradient ``(B, n)`` at the factors for which ``loss`` was called last."""

    @abc.abstractmethod
    def refresh(self, factors: Tensor) -> None:
        """Make the preconditioner for these factors."""

    @abc.abstractmethod
    def precondition(self, gradient: Tensor) -> Tensor:
        """An approximate inverse of half the Hessian, symmetric and positive definite, times ``gradient (B, n)``."""


def descend(
    problem: Descent, factors: Tensor, iterations: int, show: Callable[[int, Tensor], None]
) -> tuple[Tensor, Tensor]:
    """Lower the loss of each weight of the batch.

    The direction is that of L-BFGS whose initial inverse Hessian is the problem's preconditioner, scaled by the last
    step. A step that does not lower a weight's loss enough is halved for that weight, so that no loss ever rises.

    Args:
        problem: The loss.
        factors: The start ``(B, n)``.
        iterations: The number of steps.
        show: A function of each step's number, from 1, and of the losses ``(B,)`` after it.

    Returns:
        The factors ``(B, n)``, and their losses after each step, ``(iterations, B)`` in float64.
    """
    memory: list[tuple[Tensor, Tensor, Tensor]] = []
    history: list[Tensor] = []
    loss = problem.loss(factors)
    gradient = problem.gradient(factors)
    for iteration in range(iterations):
        if iteration % REFRESH == 0:
            problem.refresh(factors)
        direction = _direction(problem, gradient, memory)
        slope = -inner(gradient, direction)
        new, lower, moved = _search(problem, factors, loss, direction, slope)
        change = problem.gradient(new) - gradient
        step = new - factors
        inverse = inner(step, change)
        inverse = torch.where(
            inverse > 0, 1 / inverse.where(inverse > 0, 1), 0
        )  # a pair without curvature says nothing
        stuck = not bool(moved.any())
        if stuck and not any(bool(one.any()) for _, _, one in memory):
            break
        memory = [(a, b, one.where(moved, 0)) for a, b, one in [*memory[1 - MEMORY :], (step, change, inverse)]]
        factors, loss, gradient = new, lower, gradient + change
        history.append(loss)
        show(iteration + 1, loss)
    return factors, torch.stack(history) if history else loss.new_zeros(0, len(loss))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner products ``(B,)`` of vectors ``(B, n)``."""
    return torch.linalg.vecdot(a, b)


def _direction(problem: Descent, gradient: Tensor, memory: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The inverse Hessian that the memory describes, times the gradient."""
    rest, shares = gradient.clone(), []
    for step, change, inverse in reversed(memory):
        share = inverse * inner(step, rest)
        shares.append(share)
        rest -= share[:, None] * change
    direction = problem.precondition(rest)
    if memory:
        step, change, inverse = memory[-1]
        curvature = inner(change, problem.precondition(change))
        known = (inverse > 0) & (curvature > 0)
        direction *= torch.where(known, inner(step, change) / curvature.where(known, 1), FIRST)[:, None]
    else:
        direction *= FIRST
    for (step, change, inverse), share in zip(memory, reversed(shares), strict=True):
        direction += (share - inverse * inner(change, direction))[:, None] * step
    return direction


def _search(
    problem: Descent, factors: Tensor, loss: Tensor, direction: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Halve each weight's step until it lowers the loss enough: the factors, the losses, and which weights moved."""
    length = torch.ones_like(slope)
    while True:
        new = factors - length[:, None] * direction
        lower = problem.loss(new)
        bad = ~(lower <= loss + 2 * DECREASE * length * slope) & (length > 0)
        if not bool(bad.any()):
            return new, lower, length > 0
        length = torch.where(bad, torch.where(length > SHORTEST, length / 2, 0), length)
