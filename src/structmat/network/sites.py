"""Which modules of a network can be structured, and how one is built from the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from structmat.formats import Format
from structmat.nn.conv import StructuredConv2d
from structmat.nn.linear import StructuredLinear, StructuredModule


@dataclass(frozen=True)
class DenseKind:
    """How a type of dense layer stores its weight and what replaces it.

    Attributes:
        matrix: The weight of a layer as ``(M, N)``.
        problem: Why this layer has no structured counterpart, or None.
        structured: The counterpart of a layer for a format, its factors (None: random) and a source of randomness;
            without the bias' values.
    """

    matrix: Callable[[nn.Module], Tensor]
    problem: Callable[[nn.Module], str | None]
    structured: Callable[[nn.Module, Format, Mapping[str, Tensor] | None, torch.Generator | None], StructuredModule]


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


def _conv2d(
    layer: nn.Module, format: Format, factors: Mapping[str, Tensor] | None, generator: torch.Generator | None
) -> StructuredConv2d:
    if not isinstance(layer, nn.Conv2d):
        raise TypeError(f"expected an nn.Conv2d, got {type(layer).__name__}")
    return StructuredConv2d(
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


def _conv2d_problem(layer: nn.Module) -> str | None:
    return (
        f"it is a convolution with {layer.groups} groups; only groups=1 has one matrix" if layer.groups != 1 else None
    )


DENSE_KINDS: dict[type[nn.Module], DenseKind] = {
    nn.Linear: DenseKind(dense_weight, lambda layer: None, _linear),
    nn.Conv2d: DenseKind(lambda layer: dense_weight(layer).flatten(1), _conv2d_problem, _conv2d),
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
    """

    name: str
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    problem: str | None = None

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
        """The bias ``(M,)``, if there is one module, and it has one."""
        return self.module._parameters["bias"] if len(self.modules) == 1 else None


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Find every dense weight of the network that could be structured, each once however often it is used.

    Args:
        model: The network.

    Returns:
        The sites by name, in the order of ``named_modules``.
    """
    names: dict[int, list[str]] = {}
    users: dict[int, list[nn.Module]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        first = id(module) not in names
        names.setdefault(id(module), []).append(name)
        if first:
            for parameter in module._parameters.values():
                if parameter is not None:
                    users.setdefault(id(parameter), []).append(module)

    sites: dict[str, Site] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
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
            problem = next((found for m in alike if (found := _problem_of(m))), None)
        modules = (module, *(m for m in alike if m is not module))
        sites[name] = Site(name, tuple(n for m in modules for n in names[id(m)]), modules, problem)
    return sites


def _problem_alone(module: nn.Module) -> str:
    """Why a layer that is no plain linear layer or convolution, or has no weight of its own, cannot be structured."""
    if type(module) in DENSE_KINDS:
        return "its weight is computed from others (pruning, weight or spectral norm); make it permanent first"
    base = next(base for base in DENSE_KINDS if isinstance(module, base))
    return f"it is a {type(module).__name__}, a {base.__name__} that may use its weight in other ways"


HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Where ``nn.Module`` keeps the hooks that a user can register."""

PLAIN_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes of weights that can be approximated."""


def _problem_of(layer: nn.Module) -> str | None:
    """Why a layer whose weight is its own cannot be structured, or None."""
    weight = layer.get_parameter("weight")
    if any(getattr(layer, kind) for kind in HOOKS):
        return "it has hooks, which would be lost; remove them first and add them to the new layer"
    if "forward" in vars(layer):
        return (
            "its forward was replaced, by accelerate for example, and that would be lost; put the original back first"
        )
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return "its weight has gradient hooks, which would be lost; remove them first"
    extras = [*layer._modules, *layer._buffers, *(n for n in layer._parameters if n not in ("weight", "bias"))]
    if extras:
        return f"it holds {', '.join(map(repr, extras))} too, which would be lost; move them to another module"
    if is_traceable_wrapper_subclass(weight) or weight.layout != torch.strided or weight.dtype not in PLAIN_DTYPES:
        kind = str(weight.dtype).removeprefix("torch.") if weight.layout == torch.strided else str(weight.layout)
        kind = type(weight.data).__name__ if is_traceable_wrapper_subclass(weight) else kind
        return f"its weight is no plain matrix of floating-point numbers but {kind}; turn it into one first"
    return DENSE_KINDS[type(layer)].problem(layer)


def structured_layers(model: nn.Module) -> dict[str, StructuredModule]:
    """The structured layers of a network by their first names.

    Args:
        model: The network.

    Returns:
        The layers.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, StructuredModule)}


def unseen_weights(model: nn.Module) -> dict[str, str]:
    """Every matrix of the network that no walker over its layers can see, and why.

    Such are experts that a model fuses into one parameter of three dimensions, the projections inside
    ``nn.MultiheadAttention`` and recurrent layers, transposed convolutions, and learned position tables.

    Args:
        model: The network.

    Returns:
        What holds each parameter that has at least two dimensions larger than 1 and belongs to no dense layer, no
        embedding and no structured layer, by the parameter's name.
    """
    seen = (*DENSE_KINDS, nn.Embedding, nn.EmbeddingBag, StructuredModule)
    unseen: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, seen):
            continue
        for own, parameter in module._parameters.items():
            if parameter is not None and not is_lazy(parameter) and sum(size > 1 for size in parameter.shape) > 1:
                shape = " x ".join(map(str, parameter.shape))
                unseen[f"{name}.{own}" if name else own] = (
                    f"{shape}, held by a {type(module).__name__}, which is no linear layer or convolution to replace"
                )
    return unseen
