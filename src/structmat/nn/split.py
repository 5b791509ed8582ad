"""What stands in for a module that keeps several matrices in one place: the same module, with a layer for each."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

Kind = TypeVar("Kind", bound=nn.Module)


class SplitModule(nn.Module):
    """A module like one of PyTorch's, whose matrices are layers of their own, so that each can be structured.

    It has the interface of the module that it stands in for and computes the same.
    """

    def joined(self) -> nn.Module:
        """PyTorch's own module with the same weights; every layer must be dense.

        Returns:
            The module.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it stands in for")

    @property
    def is_dense(self) -> bool:
        """Whether every layer is one of PyTorch's own, so that ``joined`` can be called."""
        return all(type(child).__module__.startswith("torch.nn.") for child in self.children())


def linear_over(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer over tensors that are there already.

    Args:
        weight: ``(M, N)``, a parameter or a part of one.
        bias: ``(M,)``; None for none.

    Returns:
        The layer; what is no parameter becomes one on the same memory.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = as_parameter(weight)
    layer.register_parameter("bias", None if bias is None else as_parameter(bias))
    return layer


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """A tensor as a parameter: itself, or a parameter on the same memory that needs a gradient where it does."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)


def joined_parameter(parts: list[Tensor]) -> nn.Parameter:
    """One parameter of several that are one above the other.

    Args:
        parts: The tensors; none is changed.

    Returns:
        The parameter, which needs a gradient if one of them does; a lone one is itself.
    """
    if len(parts) == 1:
        return as_parameter(parts[0])
    return nn.Parameter(torch.cat([part.detach() for part in parts]), any(part.requires_grad for part in parts))


def with_parameters(module: Kind, parameters: dict[str, Tensor | None], training: bool) -> Kind:
    """Give a module on the meta device its parameters.

    Args:
        module: The module.
        parameters: The parameters by name; None where the module has none.
        training: Whether it is in training mode.

    Returns:
        The module.
    """
    for name, value in parameters.items():
        parent, _, own = name.rpartition(".")
        setattr(module.get_submodule(parent), own, None if value is None else as_parameter(value))
    return module.train(training)
