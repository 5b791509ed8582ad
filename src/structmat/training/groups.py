"""Parameter groups for an optimizer: what decays, and at which learning rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from structmat.nn import StructuredModule

STRUCTURE_BETAS = (0.0, 0.999)
"""The ``betas`` of Adam for structural parameters (Lee & Kim 2024, appendix)."""


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    *,
    structured_learning_rate: float | None = None,
    structure_learning_rate: float | None = None,
    decay_embeddings: bool = False,
) -> list[dict[str, Any]]:
    """Sort the parameters that learn into groups for a ``torch.optim`` optimizer.

    Without weight decay are: biases and everything else with fewer than two dimensions, the parameters of norms, the
    embeddings (unless asked for), and the factors that a format names in ``no_decay``, such as a BLAST layer's
    ``diag``: it says how much each block takes of each component; what its two bases lose to the decay is enough to
    keep the matrix small, and a third factor that decays would pull whole components to 0. Factors whose format fixes
    their dtype, such as the widths and locations of Gaudi-GBLR, form a group of their own, without weight decay and
    with ``betas`` ``(0.0, 0.999)`` (Lee & Kim 2024, appendix), which optimizers other than Adam's kind ignore.
    Everything else decays.

    Args:
        model: The network.
        learning_rate: The learning rate of everything that is no factor of a structured layer.
        weight_decay: The weight decay of what decays.
        structured_learning_rate: The learning rate of the factors; None for ``learning_rate``.
        structure_learning_rate: The learning rate of widths and locations; None for that of the factors.
        decay_embeddings: Whether embeddings decay; a weight that an embedding shares with the head counts as one.

    Returns:
        The groups with ``"name"``, ``"params"``, ``"lr"`` and ``"weight_decay"``, of those named ``"dense"``,
        ``"dense, no decay"``, ``"structured"``, ``"structured, no decay"`` and ``"structure"`` that are not empty, in
        this order. A parameter that several modules share is in one of them, once.

    Raises:
        ValueError: If a number is negative, or no parameter learns.

    Example:
        >>> from structmat import Blast, StructuredLinear
        >>> model = nn.Sequential(StructuredLinear(Blast(64, 64, blocks=4, rank=8)), nn.LayerNorm(64))
        >>> [(group["name"], len(group["params"])) for group in parameter_groups(model, 1e-3, 0.1)]
        [('dense, no decay', 3), ('structured', 2), ('structured, no decay', 1)]
    """
    if structured_learning_rate is None:
        structured_learning_rate = learning_rate
    if structure_learning_rate is None:
        structure_learning_rate = structured_learning_rate
    _check_not_negative("learning rates", learning_rate, structured_learning_rate, structure_learning_rate)
    _check_not_negative("a weight decay", weight_decay)
    groups: dict[str, dict[str, Any]] = {
        "dense": {"lr": learning_rate, "weight_decay": weight_decay},
        "dense, no decay": {"lr": learning_rate, "weight_decay": 0.0},
        "structured": {"lr": structured_learning_rate, "weight_decay": weight_decay},
        "structured, no decay": {"lr": structured_learning_rate, "weight_decay": 0.0},
        "structure": {"lr": structure_learning_rate, "weight_decay": 0.0, "betas": STRUCTURE_BETAS},
    }
    for name, group in groups.items():
        group.update(name=name, params=[])
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and parameter.requires_grad:
                seen.add(id(parameter))
                groups[_group_of(module, name, parameter, decay_embeddings)]["params"].append(parameter)
    if not seen:
        raise ValueError("expected a parameter that learns, but none has requires_grad=True")
    return [group for group in groups.values() if group["params"]]


def _check_not_negative(what: str, *values: float) -> None:
    for value in values:
        if not value >= 0:
            raise ValueError(f"expected {what} of at least 0, got {value}")


def _group_of(module: nn.Module, name: str, parameter: nn.Parameter, decay_embeddings: bool) -> str:
    """The name of the group that a parameter of a module belongs to."""
    matrix = parameter.ndim >= 2
    if isinstance(module, StructuredModule) and name in module.factors:
        if module.format.factor_specs()[name].dtype is not None:
            return "structure"
        return "structured" if matrix and name not in module.format.no_decay else "structured, no decay"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        decays = matrix and decay_embeddings
    else:
        decays = matrix and "norm" not in type(module).__name__.lower()
    return "dense" if decays else "dense, no decay"
