"""The search for what each layer gets: the least sum of predicted effects within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from structmat.compress.candidates import Candidate

Picks = dict[str, int]
"""The number of each layer's candidate."""


class Search:
    """The search for the candidates of all layers.

    Args:
        library: The candidates of each layer, the cheapest first and dense the last.
        budget: What all layers together may cost.
        sensitivity: The effect of a squared relative error of 1 of each layer alone.
    """

    def __init__(
        self, library: Mapping[str, Sequence[Candidate]], budget: float, sensitivity: Mapping[str, float]
    ) -> None:
        self.library, self.budget, self.sensitivity = library, budget, dict(sensitivity)

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
        most = max(options[-1].cost for options in self.library.values())
        return {
            name: min(
                range(len(options)),
                key=lambda k: self.sensitivity[name] / scale * options[k].error + price * options[k].cost / most,
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
