"""The report: what each layer is, what it costs, and how far it is from the weight it replaced."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structmat._tables import share, table_text
from structmat.fit import Fit
from structmat.inspect.learned import StructureNumbers, structure_numbers
from structmat.network.calls import call, evaluating
from structmat.network.sites import DENSE_KINDS, dense_weight, unseen_weights
from structmat.nn import StructuredConv2d, StructuredModule
from structmat.plan import Plan

NUMBERS = (4, 5, 6, 7)
"""The columns of a report with numbers, which are aligned to the right."""


@dataclass(frozen=True)
class Row:
    """One weight.

    Attributes:
        name: The first name of its module.
        format: The format's name, ``"dense"`` for a layer that is not structured.
        settings: The format's hyperparameters, as text.
        shape: ``(M, N)``.
        parameters: Entries of its factors, without the bias; 0 where an earlier row has the same.
        dense_parameters: ``M N``, or 0 likewise.
        multiplications: Per token, or over the example inputs where they were given.
        dense_multiplications: Those of the dense weight.
        error: Relative error of its fit; None where there was none.
        note: Why it is as it is, where the plan says.
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


@dataclass(frozen=True)
class Report:
    """What a network's weights are and cost; ``print`` shows it as a table.

    Attributes:
        rows: One for each linear layer and convolution.
        parameters: Of the whole network, biases, norms and embeddings included; of Gaudi-GBLR layers those inside the
            segments, as in ``rows``, though they store more while they learn.
        dense_parameters: Those of the network with every structured layer dense.
        multiplications: Of the layers in ``rows``.
        dense_multiplications: Those of the same layers dense.
        per_token: Whether multiplications are per token and layer; otherwise they are over the example inputs.
        unseen: Matrices that are in no linear layer or convolution, by parameter name; they are shown below the table.
        structure: What the learned structure of GBLR layers looks like, by layer, where that was asked for; likewise.
    """

    rows: tuple[Row, ...]
    parameters: int
    dense_parameters: int
    multiplications: int
    dense_multiplications: int
    per_token: bool
    unseen: Mapping[str, str] = field(default_factory=dict)
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
        head = ("layer", "format", "settings", "shape", "parameters", "keep", f"mult. {unit}", "error", "")
        body = [
            (
                row.name,
                row.format,
                row.settings,
                f"{row.shape[0]} x {row.shape[1]}",
                f"{row.parameters:,}",
                share(row.parameters, row.dense_parameters),
                f"{row.multiplications:,}",
                "" if row.error is None else f"{row.error:.4f}",
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
            f"{share(self.multiplications, self.dense_multiplications)} of dense",
        )
        return head, [*body, total]

    def __str__(self) -> str:
        head, rows = self.cells()
        notes = [f"not in any row: {name} ({what})" for name, what in self.unseen.items()]
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

    Args:
        model: The network.
        fits: What ``compress_`` returned, for the errors.
        plan: For the reasons why layers were skipped.
        example_inputs: Input or inputs of one call, a mapping for keyword arguments; multiplications are then
            counted over that call, so that layers that see more tokens weigh more. None for multiplications per token.
        structure: Whether to measure what GBLR and Gaudi-GBLR layers have learned, as ``structure_numbers`` does.

    Returns:
        The report.
    """
    fits = fits or {}
    unseen = unseen_weights(model)
    tokens = _count_tokens(model, example_inputs) if example_inputs is not None else {}
    counted: set[int] = set()
    rows: list[Row] = []
    extra = surplus = 0
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for name, module in model.named_modules():
        kind_of_dense = next((kind for base, kind in DENSE_KINDS.items() if isinstance(module, base)), None)
        if isinstance(module, StructuredModule):
            format, factors, (M, N) = module.format, module.factors, module.format.shape
            parameters, one_token = format.num_parameters(factors), format.multiplications(1, factors)
            kind, settings = format.name, format.settings()
        elif kind_of_dense is not None and not is_lazy(dense_weight(module)):
            weight = kind_of_dense.matrix(module)
            factors, (M, N) = {"weight": dense_weight(module)}, weight.shape
            parameters = one_token = M * N
            kind, settings = "dense", ""
        else:
            continue
        shared = id(next(iter(factors.values()))) in counted
        counted.update(id(factor) for factor in factors.values())
        times = tokens.get(name, 0) if example_inputs is not None else 1
        rows.append(
            Row(
                name, kind, settings, (M, N), 0 if shared else parameters, 0 if shared else M * N, one_token * times,
                M * N * times, next((fits[n].error for n in names[id(module)] if n in fits), None),
                "shares its weight" if shared else plan.skipped.get(name, "") if plan else "",
            )
        )  # fmt: skip
        extra += rows[-1].dense_parameters - rows[-1].parameters
        if not shared:
            stored = (factor for factor in factors.values() if isinstance(factor, nn.Parameter))
            surplus += sum(factor.numel() for factor in stored) - parameters
    parameters = sum(parameter.numel() for parameter in model.parameters()) - surplus
    return Report(
        tuple(rows),
        parameters,
        parameters + extra,
        sum(row.multiplications for row in rows),
        sum(row.dense_multiplications for row in rows),
        example_inputs is None,
        unseen,
        _learned(model) if structure else {},
    )


def _learned(model: nn.Module) -> dict[str, StructureNumbers]:
    return {
        name: structure_numbers(module.format, module.factors)
        for name, module in model.named_modules()
        if isinstance(module, StructuredModule) and module.format.has_overlap
    }


def _count_tokens(model: nn.Module, example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> dict[str, int]:
    """How many vectors each linear layer, and positions each convolution, processes in one call."""
    counts: dict[str, int] = {}

    def hook(name: str):
        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            convolution = isinstance(module, (nn.Conv2d, StructuredConv2d))
            channels = output.shape[-3] if convolution else output.shape[-1]
            counts[name] = counts.get(name, 0) + (output.numel() // channels if channels else 0)

        return count

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, (StructuredModule, *DENSE_KINDS))
    ]
    try:
        with evaluating(model):
            call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return counts
