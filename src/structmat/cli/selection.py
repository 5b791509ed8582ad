"""Which layers of a model to compress, and how: from the options of the command line to a plan."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from structmat import _checks
from structmat.fit import DEFAULT_METHODS
from structmat.formats import FORMATS, Dense, Format
from structmat.network.sites import find_sites
from structmat.plan import Plan, Rule, make_plan

SIZED = tuple(name for name, kind in FORMATS.items() if kind is Dense or kind in DEFAULT_METHODS)
"""Names of the formats that a budget can size and a method fits; others are made from these."""

HEADS = ("lm_head", "classifier", "score", "qa_outputs")
"""Names of output layers, beside those that the model itself tells."""


@dataclass(frozen=True)
class PlanOptions:
    """What the command line says about the plan.

    Attributes:
        format: Name of the format.
        keep: Share of the parameters to keep.
        blocks: Block counts, ``16`` or ``8x16``.
        layers: Patterns of the layers; none for the usual ones.
        exclude: Patterns of layers to leave alone.
        rules: ``REGEX=FORMAT[:keep=0.3][:blocks=8x16]`` each.
        skip_misfits: Whether to leave layers dense that their format does not fit.
        file: A plan to read instead of all that.
    """

    format: str = "blast"
    keep: float = 0.5
    blocks: str = "16"
    layers: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    skip_misfits: bool = False
    file: Path | None = None

    def record(self) -> dict[str, Any]:
        """What the plan depends on, as JSON-compatible data."""
        if self.file is None:
            return {name: value for name, value in dataclasses.asdict(self).items() if name != "file"}
        return {"plan": str(self.file), "plan_content": hashlib.sha256(self.file.read_bytes()).hexdigest()[:16]}


def plan_for(model: nn.Module, options: PlanOptions) -> Plan:
    """The plan that the options mean for a model.

    Args:
        model: It may live on the meta device.
        options: The options.

    Returns:
        The plan.

    Raises:
        ValueError: If an option does not read or does not fit the model, or there is nothing to compress.
        FileNotFoundError: If there is no file with the plan.
    """
    if options.file is not None:
        if not options.file.is_file():
            raise FileNotFoundError(f"expected a plan in {str(options.file)!r}; make one with structmat plan … -o")
        return Plan.from_json(options.file.read_text(encoding="utf-8"))
    rules: dict[Any, type[Format] | Rule] = {}
    for text in options.rules:
        pattern, rule = read_rule(text)
        rules[checked_pattern(pattern, "--rule")] = rule
    ruled = tuple(rules)
    exclude = [checked_pattern(pattern, "--exclude") for pattern in options.exclude]
    kind = format_named(options.format)
    if options.layers:
        rules |= {checked_pattern(pattern, "--layers"): kind for pattern in options.layers if pattern not in rules}
    else:
        taken = (*ruled, *exclude)
        names = [name for name in usual_layers(model) if not any(re.fullmatch(pattern, name) for pattern in taken)]
        if names:
            rules["|".join(re.escape(name) for name in names)] = kind
    if not rules:
        raise ValueError(
            "expected dense linear layers to compress, found none that is not excluded; is the model compressed "
            "already?"
        )
    return make_plan(
        model,
        rules,
        keep=_checks.fraction(options.keep, "--keep"),
        blocks=read_blocks(options.blocks),
        exclude=exclude,
        misfits="skip" if options.skip_misfits else "error",
    )


def usual_layers(model: Any) -> list[str]:
    """The linear layers of a model without those that turn its states into answers.

    Args:
        model: Of transformers, or any other.

    Returns:
        Their names: all that is inside the base model, and is no output layer.
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


def format_named(name: str) -> type[Format]:
    """The format of this name, which may have hyphens."""
    name = name.strip().lower().replace("-", "_")
    _checks.one_of(name, SIZED, "a format")
    return FORMATS[name]


def read_blocks(text: str) -> int | tuple[int, int]:
    """Read block counts.

    Args:
        text: ``16`` or ``8x16``.

    Returns:
        One count or two.

    Raises:
        ValueError: If it is neither.
    """
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    if found is None:
        raise ValueError(f"expected blocks such as 16, or 8x16 for rows x columns, got {text!r}")
    rows, columns = found.groups()
    return int(rows) if columns is None else (int(rows), int(columns))


def read_rule(text: str) -> tuple[str, Rule]:
    """Read a rule.

    Args:
        text: ``REGEX=FORMAT``, and behind it any of ``:keep=0.3`` and ``:blocks=8x16``.

    Returns:
        The pattern and the rule.

    Raises:
        ValueError: If it does not read.
    """
    found = re.fullmatch(r"(?P<pattern>.+?)=(?P<name>[a-zA-Z_-]+)(?P<rest>(?::\w+=[^:]*)*)", text)
    if found is None:
        raise ValueError(f"expected a rule such as '.*mlp.*=blast:keep=0.3:blocks=8x16', got {text!r}")
    settings: dict[str, Any] = {}
    for part in found["rest"].split(":")[1:]:
        key, _, value = part.partition("=")
        _checks.one_of(key, ("keep", "blocks"), f"what a rule sets ({text!r})")
        try:
            settings[key] = float(value) if key == "keep" else read_blocks(value)
        except ValueError as error:
            raise ValueError(f"expected a number for {key} in the rule {text!r}, got {value!r}") from error
    return found["pattern"], Rule(format_named(found["name"]), **settings)


def checked_pattern(pattern: str, option: str) -> str:
    """The pattern, if it is a regular expression.

    Args:
        pattern: The text.
        option: Where it comes from.

    Returns:
        The same.

    Raises:
        ValueError: If it is none.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"expected a regular expression for {option}, got {pattern!r}: {error}") from error
    return pattern
