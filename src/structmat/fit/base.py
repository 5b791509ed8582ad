"""The method: a frozen, callable configuration that turns a dense weight into factors of a format."""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.fit.metric import Metric, prepared
from structmat.formats import Factors, Format

Progress = Callable[[int, int, tuple[float, ...]], None]
"""A function called after every iteration: its number (from 1), the number planned, each weight's relative error.

An exception that it raises, such as ``KeyboardInterrupt``, ends the fit.
"""


USUAL = 1e12
"""The largest root mean square of a weight, and the inverse of the least, whose products float32 holds for sure."""

INDEFINITE = 1e-5
"""The share of a second moment's largest entry below whose negative an eigenvalue is more than an error of rounding."""

FormatT = TypeVar("FormatT", bound=Format)


@dataclass(frozen=True)
class Fit:
    """A fitted weight.

    Attributes:
        format: The format.
        factors: The factors of the format, in the weight's dtype and on its device.
        error: The relative error ``|W - W_hat|_F / |W|_F``, measured from the residuals of the returned factors; 0 for
            a zero weight.
        history: The relative error after each iteration as the method estimates it; empty for a closed form.
        seconds: The wall-clock time; for a batch, its time divided by its size.
        output_error: The relative error of the output, ``sqrt(E|W x - W_hat x|^2 / E|W x|^2)`` over the inputs whose
            second moment the fit was given; None where it was given none. In sequence ``W x`` is the best that a dense
            layer could make of the inputs that the compressed layers before it give.
        bias: The bias ``(M,)`` that goes with the factors; None where the old one stays.
        loss_error: The relative error ``sqrt(tr(G E C E^T) / tr(G W C W^T))`` by inputs and gradients, which
            compression adds; ``output_error`` where it has no gradients, and None where it has no data.
    """

    format: Format
    factors: Mapping[str, Tensor]
    error: float
    history: tuple[float, ...] = ()
    seconds: float = 0.0
    output_error: float | None = None
    bias: Tensor | None = None
    loss_error: float | None = None


@dataclass(frozen=True)
class Method(abc.ABC, Generic[FormatT]):
    """An algorithm that approximates a dense weight by a format, with its settings.

    A method computes in float32, or in float64 for a float64 weight, on the weight's device, and on the weight divided
    by its root mean square, so that the scale of the weight does not matter. Given the second moment ``C`` of the
    layer's inputs it is activation-aware: it lowers ``tr(E C E^T)``, the mean squared error of the output, in place of
    ``|E|_F^2``, where ``E = W - W_hat``. Given the second moment ``G`` of the gradients at its output as well, it
    lowers ``tr(G E C E^T)``, which approximates the change of the loss itself.

    Attributes:
        formats: The formats that the method can fit.
    """

    formats: ClassVar[tuple[type[Format], ...]]

    def __call__(
        self,
        weight: Tensor,
        format: FormatT,
        *,
        second_moment: Tensor | None = None,
        gradient_moment: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Fit:
        """Fit one weight.

        Args:
            weight: ``(M, N)``, any floating-point dtype, any device; never changed.
            format: The format to fit.
            second_moment: The second moment ``C = E[x x^T] (N, N)`` of the inputs, on any scale, possibly singular;
                None for the Frobenius norm.
            gradient_moment: The second moment ``G = E[g g^T] (M, M)`` of the loss' gradients at the output, on any
                scale, possibly singular; None for the identity. It needs ``second_moment``.
            progress: A function called after every iteration.

        Returns:
            The fit.

        Raises:
            TypeError: If the method cannot fit this format, or the weight is no floating-point tensor.
            ValueError: If the weight or a moment has another shape, or contains NaN or infinity, or a moment is not
                symmetric or has a negative eigenvalue, or there is one of gradients alone.
            FloatingPointError: If the computation, its result or an error of it is not finite.
        """
        second, gradient = (None if one is None else [one] for one in (second_moment, gradient_moment))
        return self.fit_many([weight], format, second_moments=second, gradient_moments=gradient, progress=progress)[0]

    @classmethod
    def published(cls) -> Method[Any]:
        """The algorithm with the settings of its paper.

        Returns:
            The method; one whose defaults are those of its paper returns these.
        """
        return cls()

    def cost(self, format: FormatT, *, aware: bool = False) -> float:
        """The approximate number of multiplications of one fit, by which a time estimate weighs layers.

        Args:
            format: The format to fit.
            aware: Whether the second moment of the inputs is given.

        Returns:
            The count; the default is that of a singular value decomposition.
        """
        M, N = format.shape
        return 20.0 * M * N * min(M, N) + (20.0 * N**3 if aware else 0.0)

    def fit_many(
        self,
        weights: Sequence[Tensor],
        format: FormatT,
        *,
        second_moments: Sequence[Tensor] | None = None,
        gradient_moments: Sequence[Tensor] | None = None,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> list[Fit]:
        """Fit several weights of one shape in one batched computation.

        Each result is what the weight alone would give, up to rounding, and never worse than a zero matrix.

        Args:
            weights: The weights, each ``(M, N)``, all of one dtype and on one device.
            format: The format to fit to each.
            second_moments: The second moment ``(N, N)`` of the inputs of each; None for the Frobenius norm.
            gradient_moments: The second moment ``(M, M)`` of the gradients at the output of each; None for the
                identity.
            names: The names of the weights in error messages.
            progress: A function called after every iteration.

        Returns:
            One fit for each weight.

        Raises:
            TypeError: If the method cannot fit this format, or a weight is no floating-point tensor.
            ValueError: If a weight has another shape, dtype or device, a moment another shape, there are not as many
                moments as weights, or one of them contains NaN or infinity, is not symmetric or has a negative
                eigenvalue, or there are moments of gradients alone.
            FloatingPointError: If the computation, its result or an error of it is not finite.
        """
        if not isinstance(format, self.formats):
            known = ", ".join(f.__name__ for f in self.formats)
            raise TypeError(f"expected a format that {type(self).__name__} can fit ({known}), got {format}")
        if not weights:
            return []
        called = [repr(name) for name in names] if names else []
        _check_weights(weights, format, called)
        _check_moments(second_moments, len(weights), format.N, "second moment", called)
        _check_moments(gradient_moments, len(weights), format.M, "moment of the gradients", called)
        if second_moments is None and gradient_moments is not None:
            raise ValueError("expected second_moments of the inputs beside gradient_moments, got none")

        start = time.perf_counter()
        with torch.no_grad():
            stack, scale = _normalized(weights)
            moments = None if second_moments is None else _stacked(second_moments, stack.device)
            gradients = None if gradient_moments is None else prepared(_stacked(gradient_moments, stack.device))
            metric = None if moments is None else Metric(prepared(moments), gradients)
            try:
                solved, history = self._solve(stack, metric, format, progress)
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; the batch is {list(names or range(len(weights)))}") from error
            factors = _in_layer_dtype(_scaled(format, solved, scale), format, weights[0].dtype, called)
            sums = self._sums(stack, moments, scale, format, factors)
            if bool(_worse_than_zero(sums, moments).any()):
                solved = self._best_multiples(stack, moments, format, solved)
                factors = _in_layer_dtype(_scaled(format, solved, scale), format, weights[0].dtype, called)
                sums = self._sums(stack, moments, scale, format, factors)
            _check_finite(sums, weights[0].dtype, called)
            errors = [_errors(row, moments is not None) for row in sums[:, :4].sqrt().tolist()]
        seconds = (time.perf_counter() - start) / len(weights)
        return [
            Fit(
                format,
                {n: f[b].clone() if len(weights) > 1 else f[b] for n, f in factors.items()},
                error,
                tuple(value for value in history[:, b].tolist() if value == value),
                seconds,
                output_error,
            )
            for b, (error, output_error) in enumerate(errors)
        ]

    @abc.abstractmethod
    def _solve(
        self, weights: Tensor, metric: Metric | None, format: FormatT, progress: Progress | None
    ) -> tuple[Factors, Tensor]:
        """Fit ``weights (B, M, N)``, each of root mean square 1 (or zero), in the norm of their metric.

        The metric is in float64, positive definite, with mean diagonals of 1; None for the Frobenius norm.

        Returns:
            The factors with a leading dimension ``B``, and the relative errors ``(iterations, B)``, NaN where a weight
            was finished earlier.
        """

    def _best_multiples(self, weights: Tensor, moments: Tensor | None, format: FormatT, solved: Factors) -> Factors:
        """The factors, or those of the best multiple of their matrix where zero is better for outputs (or entries)."""
        ones = torch.ones(len(weights), dtype=torch.float64, device=weights.device)

        def sums(shares: Tensor) -> Tensor:
            return self._sums(weights, moments, ones, format, _scaled(format, solved, shares))

        total, rest = _compared(sums(ones), moments)
        # the best multiple is <W, W_hat> / |W_hat|^2; both follow from what the matrix misses, and what half of it does
        inner = (rest - total) / 2 - 2 * (_compared(sums(ones / 2), moments)[1] - total)
        energy = rest - total + 2 * inner
        best = (inner / energy.where(energy > 0, 1)).clamp_min(0).nan_to_num(0)
        best = torch.where(rest > total, best, 1.0)
        still = _worse_than_zero(sums(best), moments)  # for rounding, where the two differ enormously
        return _scaled(format, solved, best.where(~still, 0))

    def _sums(
        self, weights: Tensor, moments: Tensor | None, scale: Tensor, format: FormatT, factors: Factors
    ) -> Tensor:
        """Squared norms of each weight and of what its factors miss, of both outputs, and the factors' largest entry.

        Args:
            weights: ``(B, M, N)``.
            moments: The second moments of the inputs ``(B, N, N)``, float64; None for none, whose norms are 0.
            scale: The number ``(B,)`` by which the factors' matrices are larger than the weights.
            format: The format.
            factors: The factors of the batch.

        Returns:
            ``(B, 5)``, float64.
        """
        specs = format.factor_specs()
        sums = torch.zeros(len(weights), 5, dtype=torch.float64, device=weights.device)
        for b, weight in enumerate(weights):
            usual = 1 / USUAL < float(scale[b]) < USUAL  # else float32 has too few exponents for the products
            compute = weights.dtype if usual else torch.float64
            one = {n: f[b].to(specs[n].dtype or compute) for n, f in factors.items()}
            for rows, piece in self._dense_rows(format, one):
                part = weight[rows].double()
                rest = part - piece.double() / scale[b].where(scale[b] > 0, 1)
                sums[b, :2] += torch.stack([part.square().sum(), rest.square().sum()])
                sums[b, 4] = torch.maximum(sums[b, 4], piece.abs().amax().double())
                if moments is not None:
                    sums[b, 2:4] += torch.stack([((e @ moments[b]) * e).sum() for e in (part, rest)])
        return sums.clamp_min(0)

    def _dense_rows(self, format: FormatT, factors: Factors) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the rows with the dense matrix there; a method for large matrices yields it piece by piece."""
        yield slice(None), format.to_dense(factors)


def _check_weights(weights: Sequence[Tensor], format: Format, called: Sequence[str]) -> None:
    for index, weight in enumerate(weights):
        _checks.matrix(weight, format.shape, f"the weight {called[index]}" if called else "the weight")
    if any(weight.dtype != weights[0].dtype or weight.device != weights[0].device for weight in weights):
        raise ValueError("expected weights of one dtype on one device, got several; fit them in separate calls")


def _check_moments(moments: Sequence[Tensor] | None, count: int, size: int, kind: str, called: Sequence[str]) -> None:
    if moments is None:
        return
    if len(moments) != count:
        raise ValueError(f"expected one {kind} for each of {count} weights, got {len(moments)}")
    for index, one in enumerate(moments):
        what = f"the {kind} of {called[index]}" if called else f"the {kind}"
        _checks.matrix(one, (size, size), what)
        _check_definite(one.detach().double(), what)


def _check_definite(moment: Tensor, what: str) -> None:
    """Check that a matrix is symmetric without negative eigenvalues, both up to rounding."""
    largest = float(moment.abs().amax())
    if float((moment - moment.mT).abs().amax()) > 2 * INDEFINITE * largest:
        raise ValueError(f"expected {what} to be symmetric, as E[x x^T] is, got entries that differ from their mirrors")
    shifted = (moment + moment.mT) / 2
    shifted.diagonal().add_(len(moment) ** 0.5 * INDEFINITE * largest)
    if largest and int(torch.linalg.cholesky_ex(shifted).info):
        raise ValueError(
            f"expected {what} to have no negative eigenvalue, as E[x x^T] has none, got one; give the second moment of "
            "inputs, such as X.T @ X / len(X)"
        )


def _stacked(second_moments: Sequence[Tensor], device: torch.device) -> Tensor:
    """The second moments ``(B, N, N)`` in float64, symmetric to the last bit."""
    stack = torch.stack([one.detach().to(device, torch.float64) for one in second_moments])
    return (stack + stack.mT) / 2


def _compared(sums: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sums by which a fit is judged, both ``(B,)``: of the whole, and of what the factors miss."""
    return (sums[:, 0], sums[:, 1]) if moments is None else (sums[:, 2], sums[:, 3])


def _worse_than_zero(sums: Tensor, moments: Tensor | None) -> Tensor:
    """Which factors ``(B,)`` are worse than zero, for the outputs where there are second moments of the inputs."""
    total, rest = _compared(sums, moments)
    return rest > total


def _errors(norms: Sequence[float], aware: bool) -> tuple[float, float | None]:
    """The relative errors of a weight and of its output, from the norms of both and of what the factors miss."""
    shares = [part / whole if whole > 0 else 0.0 for whole, part in (norms[:2], norms[2:])]
    return shares[0], shares[1] if aware else None


def _check_finite(sums: Tensor, dtype: torch.dtype, called: Sequence[str]) -> None:
    """Check that the errors are finite, and that the layer's dtype has room for every entry of the approximation."""
    for b, (*norms, largest) in enumerate(sums.tolist()):
        what = called[b] if called else "the weight"
        if not all(math.isfinite(norm) for norm in norms):
            raise FloatingPointError(f"the error of the fit of {what} is not finite; scale the weight")
        if not largest <= torch.finfo(dtype).max:
            raise FloatingPointError(
                f"the approximation of {what} overflows {dtype}, with entries up to {largest:.3g}; scale the weight or "
                "use a dtype of more range"
            )


def _normalized(weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The weights ``(B, M, N)`` divided by their root mean squares ``(B,)`` in float64, in the computation's dtype."""
    compute = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    stack = torch.stack([weight.detach().to(compute) for weight in weights])
    largest = stack.abs().amax((1, 2))
    shrunk = stack / largest.where(largest > 0, 1)[:, None, None]  # neither overflows nor underflows when squared
    rest = shrunk.square().mean((1, 2)).sqrt()
    scale = largest * rest
    usual = scale >= torch.finfo(compute).tiny
    divided = stack / scale.where(usual, 1)[:, None, None]
    stack = torch.where(usual[:, None, None], divided, shrunk / rest.where(rest > 0, 1)[:, None, None])
    return stack, torch.where(usual, scale.double(), largest.double() * rest.double())


def _scaled(format: Format, factors: Factors, scale: Tensor) -> dict[str, Tensor]:
    """The factors of a batch times ``scale (B,)``, each in its own dtype."""
    return {name: factor.to(factors[name].dtype) for name, factor in format.scaled(factors, scale).items()}


def _in_layer_dtype(factors: Factors, format: Format, dtype: torch.dtype, called: Sequence[str]) -> dict[str, Tensor]:
    """The factors of a batch in the dtypes that a layer of this dtype has, all of them finite."""
    specs = format.factor_specs()
    rounded = {n: f.to(specs[n].dtype or dtype) for n, f in factors.items()}
    for b in range(len(next(iter(rounded.values())))):
        if not all(bool(torch.isfinite(f[b]).all()) for n, f in rounded.items() if specs[n].trainable):
            what = called[b] if called else "'the weight'"
            raise FloatingPointError(f"the factors of {what} overflow {dtype}; scale the weight or use float32")
    return rounded


def no_history(weights: Tensor) -> Tensor:
    """The history ``(0, B)`` of a closed form."""
    return weights.new_zeros(0, len(weights))
