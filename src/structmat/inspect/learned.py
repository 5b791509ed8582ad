"""Numbers that say what a learned structure looks like, each with its definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from structmat.fit import Magnitude, TruncatedSvd
from structmat.formats import BlockDiagonal, BlockSparse, Factors, Format, LowRank

REGIONS = 4
"""The largest number of parts into which each axis is cut for the effective ranks."""


@dataclass(frozen=True)
class StructureNumbers:
    """Numbers that describe the structure of one GBLR or Gaudi-GBLR matrix.

    Attributes:
        keep: The number of entries inside the segments, as a share of the dense parameters.
        concentration: The Gini coefficient of the overlap map, the number of components over each entry: 0 where all
            entries have equally many (a low-rank matrix), near 1 where few entries have all.
        covered: The share of the entries under at least one component.
        effective_ranks: The effective rank of each region of the matrix, ``REGIONS x REGIONS`` or fewer: the
            exponential of the entropy of the normalised squared singular values (Roy & Vetterli 2007); 0 for a zero
            region.
        distances: The relative Frobenius error of the nearest matrix of other structures with at most as many
            parameters, by the structure's name: 0 where the learned matrix is of that structure. A structure that has
            no member as small is left out.
    """

    keep: float
    concentration: float
    covered: float
    effective_ranks: tuple[tuple[float, ...], ...]
    distances: dict[str, float]

    def __str__(self) -> str:
        ranks = [rank for row in self.effective_ranks for rank in row]
        nearest = ", ".join(f"{name} {distance:.2f}" for name, distance in self.distances.items())
        return (
            f"keep {self.keep:.3f}, concentration {self.concentration:.2f}, covered {self.covered:.2f}, effective rank "
            f"of regions {min(ranks):.1f} to {max(ranks):.1f}, distance from {nearest or 'none'}"
        )


def structure_numbers(format: Format, factors: Factors) -> StructureNumbers:
    """Measure one matrix.

    Args:
        format: A GBLR or Gaudi-GBLR format.
        factors: The factors of the format.

    Returns:
        The numbers.

    Raises:
        TypeError: If the format is another.
    """
    counts = format.overlap(factors).flatten()
    matrix = format.to_dense(factors).detach().double()
    keep = format.num_parameters(factors) / (format.M * format.N)
    regions = [_divisor(n) for n in format.shape]
    grid = matrix.unflatten(0, (regions[0], -1)).unflatten(2, (regions[1], -1)).transpose(1, 2)
    return StructureNumbers(
        keep,
        gini(counts),
        float((counts > 0).double().mean()),
        tuple(tuple(effective_rank(block) for block in row) for row in grid),
        _distances(matrix, keep),
    )


def gini(values: Tensor) -> float:
    """The Gini coefficient of non-negative numbers: half of their mean absolute difference, relative to their mean.

    Args:
        values: ``(n,)``.

    Returns:
        A number between 0, where all are equal, and ``1 - 1/n``, where one has everything; 0 where all are 0.
    """
    ordered = values.double().sort().values
    total = float(ordered.sum())
    if total == 0:
        return 0.0
    n = len(ordered)
    ranks = torch.arange(1, n + 1, dtype=torch.float64, device=values.device)
    return float(2 * (ranks * ordered).sum() / (n * total)) - (n + 1) / n


def effective_rank(matrix: Tensor) -> float:
    """The exponential of the entropy of the squared singular values, normalised to sum 1.

    Args:
        matrix: ``(P, Q)``.

    Returns:
        A number between 1 and ``min(P, Q)``; 0 for a zero matrix.
    """
    energies = torch.linalg.svdvals(matrix).square()
    if float(energies.sum()) == 0:
        return 0.0
    shares = energies / energies.sum()
    shares = shares[shares > 0]
    return math.exp(float(-(shares * shares.log()).sum()))


def map_similarity(first: Tensor, second: Tensor) -> float:
    """Measure how alike two overlap maps are, such as those of two seeds: what they share when both sum to 1.

    Args:
        first: ``(M, N)``, not negative, as ``Format.overlap`` gives it.
        second: Another of the same shape.

    Returns:
        The sum of the lesser of both at each entry, from 0 (they never overlap) to 1 (they are proportional).

    Raises:
        ValueError: If the shapes differ, or a map is zero everywhere.
    """
    if first.shape != second.shape:
        raise ValueError(f"expected two maps of one shape, got {tuple(first.shape)} and {tuple(second.shape)}")
    totals = [map.double().sum() for map in (first, second)]
    if min(float(total) for total in totals) == 0:
        raise ValueError("expected maps with at least one component, got one without any")
    return float(torch.minimum(first.double() / totals[0], second.double() / totals[1]).sum())


def _distances(matrix: Tensor, keep: float) -> dict[str, float]:
    """Errors of the nearest matrices of fixed structures; all of these fits are exact."""
    M, N = matrix.shape
    blocks = (_divisor(M, 16), _divisor(N, 16))
    budget = min(keep, 1.0)
    nearest: dict[str, Callable[[], float]] = {
        "low-rank": lambda: TruncatedSvd(randomized=False)(matrix, LowRank.for_budget(M, N, keep=budget)).error,
        "block-diagonal": lambda: Magnitude()(matrix, BlockDiagonal.for_budget(M, N, keep=budget)).error,
        "block-sparse": lambda: (
            Magnitude()(matrix, BlockSparse.from_magnitude(matrix, keep=budget, blocks=blocks)).error
        ),
    }
    found: dict[str, float] = {}
    for name, distance in nearest.items():
        if budget * M * N >= _least(name, M, N, blocks):
            found[name] = distance()
    return found


def _least(name: str, M: int, N: int, blocks: tuple[int, int]) -> int:
    """The number of parameters of the smallest member of a structure."""
    if name == "low-rank":
        return M + N
    if name == "block-diagonal":
        return M * N // math.gcd(M, N)
    return (M // blocks[0]) * (N // blocks[1])


def _divisor(n: int, most: int = REGIONS) -> int:
    """The largest divisor of ``n`` up to ``most``."""
    return max(d for d in range(1, most + 1) if n % d == 0)
