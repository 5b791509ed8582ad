"""What code that expects a dense ``weight`` finds on a structured layer: something to read, never to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

METADATA = frozenset({"shape", "dtype", "device", "layout", "ndim", "is_meta", "is_cuda", "is_sparse", "is_quantized"})
"""Attributes that are known without the matrix."""

METADATA_METHODS = frozenset({"size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex"})
"""Methods that need no matrix either."""

WRITES = frozenset(
    {"__set__", "__delete__", "__setitem__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"}
)
"""Functions that change their argument but do not end in ``_``."""


class ReadOnlyWeight(torch.Tensor):
    """The dense weight of a structured layer, computed when something looks at its values.

    Shape, dtype and device cost nothing. Everything else takes the matrix from the factors, differentiably; results
    are plain tensors, except for views, which are read-only too. A write would be lost, because the layer owns its
    factors and no matrix; it is refused, in whatever form it comes: in-place methods, ``.data``, items, ``out=``.
    """

    _make: Callable[[], Tensor]

    @staticmethod
    def of(make: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A weight of this shape whose values ``make`` computes."""
        stand_in = torch.empty((), dtype=dtype, device=device).expand(shape).as_subclass(ReadOnlyWeight)
        stand_in._make = make
        return stand_in

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if (
            name in WRITES
            or (name.endswith("_") and not name.endswith("__"))
            or isinstance(kwargs.get("out"), ReadOnlyWeight)
        ):
            raise RuntimeError(
                f"expected the weight of a structured layer to be read only, got {name!r}: the layer owns factors and "
                "no matrix, so that the change would be lost; change its factors, or densify_ the layer first"
            )
        with torch._C.DisableTorchFunctionSubclass():
            attribute = getattr(getattr(func, "__self__", None), "__name__", "")
            if (name == "__get__" and attribute in METADATA) or name in METADATA_METHODS:
                return func(*args, **kwargs)
            made: list[Tensor] = []
            result = func(*_plain(args, made), **_plain(kwargs, made))
            return _guarded(result, {tensor.untyped_storage()._cdata for tensor in made})


def _plain(value: Any, made: list[Tensor]) -> Any:
    """``value`` with every weight in it computed; those are added to ``made``."""
    if isinstance(value, ReadOnlyWeight):
        made.append(value._make())
        return made[-1]
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_plain(item, made) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item, made) for key, item in value.items()}
    return value


def _guarded(result: Any, storages: set[int]) -> Any:
    """``result``, read-only where it is a view of a computed weight."""
    if isinstance(result, (tuple, list)) and type(result) in (tuple, list):
        return type(result)(_guarded(item, storages) for item in result)
    if isinstance(result, Tensor) and result.layout == torch.strided and result.untyped_storage()._cdata in storages:
        return ReadOnlyWeight.of(lambda: result, tuple(result.shape), result.dtype, result.device)
    return result
