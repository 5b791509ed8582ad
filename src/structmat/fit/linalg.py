"""The linear algebra of the fits: one factorisation of symmetric systems and one conjugate-gradient solver."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def factorize(matrices: Tensor, damping: Tensor | None = None) -> Tensor:
    """Cholesky factors of ``matrices + damping I``; where that is not definite, the damping grows until it is.

    The damping that makes a finite matrix definite is at most its norm, so this always ends, and it needs no
    eigenvalues.

    Args:
        matrices: ``(..., R, R)``, symmetric and, up to rounding, positive semi-definite; changed in place.
        damping: ``(...)``, broadcast against the leading dimensions, not negative; None for 0.

    Returns:
        Lower triangular factors, ``(..., R, R)``.

    Raises:
        FloatingPointError: If a system has non-finite entries.
    """
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    finite = torch.isfinite(matrices.sum((-2, -1)))
    if not finite.all():
        which = sorted({place[0] for place in (~finite).nonzero().tolist()}) if finite.ndim else [0]
        raise FloatingPointError(
            f"the normal equations of a fit are not finite, for weights {which} of its batch; lower its step or "
            "raise its damping"
        )
    if damping is not None:
        diagonal += damping.expand(mean.shape)[..., None]
    factors, info = torch.linalg.cholesky_ex(matrices)
    growth = torch.finfo(matrices.dtype).eps * matrices.shape[-1]
    while bool((info != 0).any()):
        floor = mean.abs().clamp_min(torch.finfo(matrices.dtype).tiny ** 0.5)
        diagonal += ((info != 0) * growth * floor)[..., None]
        factors, info = torch.linalg.cholesky_ex(matrices)
        growth *= 10
    return factors


def damped_inverse(matrices: Tensor, damping: float) -> Tensor:
    """The inverses of ``matrices + damping mean(diagonal) I``.

    Args:
        matrices: ``(..., R, R)``, symmetric and, up to rounding, positive semi-definite; changed in place.
        damping: The damping, relative to each mean diagonal.

    Returns:
        ``(..., R, R)``.

    Raises:
        FloatingPointError: If a system has non-finite entries.
    """
    mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
    return torch.cholesky_inverse(factorize(matrices, damping * mean))


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    rhs: Tensor,
    iterations: int,
    *,
    batch_dimensions: int = 1,
) -> Tensor:
    """Approximate the solutions of ``apply(x) = rhs`` by preconditioned conjugate gradients from zero.

    Args:
        apply: A symmetric positive semi-definite operator on each entry of the batch.
        precondition: An approximate inverse of ``apply``.
        rhs: ``(B, ...)``.
        iterations: The number of iterations, each of which applies the operator once.
        batch_dimensions: The number of leading dimensions of ``rhs`` that count separate systems.

    Returns:
        ``(B, ...)``.
    """

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(tuple(range(batch_dimensions, rhs.ndim)), keepdim=True)

    x, residual = torch.zeros_like(rhs), rhs
    z = precondition(residual)
    direction, rz = z, inner(residual, z)
    for iteration in range(iterations):
        applied = apply(direction)
        curvature = inner(direction, applied)
        step = torch.where(curvature > 0, rz / curvature.where(curvature > 0, 1), 0)
        x = x + step * direction
        if iteration + 1 < iterations:
            residual = residual - step * applied
            z = precondition(residual)
            rz_next = inner(residual, z)
            direction = z + torch.where(rz > 0, rz_next / rz.where(rz > 0, 1), 0) * direction
            rz = rz_next
    return x
