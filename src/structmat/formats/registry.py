"""The registry of formats: every structure by its name, those of other packages included.

Another package adds a structure with one class and one line::

    @register_format
    @dataclass(frozen=True)
    class Circulant(Format): ...

Where the package declares the module of that class as an entry point in the group ``structmat.formats``, plans,
checkpoints and the command line find the format without any import by the user.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar, overload

from structmat import _checks
from structmat.formats.base import Format

FormatT = TypeVar("FormatT", bound=Format)

FORMATS: dict[str, type[Format]] = {}
"""Every format by its name in JSON and on the command line."""

DEFAULT_METHODS: dict[type[Format], Any] = {}
"""The method that fits each format where none is given; ``GradientFit`` fits the formats that have none here."""

ENTRY_POINTS = "structmat.formats"
"""The group of entry points under which other packages declare the modules that register their formats."""


@overload
def register_format(kind: type[FormatT], *, method: Any = None) -> type[FormatT]: ...
@overload
def register_format(kind: None = None, *, method: Any = None) -> Callable[[type[FormatT]], type[FormatT]]: ...
def register_format(kind: type[FormatT] | None = None, *, method: Any = None) -> Any:
    """Make a format known by its name to plans, checkpoints, reports, training and the command line.

    Args:
        kind: The class; None where this is used as a decorator with arguments.
        method: The method that fits the format where no method is given; None for ``GradientFit()``.

    Returns:
        The same class, so that this can be a decorator.

    Raises:
        TypeError: If it is no ``Format``.
        ValueError: If it has no name, a fact of the class is missing, or the name belongs to another format.

    Example:
        >>> from structmat.formats import FORMATS
        >>> FORMATS["blast"].__name__
        'Blast'
    """
    if kind is None:
        return lambda wanted: register_format(wanted, method=method)
    if not (isinstance(kind, type) and issubclass(kind, Format)):
        raise TypeError(f"expected a subclass of Format, got {kind!r}")
    missing = [fact for fact in ("name", "scale_exponents") if not hasattr(kind, fact)]
    if missing:
        raise ValueError(f"expected {kind.__name__} to state {' and '.join(missing)} as class attributes")
    other = FORMATS.get(kind.name)
    same = other is not None and (other.__module__, other.__qualname__) == (kind.__module__, kind.__qualname__)
    if other is not None and not same:
        raise ValueError(f"expected a name that no other format has, but {kind.name!r} is {other.__qualname__}")
    FORMATS[kind.name] = kind
    if method is not None:
        DEFAULT_METHODS[kind] = method
    return kind


@functools.cache
def load_plugins() -> None:
    """Import the modules with formats that other installed packages declare, once in a process."""
    for point in entry_points(group=ENTRY_POINTS):
        point.load()


def format_named(name: str) -> type[Format]:
    """Look a format up by its name.

    Args:
        name: The name of the format; hyphens count as underscores.

    Returns:
        The format's class.

    Raises:
        ValueError: If no format has this name.
    """
    wanted = name.strip().lower().replace("-", "_") if isinstance(name, str) else name
    if wanted not in FORMATS:
        load_plugins()
    _checks.one_of(wanted, FORMATS, "the format's name")
    return FORMATS[wanted]


def sized_formats() -> dict[str, type[Format]]:
    """The formats that a user can choose and a budget can size, by name; others are made from these."""
    load_plugins()
    return {name: kind for name, kind in FORMATS.items() if hasattr(kind, "for_budget") and not kind.made_from}


def format_from_json(data: Mapping[str, Any]) -> Format:
    """Rebuild a format from what ``Format.to_json`` gave.

    Args:
        data: The format's name under ``"format"`` and its fields.

    Returns:
        The format.

    Raises:
        ValueError: If the name is unknown or the fields do not fit it.
    """
    fields = dict(_checks.typed(data, dict, "the JSON of a format"))
    kind = format_named(_checks.typed(fields.pop("format", ""), str, "the format's name"))
    try:
        return kind(**{str(name): _tuples(value) for name, value in fields.items()})
    except TypeError as error:
        raise ValueError(f"the fields of a {kind.name} format do not fit: {error}") from error


def formats_from_json(layers: Mapping[str, Any]) -> dict[str, Format]:
    """Rebuild the formats of layers.

    Args:
        layers: The JSON form of each format, by the name of the layer.

    Returns:
        The formats by name.

    Raises:
        ValueError: If one cannot be rebuilt; the layer is named.
    """
    formats: dict[str, Format] = {}
    for name, data in layers.items():
        try:
            formats[name] = format_from_json(data)
        except ValueError as error:
            raise ValueError(f"layer {_checks.shown(name)}: {error}") from error
    return formats


def _tuples(value: Any, depth: int = 4) -> Any:
    """The value with every list as a tuple, as the fields of a frozen class are."""
    if not isinstance(value, list):
        return value
    if not depth:
        raise ValueError("expected lists at most 4 deep in the fields of a format, got deeper ones")
    return tuple(_tuples(one, depth - 1) for one in value)
