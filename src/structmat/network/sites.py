"""Which modules of a network can be structured, and how one is built from the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from structmat.formats import Format
from structmat.network.fused import Holder, lost_with, opened, weight_problem
from structmat.nn import (
    StructuredConv,
    StructuredConv1d,
    StructuredConv2d,
    StructuredConvTranspose,
    StructuredConvTranspose1d,
    StructuredConvTranspose2d,
    StructuredLinear,
    StructuredModule,
    unfolded,
    unfolded_results,
)


def _as_it_is(layer: nn.Module, x: Tensor) -> Tensor:
    """The vectors of a linear layer, which are in the last axis."""
    return x


@dataclass(frozen=True)
class DenseKind:
    """How a type of dense layer stores its weight and what replaces it.

    Attributes:
        matrix: The weight of a layer as ``(M, N)``.
        problem: Why this layer has no structured counterpart, or None.
        structured: The counterpart of a layer for a format, its factors (None: random) and a source of randomness;
            without the bias' values.
        vectors: The vectors ``(..., N)`` that the matrix of a layer multiplies, of the layer's input.
        gradients: The gradients ``(..., M)`` at the products, of the gradient at the layer's output.
        biased: Whether the bias has one number for each row of the matrix.
    """

    matrix: Callable[[nn.Module], Tensor]
    problem: Callable[[nn.Module], str | None]
    structured: Callable[[nn.Module, Format, Mapping[str, Tensor] | None, torch.Generator | None], StructuredModule]
    vectors: Callable[[nn.Module, Tensor], Tensor] = _as_it_is
    gradients: Callable[[nn.Module, Tensor], Tensor] = _as_it_is
    biased: bool = True

    @property
    def reads_all(self) -> bool:
        """Whether layers that read the same input multiply the same vectors."""
        return self.vectors is _as_it_is


def dense_weight(layer: nn.Module) -> Tensor:
    """The layer's ``weight``, a parameter or (where it is pruned, say) a tensor computed from others."""
    return cast("Tensor", layer.weight)


def _linear(
    layer: nn.Module, format: Format, factors: Mapping[str, Tensor] | None, generator: torch.Generator | None
) -> StructuredLinear:
    weight, bias = layer.get_parameter("weight"), layer._parameters["bias"]
    return StructuredLinear(
        format, bias is not None, factors=factors, generator=generator, device=weight.device, dtype=weight.dtype
    )


def _conv(
    kind: type[StructuredConv],
) -> Callable[[Any, Format, Mapping[str, Tensor] | None, torch.Generator | None], StructuredConv]:
    def made(
        layer: Any, format: Format, factors: Mapping[str, Tensor] | None, generator: torch.Generator | None
    ) -> StructuredConv:
        if not isinstance(layer, (nn.Conv1d, nn.Conv2d)):
            raise TypeError(f"expected an nn.Conv1d or nn.Conv2d, got {type(layer).__name__}")
        return kind(
            format,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.padding_mode,
            layer.bias is not None,
            factors=factors,
            generator=generator,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )

    return made


def _transposed(
    kind: type[StructuredConvTranspose],
) -> Callable[[Any, Format, Mapping[str, Tensor] | None, torch.Generator | None], StructuredConvTranspose]:
    def made(
        layer: Any, format: Format, factors: Mapping[str, Tensor] | None, generator: torch.Generator | None
    ) -> StructuredConvTranspose:
        return kind(
            format,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.output_padding,
            layer.dilation,
            layer.bias is not None,
            factors=factors,
            generator=generator,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
        )

    return made


def _batch(layer: nn.Module, x: Tensor) -> Tensor:
    """An input or output of a convolution with its batch."""
    return x if x.ndim == dense_weight(layer).ndim else x[None]


def _conv_kind(kind: type[StructuredConv]) -> DenseKind:
    return DenseKind(
        lambda layer: dense_weight(layer).flatten(1),
        lambda layer: None,
        _conv(kind),
        lambda layer, x: unfolded(cast("nn.Conv2d", layer), _batch(layer, x))[0],
        lambda layer, y: _batch(layer, y).flatten(2).mT,
    )


def _transposed_kind(kind: type[StructuredConvTranspose]) -> DenseKind:
    return DenseKind(
        lambda layer: dense_weight(layer).flatten(1).mT,
        lambda layer: None,
        _transposed(kind),
        lambda layer, x: _batch(layer, x).flatten(2).mT,
        lambda layer, y: unfolded_results(cast("nn.ConvTranspose2d", layer), _batch(layer, y)),
        biased=False,
    )


DENSE_KINDS: dict[type[nn.Module], DenseKind] = {
    nn.Linear: DenseKind(dense_weight, lambda layer: None, _linear),
    nn.Conv1d: _conv_kind(StructuredConv1d),
    nn.Conv2d: _conv_kind(StructuredConv2d),
    nn.ConvTranspose1d: _transposed_kind(StructuredConvTranspose1d),
    nn.ConvTranspose2d: _transposed_kind(StructuredConvTranspose2d),
}
"""Every type of dense layer that can be structured; a subclass, whose forward may do other things, cannot."""


@dataclass(frozen=True)
class Site:
    """A weight that can be structured, and everything in the network that uses it.

    Attributes:
        name: The first name of its first module.
        names: Every name under which a module of it hangs in the network.
        modules: The module, and after it others that share its weight.
        problem: Why it cannot be structured, or None.
        holder: The module that holds its weight together with others, if one does: the site's modules are in the twin
            of it, which surgery puts into its place.
    """

    name: str
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    problem: str | None = None
    holder: Holder | None = None

    @property
    def module(self) -> nn.Module:
        """The module of that name."""
        return self.modules[0]

    @property
    def matrix(self) -> Tensor:
        """The dense weight ``(M, N)``."""
        return self.matrix_of(self.module)

    def matrix_of(self, module: nn.Module) -> Tensor:
        """The dense weight ``(M, N)`` of a copy of the module."""
        return DENSE_KINDS[type(self.module)].matrix(module)

    @property
    def own_bias(self) -> Tensor | None:
        """The bias ``(M,)``, if there is one module, and it has one with a number for each row of the matrix."""
        if len(self.modules) > 1 or not DENSE_KINDS[type(self.module)].biased:
            return None
        return self.module._parameters["bias"]

    @property
    def all_names(self) -> tuple[str, ...]:
        """The names of the site, and of the module that holds it."""
        return (*self.names, *(() if self.holder is None else self.holder.names))


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Find every dense weight of the network that could be structured, each once however often it is used.

    Args:
        model: The network.

    Returns:
        The sites by name, in the order of ``named_modules``.
    """
    found = opened(model)
    names: dict[int, list[str]] = {}
    users: dict[int, list[nn.Module]] = {}
    modules: dict[int, tuple[str, nn.Module]] = {}
    for name, module in found.modules:
        names.setdefault(id(module), []).append(name)
        if id(module) not in modules:
            modules[id(module)] = name, module
            for parameter in module._parameters.values():
                if parameter is not None:
                    users.setdefault(id(parameter), []).append(module)

    sites: dict[str, Site] = {}
    seen: set[int] = set()
    for name, module in modules.values():
        if id(module) in found.problems:
            sites[name] = Site(name, tuple(names[id(module)]), (module,), found.problems[id(module)])
            continue
        if id(module) in found.closed or isinstance(module, StructuredModule):
            continue
        if not isinstance(module, tuple(DENSE_KINDS)):
            continue
        if type(module) not in DENSE_KINDS or "weight" not in module._parameters:
            sites[name] = Site(name, tuple(names[id(module)]), (module,), _problem_alone(module))
            continue
        if id(module.weight) in seen:
            continue
        seen.add(id(module.weight))
        sharing = users[id(module.weight)]
        alike = [m for m in sharing if type(m) is type(module) and m.weight is module.weight]
        others = [m for m in sharing if all(m is not one for one in alike)]
        if others:
            culprit = f"{names[id(others[0])][0]!r} ({type(others[0]).__name__})"
            problem = f"its weight is shared with {culprit}, which would keep the dense one; untie them first"
        elif name == "":
            problem = "it is the whole model, which cannot be replaced in place; wrap it in nn.Sequential"
        else:
            problem = next((one for m in alike if (one := _problem_of(m))), None)
        own = (module, *(m for m in alike if m is not module))
        holder = found.holders.get(id(module))
        sites[name] = Site(name, tuple(n for m in own for n in names[id(m)]), own, problem, holder)
    return sites


def _problem_alone(module: nn.Module) -> str:
    """Why a layer that is no plain linear layer or convolution, or has no weight of its own, cannot be structured."""
    if type(module) in DENSE_KINDS:
        return "its weight is computed from others (pruning, weight or spectral norm); make it permanent first"
    base = next(base for base in DENSE_KINDS if isinstance(module, base))
    return f"it is a {type(module).__name__}, a {base.__name__} that may use its weight in other ways"


def _problem_of(layer: nn.Module) -> str | None:
    """Why a layer whose weight is its own cannot be structured, or None."""
    weight = layer.get_parameter("weight")
    lost = lost_with(layer)
    if lost is not None:
        return lost
    extras = [*layer._modules, *layer._buffers, *(n for n in layer._parameters if n not in ("weight", "bias"))]
    if extras:
        return f"it holds {', '.join(map(repr, extras))} too, which would be lost; move them to another module"
    return weight_problem(weight) or DENSE_KINDS[type(layer)].problem(layer)


def structured_layers(model: nn.Module) -> dict[str, StructuredModule]:
    """The structured layers of a network by their first names.

    Args:
        model: The network.

    Returns:
        The layers.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, StructuredModule)}
