"""The normal equations of a BLAST fit: for each factor, with the others fixed, a least-squares problem.

Shapes are ``weights (B, M, N)``, ``left (B, I, P, R)``, ``diag (B, I, J, R)``, ``right (B, J, R, Q)``. Each factor's
loss gradient is ``2 (factor · gram - target)`` (BLAST paper, section 3.2 and appendix A; block indices as in
``W_ij = left_i Diag(diag_ij) right_j``). Nothing here forms the approximation, or an ``I J R R`` tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structmat.fit.linalg import conjugate_gradients

CHUNK_BYTES = 8 * 2**20
"""The size of the chunks in which many ``R x R`` systems are worked on, so that they stay in the cache."""


def gram_of_rows(right: Tensor) -> Tensor:
    """``C_j = right_j right_j^T``, ``(B, J, R, R)``."""
    return right @ right.mT


def gram_of_columns(left: Tensor) -> Tensor:
    """``A_i = left_i^T left_i``, ``(B, I, R, R)``."""
    return left.mT @ left


def correlations(grams: Tensor) -> Tensor:
    """Gram matrices ``(..., R, R)`` scaled to a unit diagonal; rows and columns of zeros stay."""
    energies = grams.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(energies > 0, energies.rsqrt(), 0)
    return grams * scale[..., None] * scale[..., None, :]


def left_gram(diag: Tensor, right_grams: Tensor) -> Tensor:
    """``G_i = sum_j D_ij C_j D_ij``, ``(B, I, R, R)``."""
    return _coupled_grams(diag, right_grams)


def right_gram(diag: Tensor, left_grams: Tensor) -> Tensor:
    """``G_j = sum_i D_ij A_i D_ij``, ``(B, J, R, R)``."""
    return _coupled_grams(diag.transpose(1, 2), left_grams)


def _coupled_grams(diag: Tensor, grams: Tensor) -> Tensor:
    """``sum_k D_ak grams_k D_ak`` for every ``a``, from ``diag (B, A, K, R)`` and ``grams (B, K, R, R)``."""
    total = diag.new_zeros(*diag.shape[:2], *grams.shape[2:])
    for rows in chunks(diag.shape[1], total[:, :1].nbytes):
        for k in range(diag.shape[2]):
            one = diag[:, rows, k]
            total[:, rows].addcmul_(one[..., :, None] * grams[:, None, k], one[..., None, :])
    return total


def chunks(count: int, bytes_each: int) -> list[slice]:
    """Slices that cover ``count`` items of a size, each at most ``CHUNK_BYTES`` or one item."""
    size = max(1, CHUNK_BYTES // max(1, bytes_each))
    return [slice(k, min(k + size, count)) for k in range(0, count, size)]


def left_target(weights: Tensor, diag: Tensor, right: Tensor) -> Tensor:
    """``B_i = sum_j W_ij right_j^T D_ij``, ``(B, I, P, R)``: one product of width ``N`` for each block row."""
    B, M, N = weights.shape
    I, R = diag.shape[1], diag.shape[-1]
    target = weights.new_empty(B, I, M // I, R)
    transposed = right.mT.contiguous()  # (B, J, Q, R)
    for i in range(I):
        coupled = (diag[:, i, :, None] * transposed).view(B, N, R)
        torch.bmm(weights.view(B, I, M // I, N)[:, i], coupled, out=target[:, i])
    return target


def projected_blocks(weights: Tensor, left: Tensor, out: Tensor | None = None) -> Tensor:
    """``left_i^T W_ij``, ``(B, I, R, N)``, into ``out`` if given: what the targets of right and diag share."""
    B, I, P, _ = left.shape
    return torch.matmul(left.mT, weights.view(B, I, P, -1), out=out)


def right_target(projected: Tensor, diag: Tensor) -> Tensor:
    """``B_j = sum_i D_ij left_i^T W_ij``, ``(B, J, R, Q)``, from ``projected_blocks``."""
    B, I, J, R = diag.shape
    blocks = projected.view(B, I, R, J, -1)
    target = (diag[:, 0].mT[..., None] * blocks[:, 0]).contiguous()
    for i in range(1, I):
        target.addcmul_(diag[:, i].mT[..., None], blocks[:, i])
    return target.transpose(1, 2)


def diag_target(projected: Tensor, right: Tensor) -> Tensor:
    """``g_ij = rowsum((left_i^T W_ij) ∘ right_j)``, ``(B, I, J, R)``, from ``projected_blocks``."""
    B, I, R, _ = projected.shape
    J = right.shape[1]
    blocks = projected.view(B, I, R, J, -1)
    rights = right.transpose(1, 2)  # (B, R, J, Q)
    return torch.stack([(blocks[:, i] * rights).sum(-1) for i in range(I)], 1).mT


def diag_gram(left_grams: Tensor, right_grams: Tensor, out: Tensor | None = None) -> Tensor:
    """``H_ij = A_i ∘ C_j`` for every pair of the given ones.

    Args:
        left_grams: ``A (B, I, R, R)``.
        right_grams: ``C (B, J, R, R)``.
        out: A tensor at least as large; memory that is in use already is written several times faster.

    Returns:
        ``(B, I, J, R, R)``.
    """
    left, right = left_grams[:, :, None], right_grams[:, None]
    return torch.mul(left, right, out=None if out is None else out[:, : left.shape[1], : right.shape[2]])


def times_vectors(grams: Tensor, vectors: Tensor) -> Tensor:
    """``H v`` for symmetric ``grams (..., R, R)``, as ``v^T H``: batched libraries are several times faster so."""
    return (vectors[..., None, :] @ grams)[..., 0, :]


def diag_chunks(left_grams: Tensor, right_grams: Tensor) -> list[tuple[slice, slice]]:
    """Ranges of ``i`` and ``j`` that cover all pairs, few enough at a time that their systems stay in the cache."""
    one_row = right_grams.nbytes
    columns = chunks(right_grams.shape[1], right_grams[:, :1].nbytes)
    return [(rows, some) for rows in chunks(left_grams.shape[1], one_row) for some in columns]


def approximately_solved(grams: Tensor, damping: Tensor, rhs: Tensor, iterations: int) -> Tensor:
    """Approximate ``(grams + damping I)^-1 rhs`` by Jacobi-preconditioned conjugate gradients from zero.

    Args:
        grams: ``(..., R, R)``.
        damping: ``(...)``, broadcast against the leading dimensions.
        rhs: ``(..., R)``.
        iterations: The number of iterations, each of which reads ``grams`` once.

    Returns:
        ``(..., R)``.
    """
    damping = damping[..., None]
    jacobi = grams.diagonal(dim1=-2, dim2=-1) + damping
    jacobi = jacobi.where(jacobi > 0, 1).reciprocal()
    return conjugate_gradients(
        lambda vectors: times_vectors(grams, vectors) + damping * vectors,
        lambda residual: jacobi * residual,
        rhs,
        iterations,
        batch_dimensions=rhs.ndim - 1,
    )
