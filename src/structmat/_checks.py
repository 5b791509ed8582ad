"""One-sentence checks of what comes in: "expected …, got …", and the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

LARGEST_AXIS = 10**9
"""The longest axis of a matrix for which a message lists the divisors, which takes no time up to here."""


def positive_int(value: Any, what: str) -> int:
    """Return ``value`` if it is an integer of at least 1.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"expected {what} to be an integer of at least 1, got {value!r}")
    return value


def natural_int(value: Any, what: str) -> int:
    """Return ``value`` if it is an integer of at least 0.

    Raises:
        ValueError: If it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"expected {what} to be an integer of at least 0, got {value!r}")
    return value


def fraction(value: Any, what: str) -> float:
    """Return ``value`` as a float if it lies in ``(0, 1]``.

    Raises:
        ValueError: If it does not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"expected {what} to be in (0, 1], got {value!r}")
    return float(value)


def budget(keep: Any, total: int) -> int:
    """Return how many of ``total`` the share ``keep`` allows; the rounding of a float like 1/49 does not cost one.

    Raises:
        ValueError: If ``keep`` is not in ``(0, 1]``.
    """
    return math.floor(fraction(keep, "keep") * total * (1 + 1e-12))


def rounded_up(share: float) -> str:
    """``share`` in four decimals, rounded up, so that what a message asks for is enough."""
    return f"{math.ceil(share * 10_000) / 10_000:g}"


def block_counts(blocks: Any, M: int, N: int) -> tuple[int, int]:
    """Return ``blocks`` as the pair ``(I, J)``, of which ``I`` divides ``M`` and ``J`` divides ``N``.

    Raises:
        ValueError: If it is not an integer or a pair, or does not divide the shape; the message lists the divisors.
    """
    pair = (blocks, blocks) if isinstance(blocks, int) else tuple(blocks) if isinstance(blocks, (tuple, list)) else ()
    if len(pair) != 2:
        raise ValueError(f"expected blocks to be one count or a pair (rows, columns), got {blocks!r}")
    for count, size, axis in zip(pair, (M, N), ("rows", "columns"), strict=True):
        positive_int(count, f"the block count along the {axis}")
        if size % count:
            known = (
                f"; the divisors of {size} are {', '.join(map(str, divisors(size)))}" if size <= LARGEST_AXIS else ""
            )
            raise ValueError(f"expected a block count that divides the {size} {axis}, got {count}{known}")
    return pair


def divisors(n: int) -> list[int]:
    """The divisors of ``n`` in ascending order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def matrix(weight: Any, shape: tuple[int, int], what: str) -> None:
    """Check that ``weight`` is a floating-point matrix of this shape with finite entries.

    Raises:
        TypeError: If it is not a floating-point tensor.
        ValueError: If it has another shape, or contains NaN or infinity.
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"expected {what} to be a floating-point tensor, got {got}")
    if tuple(weight.shape) != shape:
        raise ValueError(f"expected {what} of shape {shape}, got {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError(f"expected {what} to have values, but it is on the meta device; load it first")
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(
            f"expected {what} to be finite, got {bad} NaN or infinite of {weight.numel()} entries; "
            "repair or reload the checkpoint before compressing it"
        )


def same_shapes(got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Check that ``got`` has the names and shapes of ``expected``, no more and no fewer.

    Raises:
        ValueError: If a name is missing, is extra, or has another shape; the message lists all of them.
    """
    complaints = [f"missing {name} {expected[name]}" for name in expected if name not in got]
    complaints += [f"unexpected {name} {got[name]}" for name in got if name not in expected]
    complaints += [
        f"{name}: expected shape {expected[name]}, got {got[name]}"
        for name in expected
        if name in got and tuple(got[name]) != tuple(expected[name])
    ]
    if complaints:
        raise ValueError(f"{what} does not fit: " + "; ".join(complaints))


def one_of(value: Any, choices: Iterable[Any], what: str) -> None:
    """Check that ``value`` is one of ``choices``.

    Raises:
        ValueError: If it is not; the message lists the choices.
    """
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"expected {what} to be one of {', '.join(map(repr, choices))}, got {value!r}")
