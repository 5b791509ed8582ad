"""Rank-1 blocks on segments: contents by least squares, segments by what they gain, births where the residual is.

Everything works on a batch of weights. A component's segment on an axis is a cyclic run of cells of ``multiple``
entries; ``out (B, K, M)`` and ``inn (B, K, N)`` are the masks of all segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.fit.linalg import conjugate_gradients
from structmat.fit.metric import Metric

SHARES = (2, 3, 4, 6, 8, 12, 16, 24, 32)
"""The numbers of parts into which births cut each axis."""

LEAST_BIRTH = 0.5
"""The least size of a birth, relative to each component's part of the budget; smaller ones would use them all up."""

NOTHING = 1e-10
"""The relative curvature and energy below which a component counts as absent."""

POWER_ITERATIONS = 4
"""The power iterations for the best rank-1 approximation of each block of the residual."""

BISECTIONS = 20
"""The number of halvings of the interval in which the price per entry lies."""

NEAR = 1.4
"""The factor around the last move's price within which the next price is looked for first."""

BISECTIONS_NEAR = 5
"""The number of halvings of the smaller interval around the last move's price."""


@dataclass
class Segments:
    """Sums of rank-1 blocks ``left right``, one for each weight of a batch.

    Attributes:
        weights: ``(B, M, N)``.
        metric: The metric in which errors are measured, or None for the Frobenius norm.
        left: ``(B, M, K)``, zero outside the segments.
        right: ``(B, K, N)``, zero outside the segments.
        out: ``(B, K, M)``, bool.
        inn: ``(B, K, N)``, bool.
        multiple: The number of entries of each cell.
        price: The price of an entry at the last move, ``(B,)``.
    """

    weights: Tensor
    metric: Metric | None
    left: Tensor
    right: Tensor
    out: Tensor
    inn: Tensor
    multiple: int = 1
    price: Tensor | None = None

    def residual(self) -> Tensor:
        """``W - left right``, ``(B, M, N)``."""
        return self.weights - self.left @ self.right

    def times_inputs(self, matrix: Tensor) -> Tensor:
        """``matrix (B, m, N) C``."""
        return matrix if self.metric is None else matrix @ self.metric.inputs

    def times_outputs(self, matrix: Tensor) -> Tensor:
        """``G matrix (B, M, n)``."""
        return matrix if self.metric is None or self.metric.outputs is None else self.metric.outputs @ matrix

    def energies(self) -> tuple[Tensor, Tensor]:
        """``G_ii (B, M, 1)`` and ``C_jj (B, 1, N)``."""
        B, M, N = self.weights.shape
        sides = (None, None) if self.metric is None else (self.metric.outputs, self.metric.inputs)
        rows, columns = (
            self.weights.new_ones(B, n) if side is None else side.diagonal(dim1=1, dim2=2)
            for side, n in zip(sides, (M, N), strict=True)
        )
        return rows[:, :, None], columns[:, None]

    def errors(self) -> Tensor:
        """Relative errors ``(B,)``."""
        energy, loss = (
            (self.times_outputs(self.times_inputs(matrix)) * matrix).sum((1, 2))
            for matrix in (self.weights, self.residual())
        )
        return (loss.clamp_min(0) / energy.where(energy > 0, 1)).sqrt()

    def costs(self) -> Tensor:
        """The number of entries inside the segments, ``(B,)``."""
        return self.out.sum((1, 2)) + self.inn.sum((1, 2))

    # contents

    def sweep(self, step: float, iterations: int) -> None:
        """Over-relaxed conjugate-gradient steps towards the least-squares contents, of ``left`` and then ``right``."""
        rows, columns = self.energies()
        coupled = self.times_inputs(self.right)  # (B, K, N)
        gram = coupled @ self.right.mT
        self.left = self.left + step * _solved(
            lambda change: self.times_outputs(change @ gram),
            self.times_outputs(self.residual() @ coupled.mT),
            self.out.mT,
            gram.diagonal(dim1=1, dim2=2)[:, None] * rows,
            iterations,
        )
        coupled = self.times_outputs(self.left)  # (B, M, K)
        gram = coupled.mT @ self.left
        self.right = self.right + step * _solved(
            lambda change: self.times_inputs(gram @ change),
            self.times_inputs(coupled.mT @ self.residual()),
            self.inn,
            gram.diagonal(dim1=1, dim2=2)[:, :, None] * columns,
            iterations,
        )
        self.balance()

    def balance(self) -> None:
        """Give every component one size in both factors."""
        a, b = self.left.norm(dim=1), self.right.norm(dim=2)  # (B, K)
        scale = torch.where((a > 0) & (b > 0), (b / a.where(a > 0, 1)).sqrt(), 1)
        self.left = self.left * scale[:, None]
        self.right = self.right / scale[:, :, None].where(scale[:, :, None] > 0, 1)

    # segments

    def move(self, budget: Tensor) -> None:
        """Give every component the segments with the best gains, at the one price per entry that meets the budget.

        With everything else fixed, entry ``t`` of a component lowers the squared error by
        ``(correlation of the residual without the component)^2 / curvature``; the best segment is the cyclic run of
        cells whose gains exceed their price by most.

        Args:
            budget: The number of entries on both axes, ``(B,)``.
        """
        rest = self.times_outputs(self.times_inputs(self.residual()))
        rows, columns = self.energies()
        curvatures = (
            (self.times_inputs(self.right) * self.right).sum(2)[:, :, None] * rows.mT,  # (B, K, M)
            (self.times_outputs(self.left) * self.left).sum(1)[:, :, None] * columns,  # (B, K, N)
        )
        correlations = (
            (rest @ self.right.mT).mT + self.left.mT * curvatures[0],
            self.left.mT @ rest + self.right * curvatures[1],
        )
        floors = [NOTHING * curvature.amax((1, 2), keepdim=True) for curvature in curvatures]
        gains = [
            torch.where(curvature > floor, correlation.square() / curvature.where(curvature > floor, 1), 0)
            .unflatten(2, (-1, self.multiple))
            .sum(3)
            for correlation, curvature, floor in zip(correlations, curvatures, floors, strict=True)
        ]
        masks, self.price = best_segments(gains, budget // self.multiple, self.price)
        self.out, self.inn = (mask.repeat_interleave(self.multiple, 2) for mask in masks)
        self.left, self.right = self.left * self.out.mT, self.right * self.inn
        self._bury()

    def _bury(self) -> None:
        """Take away what is left of components without a block."""
        alive = (self.out.any(2) & self.inn.any(2))[:, :, None]
        self.out, self.inn = self.out & alive, self.inn & alive
        self.left, self.right = self.left * alive.mT, self.right * alive

    def bear(self, budget: Tensor, generators: Sequence[torch.Generator]) -> None:
        """Fill the budget that is left with components on blocks of the residual, those that capture most."""
        scales = [side.sqrt() for side in self.energies()]
        rest = scales[0] * self.residual() * scales[1]
        room = (budget - self.costs()).tolist()
        dead = ~self.out.any(2)
        for b in range(len(self.weights)):
            slots = dead[b].nonzero()[:, 0]
            if len(slots) and room[b] > 0:
                own = (scales[0][b], scales[1][b, 0])
                usual = int(budget[b]) / self.out.shape[1]
                self._bear_one(b, rest[b], own, slots, int(room[b]), usual, generators[b])

    def _bear_one(
        self,
        b: int,
        rest: Tensor,
        scales: tuple[Tensor, Tensor],
        slots: Tensor,
        room: int,
        usual: float,
        generator: torch.Generator,
    ) -> None:
        best: tuple[float, _Births] | None = None
        for share in SHARES:
            births = self._candidates(rest, share, len(slots), room, usual, generator)
            if births is not None and (best is None or births.captured > best[0]):
                best = births.captured, births
        if best is None:
            return
        births = best[1]
        slots = slots[: len(births.right)]
        self.out[b, slots] = births.out
        self.inn[b, slots] = births.inn
        rows, columns = (scale.where(scale > 0, 1) for scale in scales)
        self.left[b][:, slots] = births.left / rows
        self.right[b, slots] = births.right / columns

    def _candidates(
        self, rest: Tensor, share: int, slots: int, room: int, usual: float, generator: torch.Generator
    ) -> _Births | None:
        """The best rank-1 blocks of one size on a grid of ``share x share`` at a random place."""
        g = self.multiple
        cells = [n // g for n in rest.shape]
        P, Q = (count // share * g for count in cells)
        if min(P, Q) == 0 or room < P + Q or LEAST_BIRTH * usual > P + Q:
            return None
        top, leading = (g * int(torch.randint(count, (), generator=generator)) for count in cells)
        rolled = rest.roll((-top, -leading), (0, 1))[: share * P, : share * Q]
        blocks = rolled.reshape(share, P, share, Q).transpose(1, 2).reshape(share * share, P, Q)
        least = NOTHING * rest.norm().clamp_min(torch.finfo(rest.dtype).tiny / NOTHING)
        v = torch.randn(Q, 1, generator=generator).to(rest).expand(share * share, Q, 1)
        u = blocks @ v
        for _ in range(POWER_ITERATIONS):
            u = blocks @ v
            u = u / u.norm(dim=1, keepdim=True).clamp_min(least)  # stays small on blocks without a residual
            v = blocks.mT @ u
        best = v.square().sum((1, 2)).topk(min(slots, room // (P + Q), share * share))
        size = best.values.sqrt().sqrt().clamp_min(torch.finfo(rest.dtype).tiny)[:, None]
        i, j = best.indices // share, best.indices % share
        real = (best.values > NOTHING * best.values[0])[:, None]
        rows = (top + i[:, None] * P + torch.arange(P, device=rest.device)) % rest.shape[0]
        columns = (leading + j[:, None] * Q + torch.arange(Q, device=rest.device)) % rest.shape[1]
        full = rest.new_zeros(len(i), sum(rest.shape))
        left, right = full[:, : rest.shape[0]], full[:, rest.shape[0] :]
        return _Births(
            float(best.values.sum()),
            left.scatter(1, rows, u[best.indices, :, 0] * size * real).mT,
            right.scatter(1, columns, v[best.indices, :, 0] / size * real),
            (left.scatter(1, rows, 1.0) > 0) & real,
            (right.scatter(1, columns, 1.0) > 0) & real,
        )


@dataclass
class _Births:
    """New components, and how much of the residual's energy they capture."""

    captured: float
    left: Tensor
    right: Tensor
    out: Tensor
    inn: Tensor


def best_segments(gains: Sequence[Tensor], budget: Tensor, near: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """The best runs of cells of each component, at the lowest price per cell at which all of them meet the budget.

    Args:
        gains: The gain of each cell, ``(B, K, cells)`` for each axis, not negative.
        budget: The number of cells on all axes, ``(B,)``.
        near: A price to search near to, ``(B,)``; None to search everywhere.

    Returns:
        Masks ``(B, K, cells)`` of each axis (a component has runs on all axes or on none), and the price.
    """

    def spent(price: Tensor) -> Tensor:
        lengths = torch.stack([_best_run(gain - price[:, None, None])[1] for gain in gains])
        return (lengths.sum(0) * (lengths > 0).all(0)).sum(1)

    most = torch.stack([gain.amax((1, 2)) for gain in gains]).amax(0) * 1.001
    low, high, known = torch.zeros_like(most), most, torch.zeros_like(most, dtype=torch.bool)
    if near is not None:  # the price moves little from call to call
        below, above = spent(near / NEAR) > budget, spent(NEAR * near) <= budget
        low, high = torch.where(below, near / NEAR, low), torch.where(above, NEAR * near, high)
        known = below & above
    for step in range(BISECTIONS_NEAR if bool(known.all()) else BISECTIONS):
        price = (low + high) / 2
        over = spent(price) > budget
        going = ~known | (step < BISECTIONS_NEAR)
        low, high = torch.where(over & going, price, low), torch.where(~over & going, price, high)
    masks = [runs(gain - high[:, None, None]) for gain in gains]
    alive = torch.stack([mask.any(2) for mask in masks]).all(0)[:, :, None]
    return [mask & alive for mask in masks], high


def runs(values: Tensor) -> Tensor:
    """The mask of the cyclic run with the largest sum along the last dimension; nowhere if no sum is positive."""
    begin, length = _best_run(values)
    n = values.shape[-1]
    return (torch.arange(n, device=values.device) - begin[..., None]) % n < length[..., None]


def _best_run(values: Tensor) -> tuple[Tensor, Tensor]:
    """The beginning of that run, and its length."""
    n = values.shape[-1]
    sums = torch.cat([torch.zeros_like(values[..., :1]), values.cumsum(-1)], -1)
    lowest, begins = sums.cummin(-1)
    straight, end = (sums - lowest).max(-1)
    begin = begins.gather(-1, end[..., None])[..., 0]
    highest, starts = sums.cummax(-1)
    hole, hole_end = (highest - sums).max(-1)  # a run over the end is what the worst run leaves
    hole_begin = starts.gather(-1, hole_end[..., None])[..., 0]
    wraps = sums[..., -1] + hole > straight
    length = torch.where(wraps, n - (hole_end - hole_begin), end - torch.where(wraps, end, begin))
    return torch.where(wraps, hole_end % n, begin), length


def _solved(
    apply: Callable[[Tensor], Tensor], target: Tensor, mask: Tensor, diagonal: Tensor, iterations: int
) -> Tensor:
    """Conjugate-gradient steps on ``apply(x) = target`` over the entries of a mask, preconditioned by a diagonal."""
    floor = 1e-6 * diagonal.mean((1, 2), keepdim=True)
    inverse = mask / (diagonal + floor).where(diagonal + floor > 0, 1)
    return conjugate_gradients(
        lambda x: apply(x) * mask, lambda residual: residual * inverse, target * mask, iterations
    )
