"""Compression: fit the planned layers of a pretrained network to their weights, with data or without."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from structmat import _checks
from structmat.compress.calibration import Calibration
from structmat.compress.refinement import Refinement
from structmat.compress.sequential import Sequence, biased
from structmat.compress.tasks import FitBar, FitStore, Task, fit_tasks
from structmat.fit import Fit, Method, default_method
from structmat.fit.moments import Moments
from structmat.formats import Format
from structmat.network.sites import Site
from structmat.network.surgery import apply_plan_, planned_sites

MethodChoice = Method[Any] | Callable[[Format], Method[Any] | None] | None
"""One method for all formats, or a function of the format; None, also from that function, for ``default_method``."""


def compress_(
    model: nn.Module,
    plan: Mapping[str, Format],
    *,
    method: MethodChoice = None,
    moments: Calibration | None = None,
    batches: Iterable[Any] | None = None,
    refine: Refinement | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Fit]:
    """Fit the planned layers to their dense weights and replace them, in place.

    Without data the weights themselves are approximated. With data it is the layers' outputs, which makes compressed
    networks far better: with ``moments`` from ``calibrate`` for all layers at once, or with ``batches`` block by
    block. The latter lets every layer see the inputs that the layers before it, compressed already, give it, while its
    target stays the dense network's output, so that errors do not add up; with ``refine`` each block's factors are
    then tuned together.

    Every weight is checked first, and replaced only when all fits are there: an interrupt or an error leaves the
    network as it was. With ``cache``, finished fits are kept in that folder and a second call with the same
    weights, formats, methods and data takes them from there, so that it goes on where the first one stopped, with the
    same result to the last bit.

    Args:
        model: The network.
        plan: Format of each layer by name; layers planned as ``Dense`` stay.
        method: How to fit: one method for all, or a function of the format; None, also from that
            function, for ``default_method``.
        moments: Statistics of the layers' inputs.
        batches: Inputs of one call of the network each: a tensor, a tuple of arguments, or a mapping of keyword
            arguments, whose ``attention_mask`` says which tokens count.
        refine: How to tune the factors of each block; needs ``batches``. None for not at all.
        cache: Folder for finished fits; None for none.
        progress: Whether to show a progress bar, with a time estimate.

    Returns:
        The fit of each replaced layer by name.

    Raises:
        ValueError: If the plan does not fit the network, a weight contains NaN or infinity (named by layer), statistics
            are missing or given twice, or the data does not reach a layer.
        TypeError: If the method cannot fit a format.
        FloatingPointError: If a fit, or what a layer reads, is not finite.
    """
    if moments is not None and batches is not None:
        raise ValueError(
            "expected moments or batches, got both; moments are of all layers at once, batches in sequence"
        )
    if refine is not None and batches is None:
        raise ValueError("expected batches to refine on, got none; pass batches=, a list of the network's inputs")
    sites = planned_sites(model, plan)
    for name, site in sites.items():
        _checks.matrix(site.matrix, plan[name].shape, f"the weight of layer {name!r}")
    if moments is not None:
        missing = [name for name in sites if name not in moments]
        if missing:
            raise ValueError(f"expected moments of every planned layer, but those of {missing} are missing")
    methods = {name: method_for(plan[name], method) for name in sites}
    store = FitStore(cache) if cache is not None else None
    aware = moments is not None or batches is not None
    total = sum(methods[name].cost(plan[name], aware=aware) for name in sites)
    if batches is not None:
        sequence = Sequence(model, plan, sites, methods, list(batches), refine, store)
        with FitBar(sequence.cost, progress) as bar:
            fits = sequence.run(bar)
    else:
        tasks = [_task(name, site, plan[name], methods[name], moments) for name, site in sites.items()]
        with FitBar(total, progress) as bar:
            fits = fit_tasks(tasks, bar, store)
        if moments is not None:
            fits = {name: biased(fit, sites[name], moments[name]) for name, fit in fits.items()}
    put_fits_(model, {name: fits[name] for name in sites})
    return {name: fits[name] for name in sites}


def put_fits_(model: nn.Module, fits: Mapping[str, Fit]) -> None:
    """Replace layers by their fits, in place, biases included."""
    formats = {name: fit.format for name, fit in fits.items()}
    apply_plan_(model, formats, factors={name: fit.factors for name, fit in fits.items()})
    for name, fit in fits.items():
        if fit.bias is not None:
            model.get_submodule(name).get_parameter("bias").data.copy_(fit.bias)


def _task(name: str, site: Site, format: Format, method: Method[Any], moments: Mapping[str, Moments] | None) -> Task:
    weight = site.matrix
    if moments is None:
        return Task(name, weight, format, method, weight)
    target, gram = moments[name].problem(weight, centred=site.own_bias is not None)
    return Task(name, weight, format, method, target, gram)


def method_for(format: Format, method: MethodChoice) -> Method[Any]:
    """The method that the caller means for this format."""
    if callable(method) and not isinstance(method, (Method, type)):
        method = method(format)
    if method is None:
        return default_method(format)
    if not isinstance(method, Method):
        raise TypeError(
            f"expected a method such as TruncatedSvd(), or a function that gives one for a format, got {method!r}"
        )
    return method
