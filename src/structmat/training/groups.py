"""Parameter groups for an optimizer: what decays, and at which learning rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from structmat.formats import Blast, Format
from structmat.nn import StructuredModule

NO_DECAY: dict[type[Format], tuple[str, ...]] = {Blast: ("diag",)}
"""Factors of two or more dimensions that hold coefficients rather than a basis, by format: they do not decay.

The factor ``diag`` of BLAST says how much each block takes of each component; what its two bases lose to the decay is
enough to keep the matrix small, and a third factor that decays would pull whole components to 0.
"""


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
    embeddings (unless asked for), and a BLAST layer's ``diag``. Factors whose format fixes their dtype, the widths and
    locations of Gaudi-GBLR, form a group of their own, without weight decay and with ``betas`` ``(0.0, 0.999)`` (Lee &
    Kim 2024, appendix), which optimizers other than Adam's kind ignore. Everything else decays.

    Args:
        model: The network.
        learning_rate: Of everything that is no factor of a structured layer.
        weight_decay: Of what decays.
        structured_learning_rate: Of the factors; None for the same.
        structure_learning_rate: Of widths and locations; None for that of the factors.
        decay_embeddings: Whether embeddings decay; a weight that an embedding shares with the head counts as one.

    Returns:
        Groups with ``"name"``, ``"params"``, ``"lr"`` and ``"weight_decay"``, of those named ``"dense"``,
        ``"dense, no decay"``, ``"structured"``, ``"structured, no decay"`` and ``"structure"`` that are not empty, in
        this order. A parameter that several modules share is in one of them, once.

    Raises:
        ValueError: If a number is negative, or no parameter learns.

    Example:
        >>> from structmat import StructuredLinear
        >>> model = nn.Sequential(StructuredLinear(Blast(64, 64, blocks=4, rank=8)), nn.LayerNorm(64))
        >>> [(group["name"], len(group["params"])) for group in parameter_groups(model, 1e-3, 0.1)]
        [('dense, no decay', 3), ('structured', 2), ('structured, no decay', 1)]
    """
    if structured_learning_rate is None:
        structured_learning_rate = learning_rate
    if structure_learning_rate is None:
        structure_learning_rate = structured_learning_rate
    for what, value in (("learning rates", learning_rate), ("learning rates", structured_learning_rate),
                        ("learning rates", structure_learning_rate), ("a weight decay", weight_decay)):  # fmt: skip
        if not value >= 0:
            raise ValueError(f"expected {what} of at least 0, got {value}")
    groups: dict[str, dict[str, Any]] = {
        "dense": {"lr": learning_rate, "weight_decay": weight_decay},
        "dense, no decay": {"lr": learning_rate, "weight_decay": 0.0},
        "structured": {"lr": structured_learning_rate, "weight_decay": weight_decay},
        "structured, no decay": {"lr": structured_learning_rate, "weight_decay": 0.0},
        "structure": {"lr": structure_learning_rate, "weight_decay": 0.0, "betas": (0.0, 0.999)},
    }
    for name, group in groups.items():
        group.update(name=name, params=[])
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            structured = isinstance(module, StructuredModule) and name in module.factors
            decays = parameter.ndim >= 2 and _decays(module, name, decay_embeddings)
            group = ("structured" if structured else "dense") + ("" if decays else ", no decay")
            if isinstance(module, StructuredModule) and name in module.factors:
                group = group if module.format.factor_specs()[name].dtype is None else "structure"
            groups[group]["params"].append(parameter)
    if not seen:
        raise ValueError("expected a parameter that learns, but none has requires_grad=True")
    return [group for group in groups.values() if group["params"]]


def _decays(module: nn.Module, name: str, decay_embeddings: bool) -> bool:
    """Whether a parameter of two or more dimensions decays."""
    if isinstance(module, StructuredModule) and name in module.factors:
        return not any(isinstance(module.format, kind) and name in names for kind, names in NO_DECAY.items())
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return decay_embeddings
    return "norm" not in type(module).__name__.lower()
