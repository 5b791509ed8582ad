"""Modules that hold several matrices in one place, and the network as it is once they are split into layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from structmat.nn import SplitAttention, SplitGroups, SplitModule, SplitRecurrent

SPLITS: dict[type[nn.Module], type[SplitModule]] = {
    nn.MultiheadAttention: SplitAttention,
    nn.LSTM: SplitRecurrent,
    nn.GRU: SplitRecurrent,
    nn.RNN: SplitRecurrent,
    nn.Conv1d: SplitGroups,
    nn.Conv2d: SplitGroups,
    nn.ConvTranspose1d: SplitGroups,
    nn.ConvTranspose2d: SplitGroups,
}
"""What stands in for each type of module that holds several matrices; for a convolution, where it has groups."""

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


@dataclass(frozen=True)
class Holder:
    """A module that holds several matrices.

    Attributes:
        names: Every name under which it hangs in the network.
        module: The module.
        twin: The same with a layer for each matrix; its parameters are on the memory of the module's.
    """

    names: tuple[str, ...]
    module: nn.Module
    twin: SplitModule


@dataclass(frozen=True)
class Opened:
    """The modules of a network as they are once those that hold several matrices are split.

    Attributes:
        modules: Every name and the module under it, in the order of ``named_modules``; one that hangs under several
            names is there for each of them.
        holders: What was split, by the ``id`` of each module inside the twin.
        problems: The reason why a module that holds several matrices cannot be split, by its ``id``.
        closed: The ``id`` of every module inside of one that cannot be split.
    """

    modules: list[tuple[str, nn.Module]] = field(default_factory=list)
    holders: dict[int, Holder] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)


def opened(model: nn.Module) -> Opened:
    """Look at a network as it is once its modules that hold several matrices are split; it does not change.

    Args:
        model: The network.

    Returns:
        Its modules.
    """
    names: dict[int, list[str]] = {}
    users: dict[int, set[int]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), set()).add(id(module))
    found = Opened()
    twins: dict[int, nn.Module] = {}
    for module in model.modules():
        if is_fused(module):
            problem = _problem_of(module, users, module is model)
            if problem is not None:
                found.problems[id(module)] = problem
                found.closed.update(id(child) for child in module.modules() if child is not module)
                continue
            twin = twins[id(module)] = SPLITS[type(module)](module)  # pyright: ignore[reportCallIssue]
            holder = Holder(tuple(names[id(module)]), module, twin)
            found.holders.update((id(child), holder) for child in twin.modules())
    found.modules.extend(_walk(model, "", twins))
    return found


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds several matrices in one place."""
    kind = next((kind for kind in SPLITS if isinstance(module, kind)), None)
    return kind is not None and (SPLITS[kind] is not SplitGroups or getattr(module, "groups", 1) != 1)


def _walk(module: nn.Module, name: str, twins: dict[int, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Every module under its names, with twins for those that have one."""
    module = twins.get(id(module), module)
    yield name, module
    for own, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{own}" if name else own, twins)


def _problem_of(module: nn.Module, users: dict[int, set[int]], is_model: bool) -> str | None:
    """Why a module that holds several matrices cannot be split, or None."""
    kind = type(module)
    if kind not in SPLITS:
        base = next(base for base in SPLITS if isinstance(module, base))
        return f"it is a {kind.__name__}, a {base.__name__} that may use its weights in other ways"
    if isinstance(module, nn.modules.conv._ConvNd) and "weight" not in module._parameters:
        return "its weight is computed from others (pruning, weight or spectral norm); make it permanent first"
    if is_model:
        return "it is the whole model, which cannot be replaced in place; wrap it in nn.Sequential"
    inside = {id(part) for part in module.modules()}
    own = list(module.parameters())
    if any(users[id(parameter)] - inside for parameter in own):
        return "one of its weights is shared with another module, which would keep the dense one; untie them first"
    extras = _extras(module)
    if extras:
        return f"it holds {', '.join(map(repr, extras))} too, which would be lost; move them to another module"
    for part in module.modules():
        problem = lost_with(part)
        if problem:
            return problem
    return next((problem for parameter in own if (problem := weight_problem(parameter))), _size_problem(module))


def _extras(module: nn.Module) -> list[str]:
    """What a module holds that PyTorch's own of its type does not."""
    children = {"out_proj"} if isinstance(module, nn.MultiheadAttention) else set()
    names = {"weight", "bias"}
    if isinstance(module, nn.MultiheadAttention):
        names = {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias"}
        names |= {"bias_k", "bias_v"}
    elif isinstance(module, nn.RNNBase):
        names = {name for one in module._all_weights for name in one}
    own = [name for name in (*module._parameters, *module._buffers) if name not in names]
    return [*own, *(name for name in module._modules if name not in children)]


def _size_problem(module: nn.Module) -> str | None:
    """Why the groups of a convolution have no matrix that a structure could make smaller, or None."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)):
        return None
    rows, columns = module.weight.shape[0] // module.groups, module.weight[0].numel()
    if min(rows, columns) > 1:
        return None
    return (
        f"it is a convolution with {module.groups} groups, whose matrices of {rows} x {columns} have one row or column "
        "each, which no structure makes smaller"
    )


def lost_with(layer: nn.Module) -> str | None:
    """What would be lost if a module were replaced, as the reason why it is not, or None.

    Args:
        layer: The module.

    Returns:
        The reason.
    """
    if any(getattr(layer, kind) for kind in HOOKS):
        return "it has hooks, which would be lost; remove them first and add them to the new layer"
    if "forward" in vars(layer):
        return (
            "its forward was replaced, by accelerate for example, and that would be lost; put the original back first"
        )
    return None


def weight_problem(weight: Tensor) -> str | None:
    """Why a weight is none that can be approximated, or None.

    Args:
        weight: The parameter.

    Returns:
        The reason.
    """
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return "its weight has gradient hooks, which would be lost; remove them first"
    if is_traceable_wrapper_subclass(weight) or weight.layout != torch.strided or weight.dtype not in PLAIN_DTYPES:
        kind = str(weight.dtype).removeprefix("torch.") if weight.layout == torch.strided else str(weight.layout)
        kind = type(weight.data).__name__ if is_traceable_wrapper_subclass(weight) else kind
        return f"its weight is no plain matrix of floating-point numbers but {kind}; turn it into one first"
    return None
