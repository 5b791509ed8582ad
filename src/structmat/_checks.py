"""One-sentence checks of what comes in: "expected …, got …", and the remedy."""

from __future__ import annotations

import math
import reprlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LARGEST_AXIS = 10**9
"""The longest axis of a matrix for which a message lists the divisors, which takes no time up to here."""

LARGEST_INT = 2**63 - 1
"""The largest integer of a tensor, and so of every size."""

MOST_COMPONENTS = 10**6
"""The most components of one matrix: some operations need a few numbers for each, whatever the matrix' shape."""

Kind = type | tuple[type, ...]
"""What a value of a file may be; ``float`` stands for every finite number."""

_NAMES = {dict: "an object", list: "a list", str: "text", int: "an integer", float: "a number", bool: "true or false"}


def positive_int(value: Any, what: str, most: int = LARGEST_INT) -> int:
    """Return ``value`` if it is an integer from 1 to ``most``.

    Raises:
        ValueError: If it is anything else.
    """
    return _int_from(1, value, what, most)


def natural_int(value: Any, what: str, most: int = LARGEST_INT) -> int:
    """Return ``value`` if it is an integer from 0 to ``most``.

    Raises:
        ValueError: If it is anything else.
    """
    return _int_from(0, value, what, most)


def _int_from(least: int, value: Any, what: str, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"expected {what} to be an integer of at least {least}, got {shown(value)}")
    if value > most:
        raise ValueError(f"expected {what} to be an integer of at most {most}, got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """The value as text for a message: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 120, 120, 60


def typed(value: Any, kind: Kind, what: str) -> Any:
    """Return ``value`` if it is of this kind.

    Raises:
        ValueError: If it is of another kind.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not any(_is_of(one, value) for one in kinds):
        raise ValueError(
            f"expected {what} to be {' or '.join(_NAMES.get(one, 'null') for one in kinds)}, got {shown(value)}"
        )
    return value


def _is_of(kind: type, value: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    return isinstance(value, Mapping if kind is dict else kind) and (kind is bool or not isinstance(value, bool))


def fields(value: Any, kinds: Mapping[str, Kind], what: str) -> dict[str, Any]:
    """Return the named fields of an object of a file.

    Args:
        value: What the file has.
        kinds: The kind of each field that has to be there, by name.
        what: What it is, for messages.

    Returns:
        The fields by name, others left out.

    Raises:
        ValueError: If it is no object, or lacks a field, or one is of another kind.
    """
    names = " and ".join(filter(None, (", ".join(map(repr, [*kinds][:-1])), repr([*kinds][-1]))))
    if not isinstance(value, Mapping):
        raise ValueError(f"expected {what} with {names}, got {shown(value)}")
    missing = [name for name in kinds if name not in value]
    if missing:
        raise ValueError(f"expected {what} with {names}, got it without {', '.join(map(repr, missing))}")
    return {name: typed(value[name], kind, f"{name!r} of {what}") for name, kind in kinds.items()}


def values(value: Any, kind: Kind, what: str) -> dict[str, Any]:
    """Return an object of a file whose values are all of one kind.

    Raises:
        ValueError: If it is no object, or a value is of another kind.
    """
    return {name: typed(one, kind, f"{shown(name)} of {what}") for name, one in typed(value, dict, what).items()}


def fraction(value: Any, what: str) -> float:
    """Return ``value`` as a float if it lies in ``(0, 1]``.

    Raises:
        ValueError: If it does not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"expected {what} to be in (0, 1], got {shown(value)}")
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
        raise ValueError(f"expected blocks to be one count or a pair (rows, columns), got {shown(blocks)}")
    for count, size, axis in zip(pair, (M, N), ("rows", "columns"), strict=True):
        positive_int(count, f"the block count along the {axis}")
        if size % count:
            known = listed_divisors(size, f"; the divisors of {size} are ")
            raise ValueError(f"expected a block count that divides the {size} {axis}, got {count}{known}")
    return pair


def listed_divisors(n: int, begin: str) -> str:
    """The divisors of ``n`` as the end of a message that begins so; empty where it takes long to find them."""
    return begin + ", ".join(map(str, divisors(n))) if n <= LARGEST_AXIS else ""


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


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds no NaN and no infinity; one without values is taken for finite."""
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    values = tensor.detach() if tensor.dtype.itemsize > 1 else tensor.detach().float()
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())  # a sum is fast, and may overflow


@contextmanager
def about(place: str) -> Iterator[None]:
    """Let every ``ValueError`` that comes up while this is entered name the file or folder that it is about."""
    try:
        yield
    except ValueError as error:
        if repr(place) in str(error):
            raise
        raise ValueError(f"{place!r}: {error}") from error


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
        raise ValueError(f"expected {what} to be one of {', '.join(map(repr, choices))}, got {shown(value)}")
