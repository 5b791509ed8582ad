"""What a configuration of transformers or diffusers says about the structured layers of its model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from structmat.nn import StructuredModule
from structmat.plan import SCHEMA_VERSION, Plan, plan_of

QUANT_METHOD = "structmat"
"""The name under which both frameworks know the library."""


def recorded(model: nn.Module) -> dict[str, Any] | None:
    """Describe a network for its configuration: the format of each structured layer, and which layers share factors.

    Args:
        model: The network.

    Returns:
        The arguments of ``Recorded``; None where no layer is structured.
    """
    plan = plan_of(model)
    return {"layers": json.loads(plan.to_json())["layers"], "ties": ties_of(model)} if plan else None


def ties_of(model: nn.Module) -> dict[str, str]:
    """The structured layers that have the factors of an earlier one: their names, and the name of the earlier one."""
    owners: dict[tuple[int, ...], str] = {}
    ties: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, StructuredModule):
            owner = owners.setdefault(tuple(id(factor) for factor in module.factors.values()), name)
            if owner != name:
                ties[name] = owner
    return ties


def is_ours(config: Any) -> bool:
    """Whether a ``quantization_config``, an object or a dictionary from a file, is one of this library."""
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    return getattr(method, "value", method) == QUANT_METHOD


class Recorded:
    """The fields of the ``quantization_config``, for either framework's base class.

    Args:
        layers: The format of each structured layer by module name, in its JSON form.
        ties: The names of layers that share the factors of another one, and the name of the other one.
        schema: The version of the JSON form, which is that of a plan.
        other: Further arguments that a framework passes; they are ignored.

    Raises:
        ValueError: If this version does not know the schema, or cannot read a format.
    """

    quant_method: Any = QUANT_METHOD

    def __init__(
        self,
        layers: Mapping[str, Any] | None = None,
        ties: Mapping[str, str] | None = None,
        schema: int = SCHEMA_VERSION,
        **other: Any,
    ) -> None:
        self.quant_method = type(self).quant_method
        self.schema = schema
        self.layers = dict(layers or {})
        self.ties = dict(ties or {})
        self.plan()

    def plan(self) -> Plan:
        """The plan of the structured layers."""
        return Plan.from_json(json.dumps({"schema": self.schema, "layers": self.layers, "skipped": {}}))
