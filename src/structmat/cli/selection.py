"""Which layers of a model to compress, and how: from the options of the command line to a plan."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from structmat import _checks
from structmat.cli.formats import HINT, NAMES, options_text, read_blocks, read_format, read_rule
from structmat.cli.options import Options
from structmat.network.sites import find_sites
from structmat.plan import Plan, Rule, make_plan

HEADS = ("lm_head", "classifier", "score", "qa_outputs")
"""Names of output layers, beside those that the model itself tells."""

PANEL = "Plan"

Layers = Annotated[
    tuple[str, ...],
    typer.Option(
        "--layers",
        metavar="REGEX",
        help="A pattern of whole names of layers to compress, repeated for several patterns; by default every "
        "linear layer but the output head and classifiers.",
        rich_help_panel=PANEL,
    ),
]

Exclude = Annotated[
    tuple[str, ...],
    typer.Option(
        "--exclude",
        metavar="REGEX",
        help="A pattern of layers to leave alone, repeated for several patterns.",
        rich_help_panel=PANEL,
    ),
]


@dataclass(frozen=True)
class PlanOptions(Options):
    """The options of a plan.

    Attributes:
        format: The format, with its options.
        keep: The share of each layer's parameters to keep.
        keep_total: The share of the model's parameters to keep, in place of that; None for that of each layer.
        blocks: The block counts, ``16`` or ``8x16``.
        layers: Patterns of the layers to compress; none for the usual ones.
        exclude: Patterns of the layers to leave alone.
        rules: Rules for single layers, ``REGEX=FORMAT`` each.
        skip_misfits: Whether to leave layers dense that their format does not fit.
    """

    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help=f"The format of the layers: {NAMES}; {HINT}. Beside keep there are: {options_text()}.",
            rich_help_panel=PANEL,
        ),
    ] = "blast"
    keep: Annotated[
        float, typer.Option(help="The largest share of each layer's parameters to keep.", rich_help_panel=PANEL)
    ] = 0.5
    keep_total: Annotated[
        float | None,
        typer.Option(
            help="The largest share of all parameters of the model to keep, in place of --keep; what is not compressed "
            "counts, so that the layers keep less.",
            rich_help_panel=PANEL,
        ),
    ] = None
    blocks: Annotated[
        str,
        typer.Option(
            help="The block counts of formats with blocks: 16, or 8x16 for rows x columns.", rich_help_panel=PANEL
        ),
    ] = "16"
    layers: Layers = ()
    exclude: Exclude = ()
    rules: Annotated[
        tuple[str, ...],
        typer.Option(
            "--rule",
            metavar="REGEX=FORMAT",
            help="The format of layers that are to differ from --format, --keep and --blocks, repeated for several "
            "rules; the first rule that matches a layer decides.",
            rich_help_panel=PANEL,
        ),
    ] = ()
    skip_misfits: Annotated[
        bool,
        typer.Option(
            "--skip-misfits", help="Leave layers dense that their format does not fit.", rich_help_panel=PANEL
        ),
    ] = False

    def plan_for(self, model: nn.Module) -> Plan:
        """Make the plan that the options mean for a model.

        Args:
            model: The model, which may live on the meta device.

        Returns:
            The plan.

        Raises:
            ValueError: If an option does not read or does not fit the model, or there is nothing to compress.
        """
        chosen = read_format(self.format, "--format")
        rules: dict[Any, Rule] = {
            checked_pattern(pattern, "--rule"): rule for pattern, rule in map(read_rule, self.rules)
        }
        exclude = [checked_pattern(pattern, "--exclude") for pattern in self.exclude]
        layers = [checked_pattern(pattern, "--layers") for pattern in self.layers]
        keep, blocks = _checks.fraction(self.keep, "--keep"), read_blocks(self.blocks)
        check_picks(model, {"--rule": rules, "--exclude": exclude, "--layers": layers})
        if not layers:
            layers = usual_pattern(model, (*rules, *exclude))
        rules |= {pattern: chosen for pattern in layers if pattern not in rules}
        check_any(rules)

        def planned(keep: float) -> Plan:
            misfits = "skip" if self.skip_misfits else "error"
            try:
                return make_plan(model, rules, keep=keep, blocks=blocks, exclude=exclude, misfits=misfits)
            except ValueError as error:
                raise ValueError(in_options(str(error))) from error

        if self.keep_total is None:
            return planned(keep)
        if any(rule.keep is not None for rule in rules.values()):
            raise ValueError("expected no keep in --format or --rule with --keep-total, which sets that of all layers")
        return planned(keep_for_total(model, planned(keep), _checks.fraction(self.keep_total, "--keep-total")))


@dataclass(frozen=True)
class PlanOrFile(PlanOptions):
    """The options of a plan, or a file with a plan.

    Attributes:
        plan: The file to read in place of all other options.
    """

    plan: Annotated[
        Path | None,
        typer.Option(help="A plan that structmat plan wrote, in place of all of these.", rich_help_panel=PANEL),
    ] = None

    def record(self) -> dict[str, Any]:
        """What the plan depends on, as JSON-compatible data."""
        if self.plan is None:
            own = {name: value for name, value in super().record().items() if name != "plan"}
            return {name: value for name, value in own.items() if name != "keep_total" or value is not None}
        return {"plan": str(self.plan), "plan_content": hashlib.sha256(self.plan.read_bytes()).hexdigest()[:16]}

    def plan_for(self, model: nn.Module) -> Plan:
        """Make the plan for a model, or read it.

        Args:
            model: The model, which may live on the meta device.

        Returns:
            The plan.

        Raises:
            FileNotFoundError: If there is no file with the plan.
        """
        if self.plan is None:
            return super().plan_for(model)
        if not self.plan.is_file():
            raise FileNotFoundError(f"expected a plan in {str(self.plan)!r}; make one with structmat plan … -o")
        return Plan.load(self.plan)


def keep_for_total(model: nn.Module, plan: Plan, total: float) -> float:
    """Find the share of the planned layers with which a share of the whole model is kept.

    Args:
        model: The model, which may live on the meta device.
        plan: A plan of the same layers with any share.
        total: The share of all parameters of the model to keep.

    Returns:
        The share of the planned layers' parameters.

    Raises:
        ValueError: If everything else is larger than that already.
    """
    every = sum(parameter.numel() for parameter in model.parameters())
    planned = sum(format.M * format.N for format in plan.values())
    rest = every - planned
    keep = (total * every - rest) / max(planned, 1)
    if keep <= 0:
        raise ValueError(
            f"expected --keep-total above {rest / every:.3f}, the share of what is not compressed, got {total:g}"
        )
    return min(keep, 1.0)


def check_picks(model: nn.Module, patterns: dict[str, Any]) -> None:
    """Check that every pattern picks a layer.

    Args:
        model: The model.
        patterns: The patterns by the option that they come from.

    Raises:
        ValueError: If one picks none; the message names its option.
    """
    sites = find_sites(model)
    names = [name for site in sites.values() for name in site.names]
    for option, own in patterns.items():
        for pattern in own:
            if not any(re.fullmatch(pattern, name) for name in names):
                raise ValueError(
                    f"expected {option} {pattern!r} to pick a dense linear layer or convolution, but it picks none; "
                    f"there are: {', '.join(sites) or 'none'}"
                )


def in_options(message: str) -> str:
    """What ``make_plan`` says, with the options of the command line in place of its arguments."""
    return message.replace("Give it another rule, exclude it, or pass misfits='skip'", REMEDY)


REMEDY = "Give it another format with --rule, leave it alone with --exclude, or pass --skip-misfits"


def usual_layers(model: Any) -> list[str]:
    """The linear layers of a model without those that turn its states into answers.

    Args:
        model: A model of transformers, or any other network.

    Returns:
        The names of all linear layers that are inside the base model and are no output layer.
    """
    base = getattr(model, "base_model", model)
    inside = {id(module) for module in base.modules()}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        name
        for name, site in find_sites(model).items()
        if not isinstance(site.module, nn.Conv2d)
        and any(id(module) in inside for module in site.modules)
        and not any(module is output for module in site.modules)
        and name.rpartition(".")[2] not in HEADS
    ]


def usual_pattern(model: Any, taken: Iterable[str]) -> list[str]:
    """The pattern of the layers that are compressed where the user names none.

    Args:
        model: The model.
        taken: The patterns of layers that are excluded, or have a rule.

    Returns:
        One pattern, or none where no layer is left.
    """
    names = [name for name in usual_layers(model) if not any(re.fullmatch(one, name) for one in taken)]
    return ["|".join(map(re.escape, names))] if names else []


def check_any(patterns: Collection[str]) -> None:
    """Check that there is something to compress.

    Args:
        patterns: The patterns of layers to compress.

    Raises:
        ValueError: If there is none.
    """
    if not patterns:
        raise ValueError(
            "expected dense linear layers to compress, found none that is not excluded; is the model compressed "
            "already?"
        )


def checked_pattern(pattern: str, option: str) -> str:
    """The pattern, if it is a regular expression.

    Args:
        pattern: The text.
        option: The option that the text comes from.

    Returns:
        The same.

    Raises:
        ValueError: If the text is no regular expression.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"expected a regular expression for {option}, got {pattern!r}: {error}") from error
    return pattern
