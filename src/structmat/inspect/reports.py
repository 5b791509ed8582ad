"""The report: what each layer is, what it costs, and how far it is from the weight it replaced."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structmat._tables import share, table_text
from structmat.fit import Fit
from structmat.inspect.learned import StructureNumbers, structure_numbers
from structmat.network.capture import count_vectors
from structmat.network.sites import DENSE_KINDS, dense_weight, find_sites
from structmat.network.splitting import unfused
from structmat.network.staying import plain_modules, unseen_weights
from structmat.nn import StructuredModule
from structmat.plan import UNPICKED, Plan

NUMBERS = (4, 5, 6, 7, 8)
"""The columns of a report with numbers, which are aligned to the right."""


@dataclass(frozen=True)
class Row:
    """One weight.

    Attributes:
        name: The first name of its module.
        format: The format's name, ``"dense"`` for a layer that is not structured.
        settings: The format's hyperparameters, as text.
        shape: ``(M, N)``.
        parameters: The number of entries of the factors, without the bias; 0 where an earlier row has the same factors.
        dense_parameters: ``M N``; 0 where an earlier row has the same factors.
        multiplications: The number of multiplications per token, or over the example inputs where these were given.
        dense_multiplications: The number of multiplications of the dense weight.
        error: The relative error of the fit towards the weight; None where there was no fit.
        note: The reason why the layer was skipped, or what else there is to know.
        output_error: The relative error of the layer's output on the calibration data, which a fit with data
            minimises; None where there was none.
    """

    name: str
    format: str
    settings: str
    shape: tuple[int, int]
    parameters: int
    dense_parameters: int
    multiplications: int
    dense_multiplications: int
    error: float | None = None
    note: str = ""
    output_error: float | None = None


@dataclass(frozen=True)
class Report:
    """The weights of a network and their costs; ``print`` shows it as a table.

    Attributes:
        rows: The rows, one for each linear layer and convolution.
        parameters: The number of parameters of the whole network, biases, norms and embeddings included. A Gaudi-GBLR
            layer counts with the entries inside its segments, as in ``rows``, though it stores more while it learns.
        dense_parameters: The number of parameters of the network with every structured layer dense.
        multiplications: The number of multiplications of the layers in ``rows``.
        dense_multiplications: The number of multiplications of the same layers dense.
        per_token: Whether multiplications are per token and layer; otherwise they are over the example inputs.
        unseen: The matrices that are in no linear layer or convolution, by parameter name, shown below the table.
        plain: The reason why embeddings, norms and other modules without a matrix stay dense, by type and number, shown
            below the table.
        structure: The numbers of the learned structure of GBLR layers, by layer, shown below the table; empty where
            nobody asked for them.
    """

    rows: tuple[Row, ...]
    parameters: int
    dense_parameters: int
    multiplications: int
    dense_multiplications: int
    per_token: bool
    unseen: Mapping[str, str] = field(default_factory=dict)
    plain: Mapping[str, str] = field(default_factory=dict)
    structure: Mapping[str, StructureNumbers] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-compatible data."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=1)

    def cells(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """The report as a table: the titles of the columns, and the rows, of which the last is the whole network."""
        unit = "per token" if self.per_token else "in all"
        head = (
            "layer",
            "format",
            "settings",
            "shape",
            "parameters",
            "keep",
            f"mult. {unit}",
            "output error",
            "weight error",
            "",
        )
        body = [
            (
                row.name,
                row.format,
                row.settings,
                f"{row.shape[0]} x {row.shape[1]}",
                f"{row.parameters:,}",
                share(row.parameters, row.dense_parameters),
                f"{row.multiplications:,}",
                _error_cell(row.output_error),
                _error_cell(row.error),
                row.note,
            )
            for row in self.rows
        ]
        total = (
            "whole model",
            "",
            "",
            "",
            f"{self.parameters:,}",
            share(self.parameters, self.dense_parameters),
            f"{self.multiplications:,}",
            "",
            "",
            f"{share(self.multiplications, self.dense_multiplications)} of dense",
        )
        return head, [*body, total]

    def __str__(self) -> str:
        head, rows = self.cells()
        notes = [f"not in any row: {name} ({what})" for name, what in self.unseen.items()]
        notes += [f"not in any row: {name}: {reason}" for name, reason in self.plain.items()]
        total_keep = sum(row.parameters for row in self.rows if row.name in self.structure) or 1
        notes += [
            f"{row.name}: {row.parameters / total_keep:.1%} of the learned budget, {self.structure[row.name]}"
            for row in self.rows
            if row.name in self.structure
        ]
        return "\n".join([table_text(head, rows, right=NUMBERS), *notes])


def report(
    model: nn.Module,
    *,
    fits: Mapping[str, Fit] | None = None,
    plan: Plan | None = None,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    structure: bool = False,
) -> Report:
    """Describe the linear layers and convolutions of a network.

    Modules that hold several matrices, such as ``nn.MultiheadAttention``, have a row for each. Everything else that
    holds parameters is named below the table, with the reason why it stays dense.

    Args:
        model: The network.
        fits: The fits that ``compress_`` returned, for the errors.
        plan: The plan, for the reasons why layers were skipped.
        example_inputs: The input or inputs of one call, a mapping for keyword arguments; multiplications are then
            counted over that call, so that layers that see more tokens weigh more. None for multiplications per token.
        structure: Whether to measure what GBLR and Gaudi-GBLR layers have learned, as ``structure_numbers`` does.

    Returns:
        The report.
    """
    with unfused(model):
        return _described(model, fits, plan, example_inputs, structure)


def _described(
    model: nn.Module, fits: Mapping[str, Fit] | None, plan: Plan | None, example_inputs: Any, structure: bool
) -> Report:
    """Describe a network in which each matrix is a layer."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    weights = {name: weight for name, module in model.named_modules() if (weight := _weight(module)) is not None}
    vectors = _count_vectors(model, weights, example_inputs)
    reasons = _reasons(model, plan)
    rows: list[Row] = []
    counted: set[int] = set()
    surplus = 0  # what Gaudi-GBLR layers store beyond their segments
    for name, weight in weights.items():
        shared = id(weight.factors[0]) in counted
        counted.update(map(id, weight.factors))
        dense = math.prod(weight.shape)
        fit = next((fits[other] for other in names[id(weight.module)] if other in fits), None) if fits else None
        rows.append(
            Row(
                name,
                weight.format,
                weight.settings,
                weight.shape,
                0 if shared else weight.parameters,
                0 if shared else dense,
                weight.multiplications * vectors[name],
                dense * vectors[name],
                None if fit is None else fit.error,
                "shares its weight" if shared else reasons.get(name, ""),
                None if fit is None else fit.output_error,
            )
        )
        if not shared:
            stored = sum(factor.numel() for factor in weight.factors if isinstance(factor, nn.Parameter))
            surplus += stored - weight.parameters
    known = (parameter for parameter in model.parameters() if not is_lazy(parameter))
    parameters = sum(parameter.numel() for parameter in known) - surplus
    return Report(
        tuple(rows),
        parameters,
        parameters + sum(row.dense_parameters - row.parameters for row in rows),
        sum(row.multiplications for row in rows),
        sum(row.dense_multiplications for row in rows),
        example_inputs is None,
        unseen_weights(model),
        plain_modules(model),
        _learned(model) if structure else {},
    )


def _reasons(model: nn.Module, plan: Plan | None) -> dict[str, str]:
    """The reason why each dense layer is dense."""
    reasons = {} if plan is None else dict(plan.skipped)
    for site in find_sites(model).values():
        planned = None if plan is None else next((plan[one] for one in site.names if one in plan), None)
        usual = "" if plan is None else UNPICKED
        if planned is not None:
            usual = "it is not replaced yet" if planned.replaces else "it is planned as dense"
        for one in site.names:
            for own, _ in site.module.named_modules() if site.problem else [("", site.module)]:
                reasons.setdefault(f"{one}.{own}".strip("."), site.problem or usual)
    return reasons


def _error_cell(error: float | None) -> str:
    return "" if error is None else f"{error:.4f}"


@dataclass(frozen=True)
class _Weight:
    """What a layer multiplies by, and what that costs for one vector."""

    module: nn.Module
    format: str
    settings: str
    shape: tuple[int, int]
    factors: tuple[Tensor, ...]
    parameters: int
    multiplications: int


def _weight(module: nn.Module) -> _Weight | None:
    """The weight of a structured or dense layer; None for any other module."""
    if isinstance(module, StructuredModule):
        format, factors = module.format, module.factors
        costs = format.num_parameters(factors), format.multiplications(1, factors)
        return _Weight(module, format.name, format.settings(), format.shape, tuple(factors.values()), *costs)
    kind = next((kind for base, kind in DENSE_KINDS.items() if isinstance(module, base)), None)
    if kind is None or is_lazy(dense_weight(module)):
        return None
    M, N = kind.matrix(module).shape
    return _Weight(module, "dense", "", (M, N), (dense_weight(module),), M * N, M * N)


def _count_vectors(model: nn.Module, weights: Mapping[str, _Weight], example_inputs: Any) -> dict[str, int]:
    """The number of vectors that each layer multiplies in one call; 1 where there are no example inputs."""
    if example_inputs is None:
        return dict.fromkeys(weights, 1)
    layers = {name: weight.module for name, weight in weights.items()}
    counts = count_vectors(model, layers, example_inputs)
    return {name: sum(vectors * times for (vectors, _), times in counts[name].items()) for name in layers}


def _learned(model: nn.Module) -> dict[str, StructureNumbers]:
    return {
        name: structure_numbers(module.format, module.factors)
        for name, module in model.named_modules()
        if isinstance(module, StructuredModule) and module.format.has_overlap
    }
