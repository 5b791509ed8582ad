"""The method: a frozen, callable configuration that turns a dense weight into factors of a format."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from structmat import _checks
from structmat.fit.metric import prepared
from structmat.formats import Factors, Format

Progress = Callable[[int, int, tuple[float, ...]], None]
"""Called after every iteration with its number (from 1), the number planned, and the relative error of each weight.

An exception that it raises, a ``KeyboardInterrupt`` for one, ends the fit.
"""


FormatT = TypeVar("FormatT", bound=Format)


@dataclass(frozen=True)
class Fit:
    """A fitted weight.

    Attributes:
        format: The format.
        factors: Its factors, in the weight's dtype and on its device.
        error: Relative error ``|W - W_hat|_F / |W|_F``, measured from the residuals of the returned factors; 0 for a
            zero weight.
        history: Relative error after each iteration as the method estimates it, empty for a closed form.
        seconds: Wall-clock time, the batch's time divided by its size.
        output_error: Relative error of the output, ``sqrt(E|W x - W_hat x|^2 / E|W x|^2)`` over the inputs whose second
            moment the fit was given; None where it was given none.
        bias: The bias ``(M,)`` that goes with the factors, where it is not the old one; else None.
    """

    format: Format
    factors: Mapping[str, Tensor]
    error: float
    history: tuple[float, ...] = ()
    seconds: float = 0.0
    output_error: float | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Method(abc.ABC, Generic[FormatT]):
    """How to approximate a dense weight by a format.

    A method computes in float32, or in float64 for a float64 weight, on the weight's device, and on the weight divided
    by its root mean square, so that the scale of the weight does not matter. Given the second moment ``C`` of the
    layer's inputs it is activation-aware: it lowers ``tr(E C E^T)``, the mean squared error of the output, in place of
    ``|E|_F^2``, where ``E = W - W_hat``.

    Attributes:
        formats: The formats it can fit.
    """

    formats: ClassVar[tuple[type[Format], ...]]

    def __call__(
        self, weight: Tensor, format: FormatT, *, second_moment: Tensor | None = None, progress: Progress | None = None
    ) -> Fit:
        """Fit one weight.

        Args:
            weight: ``(M, N)``, any floating-point dtype, any device; left as it is.
            format: What to fit.
            second_moment: Second moment ``C = E[x x^T] (N, N)`` of the inputs, on any scale, possibly singular; None for the
                Frobenius norm.
            progress: Called after every iteration.

        Returns:
            The fit.

        Raises:
            TypeError: If the method cannot fit this format, or the weight is no floating-point tensor.
            ValueError: If the weight or the second_moment has another shape, or contains NaN or infinity.
        """
        second_moments = None if second_moment is None else [second_moment]
        return self.fit_many([weight], format, second_moments=second_moments, progress=progress)[0]

    def cost(self, format: FormatT, *, aware: bool = False) -> float:
        """About how many multiplications one fit takes: what a time estimate weighs layers by.

        Args:
            format: What to fit.
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
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> list[Fit]:
        """Fit several weights of one shape in one batched computation.

        Each result is what the weight alone would give, up to rounding.

        Args:
            weights: Each ``(M, N)``, all of one dtype and on one device.
            format: What to fit to each.
            second_moments: Second moment ``(N, N)`` of the inputs of each; None for the Frobenius norm.
            names: What error messages call them.
            progress: Called after every iteration.

        Returns:
            One fit for each weight.

        Raises:
            TypeError: If the method cannot fit this format, or a weight is no floating-point tensor.
            ValueError: If a weight has another shape, dtype or device, a second_moment another shape, the second_moments are not as many
                as the weights, or one contains NaN or infinity.
            FloatingPointError: If the computation or its result is not finite.
        """
        if not isinstance(format, self.formats):
            known = ", ".join(f.__name__ for f in self.formats)
            raise TypeError(f"expected a format that {type(self).__name__} can fit ({known}), got {format}")
        if not weights:
            return []
        for index, weight in enumerate(weights):
            _checks.matrix(weight, format.shape, f"the weight {names[index]!r}" if names else "the weight")
        dtype, device = weights[0].dtype, weights[0].device
        if any(weight.dtype != dtype or weight.device != device for weight in weights):
            raise ValueError("expected weights of one dtype on one device, got several; fit them in separate calls")
        if second_moments is not None:
            if len(second_moments) != len(weights):
                raise ValueError(f"expected one second_moment for each of {len(weights)} weights, got {len(second_moments)}")
            for index, second_moment in enumerate(second_moments):
                called = f"the second_moment of {names[index]!r}" if names else "the second_moment"
                _checks.matrix(second_moment, (format.N, format.N), called)

        start = time.perf_counter()
        with torch.no_grad():
            compute = torch.float64 if dtype == torch.float64 else torch.float32
            stack = torch.stack([weight.detach().to(compute) for weight in weights])
            scale = _root_mean_square(stack)
            stack /= scale.where(scale > 0, 1)[:, None, None]
            metric = None if second_moments is None else prepared(torch.stack([g.detach().to(device) for g in second_moments]))
            try:
                solved, history = self._solve(stack, metric, format, progress)
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; the batch is {list(names or range(len(weights)))}") from error
            specs = format.factor_specs()
            solved = {n: f.to(specs[n].dtype or dtype) for n, f in format.scaled(solved, scale).items()}
            for b in range(len(weights)):
                if not all(bool(torch.isfinite(f[b]).all()) for n, f in solved.items() if specs[n].trainable):
                    called = names[b] if names else "the weight"
                    raise FloatingPointError(
                        f"the factors of {called!r} overflow {dtype}; scale the weight or use float32"
                    )
            errors = self._relative_errors(stack, metric, scale, format, solved)
        seconds = (time.perf_counter() - start) / len(weights)
        return [
            Fit(
                format,
                {n: f[b].clone() if len(weights) > 1 else f[b] for n, f in solved.items()},
                error,
                tuple(value for value in history[:, b].tolist() if value == value),
                seconds,
                output_error,
            )
            for b, (error, output_error) in enumerate(errors)
        ]

    @abc.abstractmethod
    def _solve(
        self, weights: Tensor, metric: Tensor | None, format: FormatT, progress: Progress | None
    ) -> tuple[Factors, Tensor]:
        """Fit ``weights (B, M, N)``, each of root mean square 1 (or zero), in the norm of ``metric (B, N, N)``.

        The metric is in float64, positive definite, with a mean diagonal of 1; None for the Frobenius norm.

        Returns:
            The factors with a leading dimension ``B``, and the relative errors ``(iterations, B)``, NaN where a weight
            was finished earlier.
        """

    def _relative_errors(
        self, weights: Tensor, metric: Tensor | None, scale: Tensor, format: FormatT, factors: Factors
    ) -> list[tuple[float, float | None]]:
        """Both relative errors of each weight, ``factors`` being those of ``scale * weights``."""
        errors: list[tuple[float, float | None]] = []
        for b, weight in enumerate(weights):
            specs = format.factor_specs()
            one = {n: f[b].to(specs[n].dtype or weights.dtype) for n, f in factors.items()}
            sums = torch.zeros(4, dtype=torch.float64, device=weight.device)
            for rows, piece in self._dense_rows(format, one):
                part = weight[rows].double()
                rest = part - (piece / scale[b]).double()
                sums[:2] += torch.stack([part.square().sum(), rest.square().sum()])
                if metric is not None:
                    sums[2:] += torch.stack([((e @ metric[b]) * e).sum() for e in (part, rest)])
            energy, loss, output_energy, output_loss = sums.clamp_min(0).sqrt().tolist()
            output_error = None if metric is None else output_loss / output_energy if output_energy > 0 else 0.0
            errors.append((loss / energy if energy > 0 else 0.0, output_error))
        return errors

    def _dense_rows(self, format: FormatT, factors: Factors) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the rows with the dense matrix there; a method for large matrices yields it piece by piece."""
        yield slice(None), format.to_dense(factors)


def _root_mean_square(stack: Tensor) -> Tensor:
    """Root mean square of each matrix ``(B,)``, without overflow or underflow."""
    largest = stack.abs().amax((1, 2))
    safe = largest.where(largest > 0, 1)
    return largest * (stack / safe[:, None, None]).square().mean((1, 2)).sqrt()


def no_history(weights: Tensor) -> Tensor:
    """The history ``(0, B)`` of a closed form."""
    return weights.new_zeros(0, len(weights))
