"""Options: frozen classes whose fields are options of commands, and what makes a signature of them.

A class of options is written once. From its fields come the options that the parser knows and the help shows, the
object that a command works with, and the record by which an interrupted run is recognised.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

DATA = "Data"

Model = Annotated[
    str, typer.Argument(help="The folder with the model, or its name on the Hugging Face Hub.", metavar="MODEL")
]


@dataclass(frozen=True)
class Options:
    """A set of options; a field that is a tuple is an option that is repeated for each of its values."""

    def record(self) -> dict[str, Any]:
        """The options by name as JSON-compatible data: what a result depends on."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


@dataclass(frozen=True)
class Target(Options):
    """Where a command writes.

    Attributes:
        out: The folder to write.
        overwrite: Whether to replace a result that is there.
    """

    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; it appears when it is complete.")]
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a result of structmat that is there already.")
    ] = False


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def recorded(*groups: Options) -> dict[str, Any]:
    """The records of several sets of options as one."""
    return {name: value for group in groups for name, value in group.record().items()}


def command_line(command: str, model: str | os.PathLike[str], *groups: Options) -> str:
    """Spell a command with the options that differ from the defaults, for others to repeat.

    Folders that are written from the root are named by their last part, so that the text tells nothing of a machine.

    Args:
        command: The name of the command.
        model: Its argument.
        groups: The sets of its options, without the folder that is written.

    Returns:
        The words as a shell reads them, with ``OUT`` for the folder that is written.

    Example:
        >>> command_line("densify", "/models/small", Options())
        'structmat densify small -o OUT'
    """
    words = ["structmat", command, unrooted(model), "-o", "OUT"]
    for group in groups:
        hints = get_type_hints(type(group), include_extras=True)
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if value != field.default:
                words += _spelled(field.name, _declared(hints[field.name]), value)
    return shlex.join(words)


def unrooted(path: str | os.PathLike[str]) -> str:
    """A path, or the last part of one that is written from the root or from the home of a user."""
    text = os.fspath(path)
    found = Path(text)
    return found.name if found.is_absolute() or text.startswith("~") else text


def _declared(hint: Any) -> list[str]:
    """The names of an option, where it has others than its field; typer takes the first one for the default."""
    infos = (mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, typer.models.OptionInfo))
    return [name for info in infos for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]


def _spelled(name: str, declared: list[str], value: Any) -> list[str]:
    """An option and its value as words."""
    flag = next((text for text in declared if text.startswith("--")), f"--{name.replace('_', '-')}")
    yes, _, no = flag.partition("/")
    if isinstance(value, bool):
        return [yes if value else no or f"--no-{yes.removeprefix('--')}"]
    values = value if isinstance(value, tuple) else (value,)
    return [word for one in values for word in (yes, unrooted(one) if isinstance(one, (str, Path)) else str(one))]


def command_of(function: Callable[..., Any], then: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Make a function that takes sets of options one whose signature lists every option, as typer reads it.

    Args:
        function: The function of a command. A parameter whose annotation is a class of options stands for the fields
            of that class.
        then: What is called with the arguments in place of the function; None for the function.

    Returns:
        A function with an option ``--debug`` beside those, which it takes by keyword.
    """
    hints = get_type_hints(function, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Options)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in groups:
            parameters += _parameters_of(groups[name])
        else:
            parameters.append(_parameter(name, hints[name], parameter.default))

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        values.pop("debug", None)
        given = {name: _given(kind, values) for name, kind in groups.items()}
        return (then or function)(**given, **{name: _tuple(hints[name], value) for name, value in values.items()})

    vars(command)["__signature__"] = inspect.Signature([*parameters, DEBUG])
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _parameters_of(kind: type[Options]) -> Iterator[inspect.Parameter]:
    """A parameter for every field of a class of options."""
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        missing = field.default is dataclasses.MISSING
        yield _parameter(field.name, hints[field.name], inspect.Parameter.empty if missing else field.default)


def _parameter(name: str, hint: Any, default: Any) -> inspect.Parameter:
    """A parameter as typer wants it: a list where there are several values."""
    if _is_repeated(hint):
        several, info = get_args(hint)
        hint = Annotated[list[get_args(several)[0]] | None, info]
        default = list(default) if default and default is not inspect.Parameter.empty else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _is_repeated(hint: Any) -> bool:
    return get_origin(hint) is Annotated and get_origin(get_args(hint)[0]) is tuple


def _given(kind: type[Options], values: dict[str, Any]) -> Options:
    """The set of options that the values mean; they are taken out of the values."""
    hints = get_type_hints(kind, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind)]
    return kind(**{name: _tuple(hints[name], values.pop(name)) for name in names})


def _tuple(hint: Any, value: Any) -> Any:
    return tuple(value or ()) if _is_repeated(hint) else value


def _set_debug(context: typer.Context, wanted: bool) -> None:
    if wanted:
        context.ensure_object(dict)["debug"] = True


DebugOption = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_set_debug, is_eager=True)
]

DEBUG = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=DebugOption)
"""The option that every command has."""
