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
    """

    format: Format
    factors: Mapping[str, Tensor]
    error: float
    history: tuple[float, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Method(abc.ABC, Generic[FormatT]):
    """How to approximate a dense weight by a format.

    A method computes in float32, or in float64 for a float64 weight, on the weight's device, and on the weight divided
    by its root mean square, so that the scale of the weight does not matter.

    Attributes:
        formats: The formats it can fit.
    """

    formats: ClassVar[tuple[type[Format], ...]]

    def __call__(self, weight: Tensor, format: FormatT, *, progress: Progress | None = None) -> Fit:
        """Fit one weight.

        Args:
            weight: ``(M, N)``, any floating-point dtype, any device; left as it is.
            format: What to fit.
            progress: Called after every iteration.

        Returns:
            The fit.

        Raises:
            TypeError: If the method cannot fit this format, or the weight is no floating-point tensor.
            ValueError: If the weight has another shape, or contains NaN or infinity.
        """
        return self.fit_many([weight], format, progress=progress)[0]

    def fit_many(
        self,
        weights: Sequence[Tensor],
        format: FormatT,
        *,
        names: Sequence[str] | None = None,
        progress: Progress | None = None,
    ) -> list[Fit]:
        """Fit several weights of one shape in one batched computation.

        Each result is what the weight alone would give, up to rounding.

        Args:
            weights: Each ``(M, N)``, all of one dtype and on one device.
            format: What to fit to each.
            names: What error messages call them.
            progress: Called after every iteration.

        Returns:
            One fit for each weight.

        Raises:
            TypeError: If the method cannot fit this format, or a weight is no floating-point tensor.
            ValueError: If a weight has another shape, dtype or device, or contains NaN or infinity.
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

        start = time.perf_counter()
        with torch.no_grad():
            compute = torch.float64 if dtype == torch.float64 else torch.float32
            stack = torch.stack([weight.detach().to(compute) for weight in weights])
            scale = _root_mean_square(stack)
            stack /= scale.where(scale > 0, 1)[:, None, None]
            try:
                solved, history = self._solve(stack, format, progress)
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; the batch is {list(names or range(len(weights)))}") from error
            solved = {n: f.to(dtype) for n, f in format.scaled(solved, scale).items()}
            for b in range(len(weights)):
                if not all(bool(torch.isfinite(factor[b]).all()) for factor in solved.values()):
                    called = names[b] if names else "the weight"
                    raise FloatingPointError(
                        f"the factors of {called!r} overflow {dtype}; scale the weight or use float32"
                    )
            errors = self._relative_errors(stack, scale, format, solved)
        seconds = (time.perf_counter() - start) / len(weights)
        return [
            Fit(
                format,
                {n: f[b].clone() if len(weights) > 1 else f[b] for n, f in solved.items()},
                error,
                tuple(value for value in history[:, b].tolist() if value == value),
                seconds,
            )
            for b, error in enumerate(errors)
        ]

    @abc.abstractmethod
    def _solve(self, weights: Tensor, format: FormatT, progress: Progress | None) -> tuple[Factors, Tensor]:
        """Fit ``weights (B, M, N)``, each of root mean square 1 (or zero).

        Returns:
            The factors with a leading dimension ``B``, and the relative errors ``(iterations, B)``, NaN where a weight
            was finished earlier.
        """

    def _relative_errors(self, weights: Tensor, scale: Tensor, format: FormatT, factors: Factors) -> list[float]:
        """Relative error of each weight, ``factors`` being those of ``scale * weights``."""
        errors = []
        for b, weight in enumerate(weights):
            one = {n: f[b].to(weights.dtype) for n, f in factors.items()}
            norm = torch.linalg.vector_norm(weight, dtype=torch.float64)
            squared = sum(
                torch.linalg.vector_norm(weight[rows] - piece / scale[b], dtype=torch.float64).square()
                for rows, piece in self._dense_rows(format, one)
            )
            errors.append(float((squared**0.5) / norm) if norm > 0 else 0.0)
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
