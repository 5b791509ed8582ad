"""What a layer's weight is like under its metric: its energy, and how fast the errors of low-rank matrices fall."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structmat._progress import progress_bar
from structmat._ranks import current
from structmat.compress.calibration import calibrate
from structmat.compress.gradients import Gradients
from structmat.fit.linalg import factorize
from structmat.fit.moments import Moments
from structmat.formats import LowRank
from structmat.network.calls import call, device_of, evaluating, moved, undisturbed
from structmat.network.capture import shared_inputs
from structmat.network.sites import Site

MOMENT_BYTES = 2 * 2**30
"""The most memory for second moments at a time; where all take more, the network is called once for each part."""

TYPICAL = 0.5
"""The share of the weight's parameters that the low-rank matrices have by whose errors layers are compared."""


@dataclass(frozen=True)
class Spectrum:
    """A weight under its metric.

    Attributes:
        energy: ``tr(G W C W^T)``.
        tails: The squared relative error of the best approximation of each rank, from 0 on.
        shape: ``(M, N)``.
        moments: The moments of the inputs; None where they are not kept.
    """

    energy: float
    tails: tuple[float, ...]
    shape: tuple[int, int]
    moments: Moments | None = None

    def tail(self, share: float) -> float:
        """The squared relative error of a low-rank matrix with a share of the weight's parameters."""
        M, N = self.shape
        return self.tails[min(int(share * M * N / (M + N)), len(self.tails) - 1)]


def find_spectra(
    model: nn.Module,
    batches: Sequence[Any],
    sites: Mapping[str, Site],
    gradients: Gradients,
    keep_moments: frozenset[str],
    *,
    progress: bool = True,
) -> dict[str, Spectrum]:
    """Gather the moments of layers' inputs, part by part, and decompose their weights.

    Args:
        model: The dense network.
        batches: The calibration data.
        sites: The layers by name.
        gradients: The second moments of the gradients at their outputs.
        keep_moments: The layers whose moments are wanted afterwards.
        progress: Whether to show progress bars.

    Returns:
        The spectrum of each layer by name.
    """
    found: dict[str, Spectrum] = {}
    for part in memory_parts(model, batches, sites):
        shapes = {name: sites[name].matrix.shape for name in part}
        calibration = calibrate(
            model, batches, {n: LowRank(M, N, 1) for n, (M, N) in shapes.items()}, progress=progress
        )
        bar = progress_bar(desc="decompose", unit="layer", total=len(part), show=progress)
        with bar:
            found |= decomposed(part, sites, calibration, gradients, keep_moments, bar.update)
    return {name: found[name] for name in sites}


def decomposed(
    names: Sequence[str],
    sites: Mapping[str, Site],
    inputs: Mapping[str, Moments],
    gradients: Gradients,
    keep_moments: frozenset[str],
    step: Callable[[], object],
) -> dict[str, Spectrum]:
    """Decompose weights, each in one of the processes.

    Args:
        names: The names of the layers.
        sites: The layers by name.
        inputs: The moments of their inputs by name.
        gradients: The second moments of the gradients at their outputs.
        keep_moments: The layers whose moments are wanted afterwards.
        step: Called after each layer.

    Returns:
        The spectra by name.
    """
    found: dict[str, Spectrum] = {}

    def one(k: int) -> Spectrum:
        made = spectrum(sites[names[k]], inputs[names[k]], gradients.moments.get(names[k]))
        return dataclasses.replace(made, moments=None)  # which all processes have

    costs = [spectrum_cost(*sites[name].matrix.shape) for name in names]
    for name, made in zip(names, current().dealt(costs, one), strict=True):
        found[name] = dataclasses.replace(made, moments=inputs[name]) if name in keep_moments else made
        step()
    return found


def spectrum_cost(M: int, N: int) -> float:
    """About how many multiplications the decomposition of a weight takes, those of an eigensolver counting tenfold."""
    return N**3 + M * N * (M + N) + 10 * min(M, N) ** 3


def memory_parts(model: nn.Module, batches: Sequence[Any], sites: Mapping[str, Site]) -> Iterator[list[str]]:
    """Divide layers into parts whose moments fit into memory; layers that read the same input are in one part.

    Args:
        model: The dense network.
        batches: The calibration data.
        sites: The layers by name.

    Yields:
        The names of the layers of each part.
    """
    device = device_of(model)
    with undisturbed(), evaluating(model):
        leaders = shared_inputs(sites, (functools.partial(call, model, moved(batch, device)) for batch in batches))[0]
    part: list[str] = []
    held = 0
    for leader in dict.fromkeys(leaders[name] for name in sites):
        size = 2 * 8 * sites[leader].matrix.shape[1] ** 2
        if part and held + size > MOMENT_BYTES:
            yield part
            part, held = [], 0
        part += [name for name in sites if leaders[name] == leader]
        held += size
    if part:
        yield part


@torch.no_grad()
def spectrum(site: Site, moments: Moments, gradient_moment: Tensor | None) -> Spectrum:
    """Decompose a weight under its metric.

    Args:
        site: The layer.
        moments: The moments of its inputs.
        gradient_moment: ``G (M, M)``; None for the identity.

    Returns:
        The spectrum.
    """
    weight = site.matrix.detach()
    _, second = moments.problem(weight, centred=site.own_bias is not None)
    right = factorize(second.clone())  # C = right right^T
    left = None if gradient_moment is None else factorize(gradient_moment.double())
    whitened = weight.double() @ right
    whitened = whitened if left is None else left.mT @ whitened
    gram = whitened @ whitened.mT if whitened.shape[0] <= whitened.shape[1] else whitened.mT @ whitened
    values = torch.linalg.eigvalsh(gram).clamp_min(0)  # ascending
    energy = float(values.sum())
    tails = torch.cat([values.new_zeros(1), values.cumsum(0)]).flip(0) / max(energy, 1e-300)
    return Spectrum(energy, tuple(tails.tolist()), (weight.shape[0], weight.shape[1]), moments)
