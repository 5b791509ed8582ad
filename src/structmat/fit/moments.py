"""First and second moments of the inputs that a layer sees, and the fitting problem that they pose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from structmat._ranks import Sums, current
from structmat.fit.linalg import factorize
from structmat.fit.metric import quiet

HELD_OUT_EVERY = 5
"""The period at which a batch is kept apart until the ridge is chosen: every fifth."""

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""The candidates for the ridge, relative to each input's own energy."""

FEW_RIDGES = (*RIDGES, 1e1, 1e2, 1e3)
"""The candidates where there are fewer vectors than inputs; with the last the data hardly counts beside the weight."""

FOLDS = 5
"""The number of parts of which each is predicted from the others, where there are fewer vectors than inputs."""

DEFAULT_RIDGE = 1e-2
"""The ridge where there is only one batch, so that nothing can be held out."""

ROUNDING = 1e-12
"""The share of the second moment below which a variance is an error of rounding and the input counts as constant."""


SAME = 1e-4
"""The difference, relative to their spread, up to which inputs of the compressed and the dense network are equal."""


@dataclass(frozen=True)
class Moments:
    """The moments of a layer's inputs ``x``, and of the inputs ``t`` that its target output is computed from.

    The two differ where earlier layers are compressed already: the layer then sees ``x``, while the target stays the
    dense network's output ``W t``.

    Attributes:
        tokens: The number of vectors that went in.
        second_moment: ``E[x x^T] (N, N)``, float64.
        mean: ``E[x] (N,)``, float64.
        cross: ``E[t x^T] (N, N)``, float64; None where ``t`` is ``x``.
        target_mean: ``E[t] (N,)``, float64; None where ``t`` is ``x``.
        ridge: The share of each input's own energy to add to ``second_moment`` (and to ``cross``), chosen by held-out
            error.
    """

    tokens: int
    second_moment: Tensor
    mean: Tensor
    cross: Tensor | None = None
    target_mean: Tensor | None = None
    ridge: float = DEFAULT_RIDGE

    @property
    def nbytes(self) -> int:
        """The memory of the tensors, in bytes."""
        return sum(t.nbytes for t in (self.second_moment, self.mean, self.cross, self.target_mean) if t is not None)

    def problem(self, weight: Tensor, *, centred: bool = False) -> tuple[Tensor, Tensor]:
        """Pose the fitting problem in which ``E|W t - W_hat x|^2`` is least.

        With the ridge ``D``, ``W_hat`` is fitted to ``W (E[t x^T] + D)(E[x x^T] + D)^-1`` under ``E[x x^T] + D``;
        directions without data so stay as they are in ``W``.

        Args:
            weight: ``W (M, N)``.
            centred: Whether the layer's bias takes care of the means, so that only deviations from them count.

        Returns:
            The weight to fit ``(M, N)`` in the dtype of ``W``, and the second moment ``(N, N)``.
        """
        second, cross = self._matrices(centred)
        added = _ridge(second, self.ridge)
        if centred:
            added += torch.diag(ROUNDING * self.second_moment.diagonal())
        second = second + added
        if cross is None:
            return weight, second
        factor = factorize(second.clone())
        target = torch.cholesky_solve((weight.double() @ (cross + added)).mT, factor).mT
        return target.to(weight.dtype), second

    def with_ridge(self) -> Tensor:
        """The second moment ``(N, N)`` of the inputs with the ridge, which is positive definite."""
        return self.second_moment + _ridge(self.second_moment, self.ridge)

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

    def deviations(self, *, centred: bool = False) -> Tensor:
        """The second moment ``(N, N)`` of the inputs without a ridge, or of their deviations from the mean."""
        return self._matrices(centred)[0]

    def _matrices(self, centred: bool) -> tuple[Tensor, Tensor | None]:
        if not centred:
            return self.second_moment, self.cross
        second = self.second_moment - torch.outer(self.mean, self.mean)
        if self.cross is None or self.target_mean is None:
            return second, None
        return second, self.cross - torch.outer(self.target_mean, self.mean)


def _ridge(second: Tensor, ridge: float) -> Tensor:
    """The diagonal matrix that a ridge adds; an input that is always zero counts as a very quiet one."""
    diagonal = second.diagonal().clamp_min(0)
    return torch.diag(ridge * torch.maximum(diagonal, 1e-6 * quiet(diagonal)))


class MomentSums:
    """Running sums over batches, from which ``Moments`` come; processes that work together share the batches."""

    def __init__(self) -> None:
        self.batches = 0
        self._sums = Sums()  # by whether they are held out, and by name
        self._known = 0
        self._few: dict[int, tuple[Tensor, Tensor | None]] | None = {}  # all vectors, while they are fewer than inputs
        self._totals: list[dict[str, Tensor]] | None = None

    @property
    def nbytes(self) -> int:
        """The memory of the sums, in bytes."""
        few = [one for pair in (self._few or {}).values() for one in pair if one is not None]
        return sum(tensor.nbytes for tensor in [*few, *self._sums.values])

    def add(self, inputs: Tensor, targets: Tensor | None = None, number: int | None = None) -> None:
        """Count one batch.

        Args:
            inputs: ``x (T, N)``.
            targets: ``t (T, N)`` where the two differ; None where ``t`` is ``x``.
            number: The number of the batch, where the batches come in the order of ``Ranks.mine``; None where they come
                one after the other, in one process.
        """
        own = self.batches if number is None else number
        self.batches += 1
        x, t = inputs.double(), None if targets is None else targets.double()
        new = {"tokens": x.new_tensor(len(x)), "second_moment": _product(inputs, inputs), "mean": x.sum(0)}
        if targets is not None and t is not None:
            cross, difference = _product(targets, inputs), (t - x).square().sum()
            new |= {"cross": cross, "target_mean": t.sum(0), "difference": difference}
        held_out = own % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        self._sums.add(0 if number is None else number, {(held_out, name): value for name, value in new.items()})
        self._known += len(x)
        if self._few is not None:
            self._few[own] = x, t
            if self._known >= x.shape[-1]:
                self._few = None

    def totals(self) -> list[dict[str, Tensor]]:
        """The sums of all processes: those to learn from, and those held out; nothing may be added any more."""
        if self._totals is None:
            total = self._sums.total()
            self._totals = [
                {name: one for (kind, name), one in total.items() if kind is held} for held in (False, True)
            ]
        return self._totals

    @property
    def tokens(self) -> int:
        """The number of vectors that all processes counted; nothing may be added any more."""
        return sum(int(sums["tokens"]) for sums in self.totals() if sums)

    def moments(self) -> Moments:
        """The moments over everything, with the ridge that predicts best what was held out.

        Where there are fewer vectors than inputs, each fifth of them is predicted from the rest, and among the
        candidates are ridges beside which the data hardly counts.

        Returns:
            The moments.

        Raises:
            ValueError: If no vector has been counted.
        """
        learnt, held_out = self.totals()
        tokens = self.tokens
        if not tokens:
            raise ValueError("expected at least one input vector, got none; every token is masked out")
        ridge = DEFAULT_RIDGE
        if tokens < (learnt or held_out)["mean"].shape[0]:
            few = current().merged(self._few or {}).values()
            ridge = _ridge_of_few([(x, x if t is None else t) for x, t in few])
        elif learnt and held_out and int(learnt["tokens"]) and int(held_out["tokens"]):
            ridge = _best_ridge(*(sums["second_moment"] / sums["tokens"] for sums in (learnt, held_out)))
        means = [name for name in learnt or held_out if name != "tokens"]
        total = {
            name: (learnt[name] + held_out[name] if learnt and held_out else (learnt or held_out)[name]) / tokens
            for name in means
        }
        if "difference" in total:
            variance = (total["second_moment"].diagonal() - total["mean"].square()).clamp_min(0).sum()
            if total.pop("difference") <= SAME**2 * variance:
                del total["cross"], total["target_mean"]  # a regression would make much of what rounding does
        return Moments(tokens, ridge=ridge, **total)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right (N, N)`` of vectors ``(T, N)``, in double precision, as no eigenvalue may be negative."""
    return left.double().mT @ right.double()


def _best_ridge(learnt: Tensor, held_out: Tensor) -> float:
    """The ridge with which half of the inputs predict the other half best on data that was held out.

    A fit under a full second moment lets inputs stand in for others, by what the calibration data says of one given
    the rest; too small a ridge takes noise for such relations.

    Args:
        learnt: ``E[x x^T] (N, N)`` of the batches that the predictor is learned from.
        held_out: ``E[x x^T] (N, N)`` of the other batches.

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
        inputs = (learnt + _ridge(learnt, ridge))[known, known].clone()
        predictor = torch.cholesky_solve(learnt[known, rest], factorize(inputs)).mT  # (rest, known)
        quadratic = ((predictor @ held_out[known, known]) * predictor).sum(1)
        inner = (predictor * held_out[rest, known]).sum(1)
        errors.append(float((weights * (quadratic - 2 * inner)).sum()))
    return RIDGES[min(range(len(RIDGES)), key=lambda k: (errors[k] if errors[k] == errors[k] else float("inf"), k))]


def _ridge_of_few(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The ridge with which the regression that a fit uses predicts best what was held out.

    The difference ``t - x`` is regressed on ``x``, so that an infinite ridge leaves the weight unchanged. Where ``t``
    is ``x``, half of the inputs is regressed on the other half.

    Args:
        pairs: ``x (T, N)`` and ``t (T, N)`` of each batch.

    Returns:
        One of ``FEW_RIDGES``.
    """
    x, t = (torch.cat(one) for one in zip(*pairs, strict=True))
    T, N = x.shape
    if T < 2 or N < 2:
        return FEW_RIDGES[-1]
    lengths = [len(one) for one, _ in pairs]
    group = torch.arange(len(pairs)).repeat_interleave(torch.tensor(lengths)) if len(pairs) > 1 else torch.arange(T)
    fold = group.to(x.device) % FOLDS
    energy = x.square().mean(0)
    scale = torch.maximum(energy, 1e-6 * quiet(energy)).rsqrt()
    same = all(a is b for a, b in pairs)
    read, wanted = (x * scale, (t - x) * scale) if not same else ((x * scale)[:, ::2], (x * scale)[:, 1::2])
    errors = torch.stack([_held_out_errors(read, wanted, fold == k) for k in fold.unique().tolist()]).sum(0)
    return FEW_RIDGES[int(errors.nan_to_num(torch.inf).argmin())]


def _held_out_errors(read: Tensor, wanted: Tensor, held_out: Tensor) -> Tensor:
    """The squared errors of ridge regressions on vectors that were held out, for each of ``FEW_RIDGES``.

    Args:
        read: What is regressed on, ``(T, N1)``.
        wanted: What is predicted, ``(T, N2)``.
        held_out: Which vectors the regression does not see, ``(T,)``.

    Returns:
        ``(len(FEW_RIDGES),)``.
    """
    known, rest = ~held_out, held_out
    if not known.any():
        return read.new_zeros(len(FEW_RIDGES))
    values, vectors = torch.linalg.eigh(read[known] @ read[known].mT)
    inner, outer = vectors.mT @ wanted[known], read[rest] @ read[known].mT @ vectors
    ridges = read.new_tensor(FEW_RIDGES) * int(known.sum())
    predicted = [(outer / (values.clamp_min(0) + ridge)) @ inner for ridge in ridges]
    return torch.stack([(wanted[rest] - one).square().sum() for one in predicted])
