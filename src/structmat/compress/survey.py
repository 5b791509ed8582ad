"""The survey of a network: how much each layer matters, and how its errors fall with the size of each structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat.compress.curves import Curves, stand_ins
from structmat.compress.effects import NAMES, Effect
from structmat.compress.efforts import Effort
from structmat.compress.gradients import Gradients, gradient_moments, some_of, tensors_in
from structmat.compress.spectra import Spectrum, find_spectra
from structmat.compress.store import FitStore
from structmat.compress.tasks import MethodChoice, WorkList, method_for
from structmat.formats import Format
from structmat.network.sites import Site


@dataclass(frozen=True)
class Statistics:
    """What data says of layers.

    Attributes:
        gradients: The second moments of the gradients at the outputs.
        spectra: The spectra by name; those of layers that stand for others have moments of the inputs.
        standing: The layers that stand for others, with their weights in memory, by name.
    """

    gradients: Gradients
    spectra: Mapping[str, Spectrum]
    standing: Mapping[str, Site]


class Network(Protocol):
    """The network that is surveyed, with its calibration data."""

    @property
    def model(self) -> nn.Module:
        """The dense network."""
        ...

    @property
    def batches(self) -> Sequence[Any]:
        """The calibration data."""
        ...

    def key(self) -> str:
        """The hash of the weights and the data."""
        ...

    def statistics(
        self,
        sites: Mapping[str, Site],
        standing: frozenset[str],
        effect: Effect,
        seed: int,
        *,
        effort: Effort,
        progress: bool,
    ) -> Statistics:
        """Gather what the data says of layers.

        Args:
            sites: The layers by name.
            standing: The names of the layers that stand for others.
            effect: What is measured at the output.
            seed: The seed of the labels that are drawn from the network.
            effort: How much data it takes.
            progress: Whether to show progress bars.

        Returns:
            The statistics.
        """
        ...


@dataclass(frozen=True)
class WholeNetwork:
    """A network that is in memory as a whole.

    Attributes:
        model: The dense network.
        batches: The calibration data.
        store: Where the gradients' moments are kept; None for nowhere.
    """

    model: nn.Module
    batches: Sequence[Any]
    store: FitStore | None = None

    def key(self) -> str:
        """The hash of the weights and the data."""
        return FitStore.digest("", *tensors_in(self.batches), *self.model.state_dict().values())

    def statistics(
        self,
        sites: Mapping[str, Site],
        standing: frozenset[str],
        effect: Effect,
        seed: int,
        *,
        effort: Effort,
        progress: bool,
    ) -> Statistics:
        """Gather them in a few calls for all layers at once."""
        for name, site in sites.items():
            _checks.matrix(site.matrix, (site.matrix.shape[0], site.matrix.shape[1]), f"the weight of layer {name!r}")
        how = {"effect": effect, "vectors": effort.gradients, "store": self.store, "seed": seed, "progress": progress}
        gradients = gradient_moments(self.model, self.batches, sites, **how)
        data = some_of(self.batches, effort.moments)
        spectra = find_spectra(self.model, data, sites, gradients, standing, progress=progress)
        return Statistics(gradients, spectra, {name: sites[name] for name in standing})


@dataclass(frozen=True)
class Findings:
    """What a survey finds.

    Attributes:
        sensitivity: The effect that a squared relative error of 1 of each layer alone is predicted to have.
        errors: The squared relative errors of each layer in all sizes of the first structure, then of the next.
        effect: What is measured at the output, for people.
    """

    sensitivity: Mapping[str, float]
    errors: Mapping[str, Sequence[float]]
    effect: str


@dataclass(frozen=True)
class Survey:
    """What is to be found out.

    Attributes:
        network: The dense network, with the calibration data.
        sizes: The formats of each structure that each layer could have.
        method: The method of the fits.
        effect: What is measured at the output.
        seed: The seed of the labels that are drawn from the network.
        effort: To how many layers and sizes structures are fitted, and how much data it takes.
        store: Where fits and findings are kept; None for nowhere.
    """

    network: Network
    sizes: Sequence[Mapping[str, list[Format]]]
    method: MethodChoice
    effect: Effect
    seed: int
    effort: Effort
    store: FitStore | None

    def run(self, *, progress: bool) -> Findings:
        """Find out, or read what was found before.

        Args:
            progress: Whether to show progress bars.

        Returns:
            The findings.
        """
        sites = self._sites()
        key = self._key()
        kept = None if key is None or self.store is None else self.store.read_tensors(key)
        if kept is None:
            kept = self._found(sites, progress)
            if key is not None and self.store is not None:
                self.store.write_tensors(key, kept)
        return Findings(
            {name: float(kept[f"{name}.sensitivity"]) for name in sites},
            {name: kept[f"{name}.errors"].tolist() for name in sites},
            NAMES[int(kept["effect"])],
        )

    def _sites(self) -> dict[str, Site]:
        """The layers for which there is a choice."""
        formats = {name: formats[0] for one in self.sizes for name, formats in one.items()}
        return dict(WorkList.of(self.network.model, formats, None).sites)

    def _key(self) -> str | None:
        """The hash of everything that the findings depend on; None where it cannot be told."""
        if callable(self.effect):
            return None
        formats = [(name, format) for one in self.sizes for name, own in one.items() for format in own]
        methods = [repr(method_for(format, self.chosen)) for _, format in formats]
        text = f"survey|{self.effort}|{self.effect}|{self.seed}|{formats}|{methods}"
        return FitStore.digest(f"{text}|{self.network.key()}")

    @property
    def chosen(self) -> MethodChoice:
        """The method of the fits, which that of the effort is where the caller has no choice."""
        return self.method or self.effort.curve_method

    def _found(self, sites: Mapping[str, Site], progress: bool) -> dict[str, Tensor]:
        standing = stand_ins(sites, self.effort.each)
        wanted = frozenset(standing.values())
        seen = self.network.statistics(sites, wanted, self.effect, self.seed, effort=self.effort, progress=progress)
        curves = Curves(seen.standing, seen.spectra, seen.gradients.moments, standing, self.chosen, self.store)
        errors = curves.errors(self.sizes, self.effort.sizes, progress)
        found = {"effect": torch.tensor(NAMES.index(seen.gradients.effect))}
        for name, one in seen.spectra.items():
            own = [error for structure in errors for error in structure.get(name, [])]
            found[f"{name}.errors"] = torch.tensor(own, dtype=torch.float64)
            effect = 0.5 * seen.gradients.vectors.get(name, 0.0) * one.energy
            found[f"{name}.sensitivity"] = torch.tensor(effect, dtype=torch.float64)
        return found
