"""Structured layers that pass for dense ones, so that adapters beside a layer are put there and merged."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from structmat.formats import Format
from structmat.formats.merged import plus_low_rank
from structmat.nn.conv import StructuredConv1d, StructuredConv2d
from structmat.nn.linear import StructuredLinear, StructuredModule
from structmat.nn.weight import ReadOnlyWeight
from structmat.ops.factoring import low_rank_of

SLACK = 4
"""How many times the rounding error of its dtype a change may be off a matrix of low rank."""


class MergeableWeight(ReadOnlyWeight):
    """The dense weight of a layer that takes changes of low rank: ``+=`` and ``-=`` on it or its ``data``.

    A clone of it gathers changes, which the layer takes when the clone becomes its ``data``.
    """

    _layer: Any
    _clone: bool
    _change: Tensor | None

    @staticmethod
    def on(layer: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, clone: bool) -> Tensor:
        """The weight of a layer, or a clone of it."""
        weight = torch.empty((), dtype=dtype, device=device).expand(shape).as_subclass(MergeableWeight)
        weight._layer, weight._clone, weight._change = layer, clone, None

        def make() -> Tensor:
            matrix = layer.in_dense_layout(layer.to_dense())
            return matrix if weight._change is None else matrix.detach() + weight._change

        weight._make = make
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, own = func.__name__, args[0] if args else None
        if not isinstance(own, MergeableWeight):
            return super().__torch_function__(func, types, args, kwargs)
        is_data = getattr(getattr(func, "__self__", None), "__name__", "") == "data"
        if is_data and name == "__get__":
            return own
        if name in ("__iadd__", "add_") or name in ("__isub__", "sub_"):
            sign = 1 if name in ("__iadd__", "add_") else -1
            change = sign * (kwargs or {}).get("alpha", 1) * args[1].detach()
            with torch._C.DisableTorchFunctionSubclass():
                own._take(change)
            return own
        if name == "clone":
            with torch._C.DisableTorchFunctionSubclass():
                return MergeableWeight.on(own._layer, tuple(own.shape), own.dtype, own.device, True)
        if is_data and name == "__set__":
            with torch._C.DisableTorchFunctionSubclass():
                own._become(args[1])
            return None
        return super().__torch_function__(func, types, args, kwargs)

    def _take(self, change: Tensor) -> None:
        if self._clone:
            self._change = change.clone() if self._change is None else self._change + change
        else:
            self._layer.absorb_(change)

    def _become(self, value: Tensor) -> None:
        """Take the place of the weight: another weight of the layer, or a matrix."""
        if isinstance(value, MergeableWeight) and value._layer is self._layer:
            if value._change is not None:
                self._layer.absorb_(value._change)
            return
        dense = self._layer.in_dense_layout(self._layer.to_dense()).detach()
        self._layer.absorb_(value.detach() - dense, float(dense.double().norm()))


class Adaptable(StructuredModule):
    """A structured layer whose dense weight takes changes of low rank.

    A change goes into the factors, exactly up to rounding, so that the format has a higher rank afterwards; when it is
    taken back, the layer is as it was before.
    """

    groups = 1
    """What adapters of convolutions ask for."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make an empty layer, or with arguments the dense one, as adapters make their own with a layer's type."""
        dense = next(base for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules.") or not args)
        return dense(*args, **kwargs) if args else super().__new__(cls)

    @property
    def weight(self) -> Tensor:
        """The weight of the dense layer; changes of low rank on it are taken into the factors."""
        plain = StructuredModule.weight.fget(self)  # pyright: ignore[reportOptionalCall]
        return MergeableWeight.on(self, tuple(plain.shape), plain.dtype, plain.device, False)

    @torch.no_grad()
    def absorb_(self, change: Tensor, scale: float = 0.0) -> None:
        """Add a matrix of low rank to the layer's, in place.

        Args:
            change: The matrix in the layout of the dense weight.
            scale: The Frobenius norm of what the change was computed from, whose rounding errors it has.

        Raises:
            ValueError: If the rank is so high that the structure would not pay.
        """
        matrix = self.out_of_dense_layout(change)
        origin: tuple[Format, Mapping[str, Tensor], Tensor] | None = vars(self).get("_origin")
        if origin is None:
            format, factors, total = self.format, self.factors, matrix.float()
        else:
            format, factors = origin[0], origin[1]
            total, scale = origin[2] + matrix.float(), max(scale, float(origin[2].norm()))
        noise = SLACK * torch.finfo(change.dtype).eps * max(scale, float(matrix.double().norm()))
        left, right = low_rank_of(total, noise)
        rank = left.shape[1]
        if rank * sum(self.format.shape) >= self.format.M * self.format.N:
            raise ValueError(
                f"expected a change of low rank for {self.format}, got one of rank {rank}, which a dense matrix holds "
                "in fewer numbers; densify_ the layer first, and merge then"
            )
        if rank == 0:
            vars(self).pop("_origin", None)
            self._become(format, factors)
            return
        kind = next(factor.dtype for factor in factors.values() if factor.is_floating_point())
        new = plus_low_rank(format, factors, left.to(kind), right.to(kind))
        vars(self)["_origin"] = (format, dict(factors), total)
        self._become(*new)

    def _become(self, format: Format, factors: Mapping[str, Tensor]) -> None:
        """Hold other factors."""
        learns = any(factor.requires_grad for factor in self.factors.values())
        for name in self._factor_names:
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
        self._hold(format, {name: factor.detach() for name, factor in factors.items()}, learns)


class AdaptableLinear(Adaptable, StructuredLinear, nn.Linear):  # pyright: ignore - it is one of ours, and passes for PyTorch's
    """A ``StructuredLinear`` that passes for an ``nn.Linear``."""


class AdaptableConv1d(Adaptable, StructuredConv1d, nn.Conv1d):  # pyright: ignore - it is one of ours, and passes for PyTorch's
    """A ``StructuredConv1d`` that passes for an ``nn.Conv1d``."""


class AdaptableConv2d(Adaptable, StructuredConv2d, nn.Conv2d):  # pyright: ignore - it is one of ours, and passes for PyTorch's
    """A ``StructuredConv2d`` that passes for an ``nn.Conv2d``."""


ADAPTABLE: dict[type[StructuredModule], type[Adaptable]] = {
    StructuredLinear: AdaptableLinear,
    StructuredConv1d: AdaptableConv1d,
    StructuredConv2d: AdaptableConv2d,
}
"""What passes for a dense layer, by the type of structured layer."""


def adaptable(layer: StructuredModule) -> Adaptable:
    """A layer that shares the parameters of a structured one and passes for a dense one.

    Args:
        layer: The structured layer, of a type in ``ADAPTABLE``.

    Returns:
        The layer.
    """
    new = copy.copy(layer)
    new._parameters, new._buffers = dict(layer._parameters), dict(layer._buffers)
    new.__class__ = ADAPTABLE[type(layer)]
    return cast("Adaptable", new)
