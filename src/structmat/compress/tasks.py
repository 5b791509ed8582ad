"""The work list: which layers are to be fitted and how, fits in batches of one shape, and the progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat._progress import progress_bar
from structmat._ranks import current
from structmat.compress.store import FitStore
from structmat.fit import Fit, Method, default_method
from structmat.fit.moments import Moments
from structmat.formats import Format
from structmat.network.sites import Site
from structmat.network.surgery import planned_sites

BATCH_BYTES = 64 * 2**20
"""Weights of one shape are fitted together up to this much memory for a copy of them."""

BATCH_COST = 1e12
"""Fits of one batch, which are kept together once all are done, have this many multiplications: less than a minute."""

KINDS = {"fits": 1.0, "passes": 0.5, "refinement": 0.5}
"""The kinds of work, and about how long a multiplication of each takes beside the first; a bar soon knows better."""

MethodChoice = Method[Any] | Callable[[Format], Method[Any] | None] | None
"""One method for all formats, or a function of the format; None, also from that function, for ``default_method``."""


@dataclass(frozen=True)
class Task:
    """One weight to fit.

    Attributes:
        name: The layer's name.
        weight: The dense weight ``(M, N)``.
        format: The format to fit.
        method: The method that fits it.
        target: The matrix to approximate; it is ``weight`` where earlier layers do not change the inputs.
        second_moment: The second moment ``(N, N)`` of the inputs, with a ridge; None for the Frobenius norm.
        data: The second moment of the inputs without the ridge, by which the error of the output is measured.
        gradient_moment: The second moment ``(M, M)`` of the gradients at the output; None for the identity.
    """

    name: str
    weight: Tensor
    format: Format
    method: Method[Any]
    target: Tensor
    second_moment: Tensor | None = None
    data: Tensor | None = None
    gradient_moment: Tensor | None = None

    @property
    def cost(self) -> float:
        """About how many multiplications the fit takes."""
        return self.method.cost(self.format, aware=self.second_moment is not None)


@dataclass(frozen=True)
class WorkList:
    """The layers of a network that are to be fitted, by name.

    Attributes:
        sites: The layers.
        formats: The format of each layer.
        methods: The method for each layer.
        gradients: The second moments of the gradients at the layers' outputs, where errors are weighed by them.
    """

    sites: Mapping[str, Site]
    formats: Mapping[str, Format]
    methods: Mapping[str, Method[Any]]
    gradients: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, plan: Mapping[str, Format], method: MethodChoice) -> WorkList:
        """Make the list for a network, after checking all of the plan.

        Args:
            model: The network; it may live on the meta device.
            plan: The format of each layer by name.
            method: The caller's choice of methods.

        Returns:
            The list.
        """
        sites = planned_sites(model, plan)
        formats = {name: plan[name] for name in sites}
        return cls(sites, formats, {name: method_for(format, method) for name, format in formats.items()})

    def check_weights(self) -> None:
        """Check that every weight is finite; a layer that is not is named."""
        for name, site in self.sites.items():
            _checks.matrix(site.matrix, self.formats[name].shape, f"the weight of layer {name!r}")

    def cost(self, name: str, *, aware: bool) -> float:
        """About how many multiplications the fit of one layer takes, with a second moment or without."""
        return self.methods[name].cost(self.formats[name], aware=aware)

    def task(self, name: str, site: Site | None = None, moments: Moments | None = None) -> Task:
        """Make the task of one layer.

        Args:
            name: The layer's name.
            site: The layer, where it is not the one in the list but a copy; None for the one in the list.
            moments: The moments of the layer's inputs; None to approximate the weight itself.

        Returns:
            The task.
        """
        site = self.sites[name] if site is None else site
        weight = site.matrix.detach()
        target, second_moment, data, gradient_moment = weight, None, None, None
        if moments is not None:
            gradient_moment = self.gradients.get(name)
            centred = site.own_bias is not None
            target, second_moment = moments.problem(weight, centred=centred)
            data = moments.deviations(centred=centred)
        return Task(name, weight, self.formats[name], self.methods[name], target, second_moment, data, gradient_moment)


def method_for(format: Format, method: MethodChoice) -> Method[Any]:
    """Find the method that the caller means for a format.

    Args:
        format: The format.
        method: The caller's choice.

    Returns:
        The method.

    Raises:
        TypeError: If the choice is no method and gives none.
    """
    if callable(method) and not isinstance(method, (Method, type)):
        method = method(format)
    if method is None:
        return default_method(format)
    if not isinstance(method, Method):
        raise TypeError(
            f"expected a method such as TruncatedSvd(), or a function that gives one for a format, got {method!r}"
        )
    return method


class FitBar:
    """A progress bar over work of several kinds, whose time estimate learns how long each kind takes.

    Args:
        totals: The multiplications of all work of each kind, one of ``KINDS``.
        show: Whether to draw it.
    """

    def __init__(self, totals: Mapping[str, float], show: bool) -> None:
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self._bar = progress_bar(total=1.0, desc="compress", smoothing=0, bar_format=form, miniters=0, show=show)
        self._left = {kind: total for kind, total in totals.items() if total > 0}
        self._done = dict.fromkeys(self._left, 0.0)
        self._seconds = dict.fromkeys(self._left, 0.0)
        self._clock = time.perf_counter()

    def __enter__(self) -> FitBar:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._bar.update(self._bar.total - self._bar.n)
        self._bar.close()

    def say(self, text: str) -> None:
        """Show what is going on."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(0)  # draws, at most ten times a second

    def advance(self, cost: float, kind: str = "fits") -> None:
        """Count work of one kind as done, which is all that was done since the last time."""
        now = time.perf_counter()
        if kind in self._left:
            self._done[kind] += cost
            self._left[kind] = max(0.0, self._left[kind] - cost)
            self._seconds[kind] += now - self._clock
        self._clock = now
        self._show(0.0)

    def skip(self, cost: float, kind: str = "fits") -> None:
        """Take work off the list that an earlier run has done."""
        if kind in self._left:
            self._left[kind] = max(0.0, self._left[kind] - cost)
        self._clock = time.perf_counter()

    def advance_within(self, cost: float, share: float, kind: str = "fits") -> None:
        """Show a share of a piece of work that ``advance`` will count once it is done."""
        if kind in self._left:
            self._show(self._rate(kind) * min(cost, self._left[kind]) * share)

    def _rate(self, kind: str) -> float:
        """The seconds of a multiplication of one kind; those of another kind tell where nothing of it is done yet."""
        if self._done[kind] > 0:
            return self._seconds[kind] / self._done[kind]
        known = [self._seconds[one] / self._done[one] / KINDS[one] for one in self._done if self._done[one] > 0]
        return KINDS[kind] * (sum(known) / len(known) if known else 1e-11)

    def _show(self, begun: float) -> None:
        """Show how many seconds of all work are done, with those of a piece of work that has begun."""
        done = sum(self._seconds.values())
        left = sum(self._rate(kind) * cost for kind, cost in self._left.items())
        share = (done + begun) / max(done + left, 1e-9)
        self._bar.update(min(1.0, share) * self._bar.total - self._bar.n)


def fit_tasks(tasks: Sequence[Task], bar: FitBar, store: FitStore | None, *, apart: bool = False) -> dict[str, Fit]:
    """Fit every task; those of one format, method, dtype and device together.

    Args:
        tasks: The weights to fit.
        bar: The progress bar.
        store: Where finished fits are kept; None for nowhere.
        apart: Whether each is fitted by itself, so that processes can share few of them.

    Returns:
        The fits by name, in the tasks' order.
    """
    fits: dict[str, Fit] = {}
    batches = [[task] for task in tasks] if apart else list(_batches(tasks))
    for batch, found in zip(batches, fit_batches(batches, bar, store), strict=True):
        fits.update((task.name, fit) for task, fit in zip(batch, found, strict=True))
    return {task.name: fits[task.name] for task in tasks}


def fit_batches(batches: Sequence[Sequence[Task]], bar: FitBar, store: FitStore | None) -> Iterator[list[Fit]]:
    """Fit tasks, those of each batch in one computation; batches are handed out to processes by cost.

    A batch is taken from the store only as a whole, so that a fit does not depend on what an earlier run finished.

    Args:
        batches: The weights to fit.
        bar: The progress bar.
        store: Where finished fits are kept; None for nowhere.

    Yields:
        The fits of each batch.
    """
    kept: list[list[Fit] | None] = [None] * len(batches)
    if store is not None:
        kept = current().of(0, lambda: [_kept(batch, store) for batch in batches])
    costs = [sum(task.cost for task in batch) for batch in batches]
    missing = [k for k, found in enumerate(kept) if found is None]
    made = current().dealt([costs[k] for k in missing], lambda j: _made(batches[missing[j]], bar, store))
    for cost, found in zip(costs, kept, strict=True):
        if found is None:
            found = next(made)
            bar.advance(cost)
        else:
            bar.skip(cost)
        yield found


def _kept(batch: Sequence[Task], store: FitStore) -> list[Fit] | None:
    """The fits of a batch that are in the store; None unless all are."""
    found = [store.read(_key(task), task.format, task.weight.device) for task in batch]
    whole = [fit for fit in found if fit is not None]
    return whole if len(whole) == len(batch) else None


def _made(batch: Sequence[Task], bar: FitBar, store: FitStore | None) -> list[Fit]:
    """Fit a batch, and keep the fits."""
    found = _fit_batch(batch, bar)
    if store is not None:
        for task, fit in zip(batch, found, strict=True):
            store.write(_key(task), fit)
    return found


def _key(task: Task) -> str:
    """The hash of everything that a fit depends on."""
    tensors = (task.weight, task.target, task.second_moment, task.gradient_moment)
    return FitStore.digest(f"{task.format!r}|{task.method!r}", *(t for t in tensors if t is not None))


def _fit_batch(batch: Sequence[Task], bar: FitBar) -> list[Fit]:
    """Fit the weights of tasks that are alike in one computation."""
    names = [task.name for task in batch]
    cost = sum(task.cost for task in batch)
    bar.say(names[0])

    def show(step: int, steps: int, errors: tuple[float, ...]) -> None:
        bar.say(f"{names[0]}, {step}/{steps}, error {max(errors):.3f}")
        bar.advance_within(cost, step / steps)

    second_moments = [task.second_moment for task in batch if task.second_moment is not None]
    gradient_moments = [task.gradient_moment for task in batch if task.gradient_moment is not None]
    fitted = batch[0].method.fit_many(
        [task.target for task in batch],
        batch[0].format,
        second_moments=second_moments or None,
        gradient_moments=gradient_moments or None,
        names=names,
        progress=show,
    )
    return [_measured(fit, task) for fit, task in zip(fitted, batch, strict=True)]


def _measured(fit: Fit, task: Task) -> Fit:
    """Give a fit its error against the weight, and that of its output under the data, without the ridge."""
    fit = fit if task.target is task.weight else with_error(fit, task.weight)
    if task.data is None:
        return fit
    dense = task.target.double()
    rest = dense - fit.format.to_dense(fit.factors).double()
    seen = [one @ task.data.to(one) for one in (dense, rest)]
    energy, loss = ((product * one).sum() for product, one in zip(seen, (dense, rest), strict=True))
    output_error = loss_error = _ratio(loss, energy)
    if task.gradient_moment is not None:
        gradient = task.gradient_moment.to(dense)
        energy, loss = ((gradient @ product * one).sum() for product, one in zip(seen, (dense, rest), strict=True))
        loss_error = _ratio(loss, energy)
    return replace(fit, output_error=output_error, loss_error=loss_error)


def _ratio(loss: Tensor, energy: Tensor) -> float:
    """The relative error, the root of a loss over an energy; 0 without energy."""
    return math.sqrt(max(float(loss), 0.0) / float(energy)) if energy > 0 else 0.0


def with_error(fit: Fit, weight: Tensor) -> Fit:
    """Give a fit its error against this weight ``(M, N)``."""
    dense = weight.detach().double()
    norm = torch.linalg.vector_norm(dense)
    rest = torch.linalg.vector_norm(dense - fit.format.to_dense(fit.factors).double())
    return replace(fit, error=float(rest / norm) if norm > 0 else 0.0)


def with_bias(fit: Fit, site: Site, moments: Moments) -> Fit:
    """Give a fit the bias that makes the mean of the layer's output right, where the layer has a bias of its own."""
    bias = site.own_bias
    if bias is None:
        return fit
    return replace(fit, bias=moments.bias(bias, site.matrix, fit.format.to_dense(fit.factors)).detach())


def _batches(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """Group the tasks with one format, method, dtype and device, up to a bounded memory for each group."""
    groups: dict[tuple[Any, ...], list[Task]] = {}
    for task in tasks:
        aware = (task.second_moment is None, task.gradient_moment is None)
        key = (task.format, task.method, task.weight.dtype, task.weight.device, *aware)
        groups.setdefault(key, []).append(task)
    for group in groups.values():
        M, N = group[0].format.shape
        size = max(1, BATCH_BYTES // (4 * M * N + (0 if group[0].second_moment is None else 16 * N * N)))
        size = max(1, min(size, int(BATCH_COST // max(group[0].cost, 1.0))))
        yield from (group[k : k + size] for k in range(0, len(group), size))
