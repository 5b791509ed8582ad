"""What a configuration of transformers or diffusers says about the structured layers of its model."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn

from structmat import _checks
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


def refuse_adapters(model: nn.Module) -> None:
    """Refuse to save a structured model while adapters of peft are in it: its layers are then under other names.

    Args:
        model: The network.

    Raises:
        ValueError: If it has both structured layers and adapters.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None or not plan_of(model):
        return
    adapted = [name for name, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)]
    if adapted:
        raise ValueError(
            f"expected a structured model without adapters, to save all of it, got one with {len(adapted)}, such as at "
            f"{adapted[0]!r}; save the adapter with save_pretrained of the PeftModel, or the model after "
            "merge_and_unload() or unload()"
        )


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
        digests: The digests of the tensors in the files and of the fields above, as ``_digests.sealed`` makes them;
            they are there in files alone, and not for a model in memory, whose tensors may change.
        other: Further arguments that a framework passes; they are ignored.

    Raises:
        ValueError: If a field is of another kind, this version does not know the schema or cannot read a format, or a
            tie leads to no layer.
    """

    quant_method: Any = QUANT_METHOD

    def __init__(
        self,
        /,
        layers: Mapping[str, Any] | None = None,
        ties: Mapping[str, str] | None = None,
        schema: int = SCHEMA_VERSION,
        digests: Mapping[str, Any] | None = None,
        **other: Any,
    ) -> None:
        self.quant_method = type(self).quant_method
        self.schema = schema
        self.layers = dict(_checks.typed(layers or {}, dict, "'layers' of the quantization_config"))
        self.ties = _checks.values(ties or {}, str, "'ties' of the quantization_config")
        self.digests = dict(_checks.typed(digests or {}, dict, "'digests' of the quantization_config"))
        unknown = sorted(set(self.ties.values()) - set(self.layers))
        if unknown:
            raise ValueError(f"expected 'ties' of the quantization_config to name its layers, got {unknown}")
        self.plan()

    @property
    def record(self) -> dict[str, Any]:
        """What the digests vouch for beside the tensors."""
        return {"layers": self.layers, "ties": self.ties}

    def plan(self) -> Plan:
        """The plan of the structured layers."""
        return Plan.from_data({"schema": self.schema, "layers": self.layers, "skipped": {}})
