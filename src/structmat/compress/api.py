"""Compression: fit the planned layers of a pretrained network to their weights, with data or without."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from structmat import _checks
from structmat.compress.calibration import Calibration
from structmat.compress.efforts import EFFORTS
from structmat.compress.gradients import gradient_moments
from structmat.compress.refinement import Refinement
from structmat.compress.sequential import InMemory, SequentialRun
from structmat.compress.store import FitStore
from structmat.compress.tasks import FitBar, MethodChoice, WorkList, fit_tasks, with_bias
from structmat.fit import Fit
from structmat.formats import Format
from structmat.network.calls import undisturbed
from structmat.network.splitting import unfused
from structmat.network.surgery import put_fits_
from structmat.plan import Plan


def compress_(
    model: nn.Module,
    plan: Mapping[str, Format],
    *,
    method: MethodChoice = None,
    calibration: Calibration | None = None,
    batches: Iterable[Any] | None = None,
    refine: Refinement | None = None,
    two_sided: bool | None = None,
    effort: str = "default",
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Fit]:
    """Fit the planned layers to their dense weights and replace them, in place.

    Without data the weights themselves are approximated. With data it is the layers' outputs, which makes compressed
    networks far better: with ``calibration`` from ``calibrate`` for all layers at once, or with ``batches`` block by
    block. The latter lets every layer see the inputs that the layers before it, compressed already, give it, while its
    target stays the dense network's output, so that errors do not add up; with ``refine`` each block's factors are
    then tuned together. With ``two_sided`` errors are also weighed by the gradients at the layers' outputs, which takes
    one backward pass of the whole network over a part of the batches, and lowers what the errors do to its output.

    Every weight is checked first, and replaced only when all fits are there: an interrupt or an error leaves the
    network unchanged. With ``cache``, finished fits are kept in that folder, and a second call with the same weights,
    formats, methods and data takes them from there: it resumes, with the same result to the last bit.

    Args:
        model: The network.
        plan: The format of each layer by name; layers planned as ``Dense`` stay.
        method: A method, or a function of the format (None from it: ``default_method``); None for that of the effort.
        calibration: The moments of the layers' inputs, from ``calibrate``.
        batches: The inputs of one call of the network each: a tensor, a tuple of arguments, or a mapping of keyword
            arguments, whose ``attention_mask`` says which tokens count.
        refine: How to tune the factors of each block, which needs ``batches``; None for not at all.
        two_sided: Whether to weigh errors by gradients too, where ``batches`` give a layer any; None for what the plan
            was made for: a plan of ``allocate`` expects such errors.
        effort: ``"quick"``, ``"default"`` or ``"best"``: the steps of BLAST fits, and the data for gradients.
        cache: The folder for finished fits; None for none.
        progress: Whether to show a progress bar, with a time estimate.

    Returns:
        The fit of each replaced layer by name.

    Raises:
        ValueError: If the plan does not fit the network, a weight contains NaN or infinity (named by layer), statistics
            are missing or given twice, or the data does not reach a layer.
        TypeError: If the method cannot fit a format.
        FloatingPointError: If a fit, or what a layer reads, is not finite.
    """
    if calibration is not None and batches is not None:
        raise ValueError(
            "expected calibration or batches, got both; a calibration is of all layers at once, batches in sequence"
        )
    _checks.one_of(effort, EFFORTS, "effort")
    given = checked_batches(batches, refine)
    if two_sided is None:
        two_sided = given is not None and isinstance(plan, Plan) and plan.two_sided
    if two_sided and given is None:
        raise ValueError("expected batches to be two-sided on, got none; pass batches=, a list of the network's inputs")
    planned = [name for name, format in plan.items() if isinstance(format, Format) and format.replaces]
    with undisturbed(), unfused(model, planned):
        work = WorkList.of(model, plan, method or EFFORTS[effort].method)
        if not work.sites:
            return {}
        work.check_weights()
        store = FitStore(cache) if cache is not None else None
        if two_sided:
            vectors = EFFORTS[effort].gradients
            found = gradient_moments(model, given or [], work.sites, vectors=vectors, store=store, progress=progress)
            work = replace(work, gradients=found.moments)
        if given is None:
            fits = _at_once(work, calibration, store, progress)
        else:
            run = SequentialRun(model, work, given, InMemory(model, work, given[0]), refinement=refine, store=store)
            with FitBar(run.costs, progress) as bar:
                fits = run.run(bar)
        fits = {name: fits[name] for name in work.sites}
        put_fits_(model, fits)
    return fits


def checked_batches(batches: Iterable[Any] | None, refine: Refinement | None) -> list[Any] | None:
    """Check that there is the data that a run needs.

    Args:
        batches: The calibration data; None for none.
        refine: How to tune the factors of each block; None for not at all.

    Returns:
        The batches as a list; None where there are none.

    Raises:
        ValueError: If there are no batches where some are needed, or too few.
    """
    if batches is None:
        if refine is not None:
            raise ValueError("expected batches to refine on, got none; pass batches=, a list of the network's inputs")
        return None
    given = list(batches)
    if not given:
        raise ValueError("expected at least one batch of calibration data, got none")
    if refine is not None:
        refine.check_batches(len(given))
    return given


def _at_once(work: WorkList, calibration: Calibration | None, store: FitStore | None, progress: bool) -> dict[str, Fit]:
    """Fit all layers at once: to their weights, or to their outputs on the inputs of the dense network."""
    if calibration is not None:
        missing = [name for name in work.sites if name not in calibration]
        if missing:
            raise ValueError(
                f"expected the moments of every planned layer in the calibration, but those of {missing} are missing"
            )
    moments = {name: None if calibration is None else calibration[name] for name in work.sites}
    tasks = [work.task(name, moments=moments[name]) for name in work.sites]
    with FitBar({"fits": sum(task.cost for task in tasks)}, progress) as bar:
        fits = fit_tasks(tasks, bar, store)
    return {
        name: fit if (own := moments[name]) is None else with_bias(fit, work.sites[name], own)
        for name, fit in fits.items()
    }
