"""Calibration: the moments of the inputs that layers see, gathered from data (``methods.md`` section 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from structmat._calls import call, device_of, evaluating, moved
from structmat.fit.metric import quiet
from structmat.formats import Dense, Format
from structmat.nn import Site, find_sites, unfolded

HELD_OUT_EVERY = 5
"""Every fifth batch is kept apart until the ridge is chosen."""

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Candidates for the ridge, relative to each input's own energy."""

DEFAULT_RIDGE = 1e-2
"""Where there is but one batch, so that nothing can be held out."""

ROUNDING = 1e-12
"""A variance below this share of the second moment is an error of rounding: the input is as good as constant."""


@dataclass(frozen=True)
class Moments:
    """First and second moments of a layer's inputs ``x``, and of those ``t`` that its target output is computed from.

    The two differ where earlier layers are compressed already: the layer then sees ``x``, while the target stays the
    dense network's output ``W t``.

    Attributes:
        tokens: How many vectors went in.
        second: ``E[x x^T] (N, N)``, float64.
        mean: ``E[x] (N,)``, float64.
        cross: ``E[t x^T] (N, N)``, float64; None where ``t`` is ``x``.
        target_mean: ``E[t] (N,)``, float64; None where ``t`` is ``x``.
        ridge: Share of each input's own energy to add to ``second`` (and to ``cross``), chosen by held-out error.
    """

    tokens: int
    second: Tensor
    mean: Tensor
    cross: Tensor | None = None
    target_mean: Tensor | None = None
    ridge: float = DEFAULT_RIDGE

    @property
    def nbytes(self) -> int:
        """Memory of the tensors, in bytes."""
        return sum(t.nbytes for t in (self.second, self.mean, self.cross, self.target_mean) if t is not None)

    def problem(self, weight: Tensor, *, centred: bool = False) -> tuple[Tensor, Tensor]:
        """What to fit, and in which metric, so that ``E|W t - W_hat x|^2`` is least.

        With the ridge ``D``, ``W_hat`` is fitted to ``W (E[t x^T] + D)(E[x x^T] + D)^-1`` under ``E[x x^T] + D``;
        directions without data so stay as they are in ``W``.

        Args:
            weight: ``W (M, N)``.
            centred: Whether the layer's bias takes care of the means, so that only deviations from them count.

        Returns:
            The weight to fit ``(M, N)`` in the dtype of ``W``, and the gram ``(N, N)``.
        """
        second, cross = self._matrices(centred)
        added = _ridge(second, self.ridge)
        if centred:
            added += torch.diag(ROUNDING * self.second.diagonal())
        second = second + added
        if cross is None:
            return weight, second
        factor = torch.linalg.cholesky_ex(second).L
        target = torch.cholesky_solve((weight.double() @ (cross + added)).mT, factor).mT
        return target.to(weight.dtype), second

    def bias(self, bias: Tensor, weight: Tensor, approximation: Tensor) -> Tensor:
        """The bias that makes the mean of the output right: ``b + W E[t] - W_hat E[x]``.

        Args:
            bias: ``b (M,)``.
            weight: ``W (M, N)``.
            approximation: ``W_hat (M, N)``.

        Returns:
            ``(M,)`` in the dtype of ``b``.
        """
        target = self.mean if self.target_mean is None else self.target_mean
        shift = weight.double() @ target - approximation.double() @ self.mean
        return (bias.double() + shift).to(bias.dtype)

    def _matrices(self, centred: bool) -> tuple[Tensor, Tensor | None]:
        if not centred:
            return self.second, self.cross
        second = self.second - torch.outer(self.mean, self.mean)
        if self.cross is None or self.target_mean is None:
            return second, None
        return second, self.cross - torch.outer(self.target_mean, self.mean)


def _ridge(second: Tensor, ridge: float) -> Tensor:
    """The diagonal matrix that a ridge adds; an input that is always zero counts as a very quiet one."""
    diagonal = second.diagonal().clamp_min(0)
    return torch.diag(ridge * torch.maximum(diagonal, 1e-6 * quiet(diagonal)))


class MomentSums:
    """Running sums over batches, from which ``Moments`` come."""

    def __init__(self) -> None:
        self.batches = 0
        self._sums: list[dict[str, Tensor]] = [{}, {}]  # to learn from, and held out

    @property
    def nbytes(self) -> int:
        """Memory of the sums, in bytes."""
        return sum(tensor.nbytes for sums in self._sums for tensor in sums.values())

    def add(self, inputs: Tensor, targets: Tensor | None = None) -> None:
        """Count one batch.

        Args:
            inputs: ``x (T, N)``.
            targets: ``t (T, N)``, where they differ.
        """
        sums = self._sums[self.batches % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]
        self.batches += 1
        x = inputs.double()
        new = {"tokens": x.new_tensor(len(x)), "second": x.mT @ x, "mean": x.sum(0)}
        if targets is not None:
            t = targets.double()
            new |= {"cross": t.mT @ x, "target_mean": t.sum(0)}
        for name, value in new.items():
            sums[name] = sums[name].add_(value) if name in sums else value

    def moments(self) -> Moments:
        """The moments over everything, with the ridge that predicts the held-out batches best.

        Returns:
            The moments.

        Raises:
            ValueError: If no vector has been counted.
        """
        learnt, held_out = self._sums
        tokens = sum(int(sums["tokens"]) for sums in self._sums if sums)
        if not tokens:
            raise ValueError("expected at least one input vector, got none; every token is masked out")
        ridge = DEFAULT_RIDGE
        if held_out and int(learnt["tokens"]) and int(held_out["tokens"]):
            ridge = _best_ridge(*(sums["second"] / sums["tokens"] for sums in (learnt, held_out)))
        total = {name: (learnt[name] + held_out[name] if held_out else learnt[name]) / tokens for name in learnt}
        return Moments(
            tokens, total["second"], total["mean"], total.get("cross"), total.get("target_mean"), ridge
        )  # fmt: skip


def _best_ridge(learnt: Tensor, held_out: Tensor) -> float:
    """The ridge with which half of the inputs predict the other half best on data that was held out.

    A fit under a full second moment lets inputs stand in for others, by what the calibration data says of one given
    the rest; too small a ridge takes noise for such relations.

    Args:
        learnt: ``E[x x^T] (N, N)`` of the batches to learn from.
        held_out: That of the others.

    Returns:
        One of ``RIDGES``.
    """
    N = len(learnt)
    known, rest = slice(0, N, 2), slice(1, N, 2)
    if N < 2:
        return DEFAULT_RIDGE
    scale = held_out.diagonal()[rest].clamp_min(0)
    weights = torch.where(scale > 0, 1 / scale.where(scale > 0, 1), 0)  # each input counts alike
    errors = []
    for ridge in RIDGES:
        gram = (learnt + _ridge(learnt, ridge))[known, known]
        predictor = torch.cholesky_solve(learnt[known, rest], torch.linalg.cholesky_ex(gram).L).mT  # (rest, known)
        quadratic = ((predictor @ held_out[known, known]) * predictor).sum(1)
        inner = (predictor * held_out[rest, known]).sum(1)
        errors.append(float((weights * (quadratic - 2 * inner)).sum()))
    return RIDGES[min(range(len(RIDGES)), key=lambda k: (errors[k] if errors[k] == errors[k] else float("inf"), k))]


class Calibration(Mapping[str, Moments]):
    """The moments of every planned layer by name; layers that read the same input share them.

    Args:
        moments: By layer.
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
        """Memory of all moments together, in bytes."""
        return sum(moments.nbytes for moments in {id(m): m for m in self._moments.values()}.values())


def calibrate(
    model: nn.Module, batches: Iterable[Any], plan: Mapping[str, Format], *, progress: bool = True
) -> Calibration:
    """Gather the input moments of every planned layer, all at once.

    Memory grows with the number of layers times ``N^2``; for large models let ``compress_(…, batches=…)`` go through
    them block by block, which also sees what compressing the earlier blocks changes.

    Args:
        model: The network, dense.
        batches: Inputs of one call each: a tensor, a tuple of arguments, or a mapping of keyword arguments, whose
            ``attention_mask`` says which tokens count.
        plan: Format of each layer by name; layers planned as ``Dense`` are not looked at.
        progress: Whether to show a progress bar.

    Returns:
        The moments.

    Raises:
        ValueError: If there are no batches, the plan names what is no dense layer, or a planned layer is never called;
            named by layer.
        FloatingPointError: If a layer's input is not finite.
    """
    by_name = {name: site for site in find_sites(model).values() for name in site.names}
    wanted = [name for name, format in plan.items() if not isinstance(format, Dense)]
    unknown = [name for name in wanted if name not in by_name]
    if unknown:
        raise ValueError(f"expected names of dense layers of the model, got {unknown}")
    sites = {name: by_name[name] for name in wanted}
    leaders: dict[str, str] = {}
    sums: dict[str, MomentSums] = {}
    with evaluating(model), tqdm(desc="calibrate", unit="batch", disable=not progress) as bar:
        for batch in batches:
            batch = moved(batch, device_of(model))
            if not leaders:
                leaders = shared_inputs(sites, lambda batch=batch: call(model, batch))[0]
                sums = {leader: MomentSums() for leader in leaders.values()}
            captured: dict[str, list[Tensor]] = {}
            with capturing({leader: sites[leader] for leader in sums}, captured, mask_of(batch)):
                call(model, batch)
            for leader, vectors in captured.items():
                sums[leader].add(torch.cat(vectors))
            bar.update()
            bar.set_postfix_str(f"{sum(s.nbytes for s in sums.values()) / 2**20:.0f} MiB", refresh=False)
    if not leaders:
        raise ValueError("expected at least one batch of calibration data, got none")
    moments = {leader: one.moments() for leader, one in sums.items()}
    return Calibration({name: moments[leaders[name]] for name in sites})


def mask_of(batch: Any) -> Tensor | None:
    """The attention mask of a batch, ``(batch, tokens)`` of booleans, where it has one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def shared_inputs(sites: Mapping[str, Site], run: Callable[[], object]) -> tuple[dict[str, str], set[str]]:
    """For each site, in the order in which they are called, the first one that reads the same input.

    Args:
        sites: By name.
        run: Calls the network once.

    Returns:
        The leader's name by name, and the names of the sites that are called once.

    Raises:
        ValueError: If a site is not called.
    """
    calls: dict[str, list[tuple[Tensor, int]]] = {}  # with how often it had been changed in place

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            version = 0 if inputs[0].is_inference() else inputs[0]._version
            calls.setdefault(name, []).append((inputs[0], version))

        return hook

    _with_hooks(sites, note, run)
    missing = [site.name for name, site in sites.items() if name not in calls]
    if missing:
        raise ValueError(
            f"the calibration data never reaches {missing}; give data that does, or exclude these layers from the plan"
        )
    leaders: dict[str, str] = {}
    for name, tensors in calls.items():
        same = (
            other
            for other in leaders.values()
            if len(calls[other]) == len(tensors)
            and type(sites[other].module) is type(sites[name].module) is not nn.Conv2d
            and all(a is b and m == n for (a, m), (b, n) in zip(calls[other], tensors, strict=True))
        )
        leaders[name] = next(same, name)
    return leaders, {name for name, tensors in calls.items() if len(tensors) == 1}


class Captured(BaseException):
    """Ends a call once the input that was wanted is there."""


class capturing:
    """While it is entered, the inputs of sites are collected as vectors ``(T, N)``.

    Args:
        sites: By name.
        captured: Where to put them, by name.
        mask: Which tokens count ``(batch, tokens)``; None for all.
        stop: Whether the first input ends the call, by a ``Captured`` that leaving the context catches.
    """

    def __init__(
        self, sites: Mapping[str, Site], captured: dict[str, list[Tensor]], mask: Tensor | None, stop: bool = False
    ) -> None:
        self._sites, self._captured, self._mask, self._stop = sites, captured, mask, stop
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                vectors = _vectors(self._sites[name].name, module, inputs[0], self._mask)
                self._captured.setdefault(name, []).append(vectors)
                if self._stop:
                    raise Captured

            return hook

        self._handles = _hooked(self._sites, note)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        for handle in self._handles:
            handle.remove()
        return kind is Captured


def _hooked(sites: Mapping[str, Site], note: Callable[[str], Callable[..., None]]) -> list[Any]:
    return [module.register_forward_pre_hook(note(name)) for name, site in sites.items() for module in site.modules]


def _with_hooks(
    sites: Mapping[str, Site], note: Callable[[str], Callable[..., None]], run: Callable[[], object]
) -> None:
    handles = _hooked(sites, note)
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


def _vectors(name: str, module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """What the layer's matrix multiplies, ``(T, N)``, without the tokens that the mask leaves out; a copy."""
    if isinstance(module, nn.Conv2d):
        x = unfolded(module, x if x.ndim == 4 else x[None])[0]
    vectors = x[mask] if mask is not None and mask.shape == x.shape[:-1] else x.reshape(-1, x.shape[-1]).clone()
    if not torch.isfinite(vectors).all():
        raise FloatingPointError(f"the input of layer {name!r} is not finite; check the calibration data and the dtype")
    return vectors
