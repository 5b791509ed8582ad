"""Formats on the command line: ``NAME[:option=value…]``, whose options are those of the format's ``for_budget``."""

from __future__ import annotations

import inspect
import re
import types
import typing
from typing import Any, get_args, get_origin

from structmat import _checks
from structmat.formats import Format, sized_formats
from structmat.plan import Rule

HINT = "options follow behind colons, as in blast:keep=0.3:blocks=8x16"

NAMES = ", ".join(sized_formats())
"""The names of the formats, those of other packages included, for help texts."""

EVERY = (int, float, bool, tuple, str)
"""The types of the values of an argument that may be anything."""

NAMED = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    tuple: "counts such as 8x16",
    types.NoneType: "none",
}

WORDS = {"true": True, "yes": True, "false": False, "no": False}


def options_text() -> str:
    """The options of all formats beside keep, for help texts."""
    known = {name: kind.budget_options() for name, kind in sized_formats().items()}
    return ", ".join(f"{name}:{option}" for name, options in known.items() for option in options)


def read_format(text: str, option: str) -> Rule:
    """Read a format and its options.

    Args:
        text: ``NAME``, or ``NAME:keep=0.3:blocks=8x16``.
        option: The option of the command line that the text comes from.

    Returns:
        A rule, which leaves open what the text does not say.

    Raises:
        ValueError: If the text names no format, an option that the format does not have, or a value that does not read.
    """
    name, *parts = text.split(":")
    kind = format_class(name, option)
    known = kind.budget_options()
    hints = typing.get_type_hints(kind.for_budget) if parts else {}
    found: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"expected {option} NAME:OPTION=VALUE, got {part!r} in {text!r}")
        _checks.one_of(key, ("keep", *known), f"the option of {kind.name} in {option} {text}")
        what = f"{key} in {option} {text}"
        hint = float if key == "keep" else hints.get(key, _hint_of(known[key]))
        found[key] = read_blocks(value, what) if key == "blocks" else read_value(value, hint, what)
    keep, blocks = found.pop("keep", None), found.pop("blocks", None)
    if keep is not None:
        _checks.fraction(keep, f"keep in {option} {text}")
    return Rule(kind, keep, blocks, found)


def read_rule(text: str) -> tuple[str, Rule]:
    """Read a rule.

    Args:
        text: ``REGEX=FORMAT``, the format as ``read_format`` takes it.

    Returns:
        The pattern and the rule.

    Raises:
        ValueError: If the text has no pattern or no format.
    """
    found = re.fullmatch(r"(?P<pattern>.+?)=(?P<format>[\w-]+(?::\w+=[^:]*)*)", text)
    if found is None:
        raise ValueError(f"expected --rule such as '.*mlp.*=blast:keep=0.3:blocks=8x16', got {text!r}")
    return found["pattern"], read_format(found["format"], "--rule")


def format_class(name: str, option: str) -> type[Format]:
    """The format of this name that a budget can size.

    Args:
        name: The name, which may have hyphens.
        option: The option of the command line that the name comes from.

    Returns:
        The format's class.
    """
    known, wanted = sized_formats(), name.strip().lower().replace("-", "_")
    _checks.one_of(wanted, known, option)
    return known[wanted]


def read_blocks(text: str, what: str = "--blocks") -> int | tuple[int, int]:
    """Read block counts.

    Args:
        text: ``16`` or ``8x16``.
        what: What the message of an error calls them.

    Returns:
        One count, or those of the rows and of the columns.

    Raises:
        ValueError: If the text is neither.
    """
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip())
    if found is None:
        raise ValueError(f"expected {what} to be blocks such as 16, or 8x16 for rows x columns, got {text!r}")
    rows, columns = found.groups()
    return int(rows) if columns is None else (int(rows), int(columns))


def read_value(text: str, hint: Any, what: str) -> Any:
    """Read the value of a format's option.

    Args:
        text: The value.
        hint: The annotation of the argument of ``for_budget`` that the value is for.
        what: What the message of an error calls the option.

    Returns:
        The value, of the first type of the annotation that the text reads as.

    Raises:
        ValueError: If the text reads as none of them.
    """
    several = get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [get_origin(kind) or kind for kind in (get_args(hint) if several else (hint,))]
    for kind in EVERY if Any in kinds else kinds:
        value = _as(kind, text.strip())
        if value is not None:
            return None if value == "none" else value
    raise ValueError(f"expected {what} to be {' or '.join(NAMED.get(kind, 'text') for kind in kinds)}, got {text!r}")


def _hint_of(parameter: inspect.Parameter) -> Any:
    """The type of an argument without an annotation: that of its default."""
    return Any if parameter.default in (None, inspect.Parameter.empty) else type(parameter.default)


def _as(kind: Any, text: str) -> Any:
    """The text as a value of a type, ``"none"`` for no value; None where it does not read so."""
    if kind is types.NoneType:
        return "none" if text.lower() == "none" else None
    if kind is bool:
        return WORDS.get(text.lower())
    if kind is tuple:
        return tuple(int(count) for count in text.split("x")) if re.fullmatch(r"\d+(x\d+)+", text) else None
    try:
        return kind(text)
    except ValueError:
        return None
