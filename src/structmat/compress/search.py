"""The search for what each layer gets: single layers are probed, sizes chosen, exchanges tried on the joint effect."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from structmat._progress import progress_bar
from structmat.compress.candidates import Candidate
from structmat.compress.effects import Effect, OutputEffect, dense_weights
from structmat.network.sites import find_sites

LEAST_SLOPE = 0.05
"""The least share of a sensitivity that is believed when it is measured again, since differences are small there."""

PROBED = 0.5
"""The level at which the effect of one layer alone is measured."""

Picks = dict[str, int]
"""The number of each layer's candidate."""


class Search:
    """The search for the candidates of all layers.

    Args:
        model: The network.
        batches: What effects are measured on.
        library: The candidates of each layer, the cheapest first and dense the last.
        budget: What all layers together may cost.
        effect: What is measured.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        library: Mapping[str, Sequence[Candidate]],
        budget: float,
        effect: Effect,
    ) -> None:
        self.library, self.budget = library, budget
        by_name = {name: site for site in find_sites(model).values() for name in site.names}
        self.sites = {name: by_name[name] for name in library}
        self.output = OutputEffect(model, batches, effect)
        self.sensitivity: dict[str, float] = {}
        self.measured = 0.0

    def run(self, rounds: int, exchanges: int, seed: int, progress: bool) -> Picks:
        """Probe and choose, again within the compressed network, and exchange.

        Args:
            rounds: How often all layers are probed within the compressed network.
            exchanges: How many exchanges are tried.
            seed: The seed of the exchanges.
            progress: Whether to show a progress bar.

        Returns:
            The numbers of the candidates.
        """
        total = (1 + rounds) * len(self.library) + exchanges
        bar = progress_bar(desc="allocate", unit="call", total=total, show=progress)
        with bar, dense_weights(self.sites) as put:

            def show(name: str, pick: int) -> None:
                fit = self.library[name][pick].fit
                put(name, None if fit is None else fit.format.to_dense(fit.factors), None if fit is None else fit.bias)

            for name in self.library:
                self.sensitivity[name] = self._probe(name, show)
                bar.update()
            picks = self.best()
            self.measured = self._joint(picks, show)
            for _ in range(rounds):
                picks = self._again(picks, show, bar)
            picker = random.Random(seed)
            for _ in range(exchanges):
                picks = self._exchanged(picks, picker, show)
                bar.update()
                bar.set_postfix_str(f"{self.output.name} {self.measured:.4g}", refresh=False)
        return picks

    def _probe(self, name: str, show: Callable[[str, int], None]) -> float:
        """The effect of one layer alone for a squared relative error of 1."""
        options = self.library[name]
        probed = min(range(len(options) - 1), key=lambda k: abs(options[k].cost / options[-1].cost - PROBED), default=0)
        error = options[probed].error
        if error <= 0:
            return 0.0
        show(name, probed)
        effect = self.output.measure()
        show(name, len(options) - 1)
        return max(effect, 0.0) / error

    def _joint(self, picks: Picks, show: Callable[[str, int], None]) -> float:
        """The effect of all layers together, which then are in the network."""
        for name, pick in picks.items():
            show(name, pick)
        return self.output.measure()

    def _again(self, picks: Picks, show: Callable[[str, int], None], bar: Any) -> Picks:
        """Choose again, by sensitivities that are halfway to those within the compressed network.

        Halfway is the geometric mean. What is measured is the change of the joint effect when one layer alone becomes
        two sizes larger, or smaller where it is dense.

        Args:
            picks: What was chosen, which is in the network.
            show: Puts a candidate of a layer into the network.
            bar: The progress bar.

        Returns:
            The better one of both choices, which is in the network.
        """
        before = dict(self.sensitivity)
        for name, pick in picks.items():
            options = self.library[name]
            other = min(pick + 2, len(options) - 1) if pick < len(options) - 1 else max(pick - 2, 0)
            step = options[pick].error - options[other].error
            if step:
                show(name, other)
                slope = (self.measured - self.output.measure()) / step
                show(name, pick)
                self.sensitivity[name] = (before[name] * max(slope, LEAST_SLOPE * before[name])) ** 0.5
            bar.update()
        new = self.best()
        effect = self._joint(new, show)
        if effect < self.measured:
            self.measured = effect
            return new
        self.sensitivity = before
        self._joint(picks, show)
        return picks

    def best(self) -> Picks:
        """The candidates with the least sum of predicted effects within the budget.

        At a price for the cost each layer has its own best candidate, and the price is the least that holds the budget.
        What is left of it buys, again and again, the improvement that gains most for its cost.

        Returns:
            The numbers of the candidates.
        """
        low, high = 0.0, 1.0
        while self.cost(self._at(high)) > self.budget:
            high *= 2
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(self._at(middle)) > self.budget else (low, middle)
        picks = self._at(high)
        while True:
            left = self.budget - self.cost(picks)
            gains = [
                (self._gain(name, pick, k), name, k) for name, pick in picks.items() for k in self._above(name, pick)
            ]
            possible = [(gain, name, k) for gain, name, k in gains if self._more(name, picks[name], k) <= left]
            if not possible:
                return picks
            _, name, k = max(possible)
            picks[name] = k

    def _at(self, price: float) -> Picks:
        """Each layer's best candidate at a price; the scale is that of the largest effect."""
        scale = max(self.sensitivity.values(), default=1.0) or 1.0
        dense = {name: options[-1].cost for name, options in self.library.items()}
        return {
            name: min(
                range(len(options)),
                key=lambda k: (
                    self.sensitivity[name] / scale * options[k].error + price * options[k].cost / max(dense.values())
                ),
            )
            for name, options in self.library.items()
        }

    def _above(self, name: str, pick: int) -> range:
        return range(pick + 1, len(self.library[name]))

    def _more(self, name: str, old: int, new: int) -> float:
        """What another candidate costs more."""
        return self.library[name][new].cost - self.library[name][old].cost

    def _gain(self, name: str, old: int, new: int) -> float:
        """How much smaller the predicted effect of a layer gets, for each unit of cost."""
        options = self.library[name]
        better = self.sensitivity[name] * (options[old].error - options[new].error)
        return better / max(self._more(name, old, new), 1e-12)

    def cost(self, picks: Picks) -> float:
        """What the candidates cost together."""
        return sum(self.library[name][pick].cost for name, pick in picks.items())

    def _exchanged(self, picks: Picks, picker: random.Random, show: Callable[[str, int], None]) -> Picks:
        """Raise one layer or two by a size, lower others until the budget holds; kept if the joint effect falls."""
        new = dict(picks)
        raised = picker.sample(sorted(new), min(len(new), picker.choice((1, 1, 2))))
        for name in raised:
            new[name] = min(new[name] + 1, len(self.library[name]) - 1)
        while self.cost(new) > self.budget:
            lower = [name for name, pick in new.items() if pick and name not in raised]
            if not lower:
                return picks
            new[picker.choice(lower)] -= 1
        changed = [name for name, pick in new.items() if pick != picks[name]]
        for name in changed:
            show(name, new[name])
        effect = self.output.measure() if changed else self.measured
        if effect < self.measured:
            self.measured = effect
            return new
        for name in changed:
            show(name, picks[name])
        return picks
