"""Calibration: the moments of the inputs that layers see, gathered from data for all layers at once."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from structmat._progress import progress_bar
from structmat._ranks import current
from structmat.fit.moments import Moments, MomentSums
from structmat.formats import Format
from structmat.network.calls import call, device_of, evaluating, moved, undisturbed
from structmat.network.capture import capturing, shared_inputs
from structmat.network.masks import find_masks
from structmat.network.sites import Site, find_sites
from structmat.network.splitting import unfused

MOST_NAMED = 8
"""The most layers that a warning names."""


class Calibration(Mapping[str, Moments]):
    """The moments of every planned layer by name; layers that read the same input share them.

    Args:
        moments: The moments of each layer by its name.
    """

    def __init__(self, moments: Mapping[str, Moments]) -> None:
        self._moments = dict(moments)

    def __getitem__(self, name: str) -> Moments:
        return self._moments[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    @property
    def nbytes(self) -> int:
        """The memory of all moments together, in bytes."""
        return sum(moments.nbytes for moments in {id(m): m for m in self._moments.values()}.values())


def calibrate(
    model: nn.Module, batches: Iterable[Any], plan: Mapping[str, Format], *, progress: bool = True
) -> Calibration:
    """Gather the input moments of every planned layer, all at once.

    Memory grows with the number of layers times ``N^2``; for large models let ``compress_(…, batches=…)`` go through
    them block by block, which also sees what compressing the earlier blocks changes.

    Args:
        model: The dense network.
        batches: The inputs of one call each: a tensor, a tuple of arguments, or a mapping of keyword arguments, whose
            ``attention_mask`` says which tokens count.
        plan: The format of each layer by name; layers planned as ``Dense`` are not looked at.
        progress: Whether to show a progress bar.

    Returns:
        The moments.

    Raises:
        ValueError: If there are no batches, the plan names what is no dense layer, or a planned layer is never called;
            named by layer.
        FloatingPointError: If a layer's input is not finite.

    Warns:
        UserWarning: If layers see fewer vectors than they have inputs.
    """
    wanted, given = _planned(model, plan), list(batches)
    if not given:
        raise ValueError("expected at least one batch of calibration data, got none")
    with unfused(model, wanted):
        found = _gathered(model, given, _planned(model, plan), progress)
    warn_of_few({name: one.tokens for name, one in found.items()}, {name: plan[name].N for name in found})
    return found


def _gathered(model: nn.Module, given: list[Any], sites: Mapping[str, Site], progress: bool) -> Calibration:
    """Gather the moments of sites whose modules are in the network."""
    device = device_of(model)
    bar = progress_bar(desc="calibrate", unit="batch", total=len(given), show=progress)
    with undisturbed(), evaluating(model), bar:
        leaders = shared_inputs(sites, (functools.partial(call, model, moved(batch, device)) for batch in given))[0]
        sums = {leader: MomentSums() for leader in leaders.values()}
        read = {leader: sites[leader] for leader in sums}
        masks = find_masks(model, given, {site.name: site.module for site in read.values()}, {})
        for done, i in enumerate(current().mine(len(given))):
            with capturing(read, masks[i].counted) as captured:
                call(model, moved(given[i], device))
            for leader, vectors in captured.items():
                sums[leader].add(torch.cat(vectors), number=i)
            bar.update(min(len(given), (done + 1) * current().size) - bar.n)
            bar.set_postfix_str(f"{sum(s.nbytes for s in sums.values()) / 2**20:.0f} MiB", refresh=False)
    moments = {leader: one.moments() for leader, one in sums.items()}
    return Calibration({name: moments[leaders[name]] for name in sites})


def warn_of_few(vectors: Mapping[str, int], inputs: Mapping[str, int]) -> None:
    """Name the layers that saw fewer vectors than they have inputs.

    Args:
        vectors: The number of vectors that each layer saw, by name.
        inputs: The number of inputs of each layer, by name.

    Warns:
        UserWarning: If there are any.
    """
    few = [f"{name} ({count} of {inputs[name]})" for name, count in vectors.items() if count < inputs[name]]
    if few:
        rest = f" and {len(few) - MOST_NAMED} more" if len(few) > MOST_NAMED else ""
        warnings.warn(
            f"the calibration data gives fewer vectors than inputs to {', '.join(few[:MOST_NAMED])}{rest}; it decides "
            "little there, and the fits stay near what they are without data; give more batches",
            stacklevel=2,
        )


def _planned(model: nn.Module, plan: Mapping[str, Format]) -> dict[str, Site]:
    """The layers that the plan wants replaced, by name."""
    by_name = {name: site for site in find_sites(model).values() for name in site.names}
    wanted = [name for name, format in plan.items() if format.replaces]
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise ValueError(f"expected names of dense layers of the model, got {unknown}")
    return {name: by_name[name] for name in wanted}
