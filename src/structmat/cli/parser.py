"""The commands as the parser knows them: each is imported when it is asked for, so that help comes at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from structmat.cli.options import command_of


@dataclass(frozen=True)
class Entry:
    """A command in the list of commands.

    Attributes:
        place: The module and the name of its function, ``plan:plan``.
        help: What the command does.
        examples: Command lines that its help shows.
    """

    place: str
    help: str
    examples: tuple[str, ...]


class Command(TyperCommand):
    """A command that notes words which may have been meant for an option before them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words of a command.

        Args:
            ctx: The parser's context.
            args: The words.

        Returns:
            The words that are left.
        """
        several = {
            name for parameter in self.params if getattr(parameter, "multiple", False) for name in parameter.opts
        }
        ctx.ensure_object(dict)["loose"] = loose_words(args, several)
        return super().parse_args(ctx, args)


class Commands(TyperGroup):
    """A group of commands that are imported when they are asked for; its help needs their entries alone.

    Attributes:
        entries: The commands by name.
    """

    entries: Mapping[str, Entry] = {}

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = {name: TyperCommand(name, help=entry.help) for name, entry in self.entries.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Find the command of a command line, and import it.

        Args:
            ctx: The parser's context.
            args: The words after the options of the program.

        Returns:
            The name, the command, and the words that are left for it.
        """
        name, _, rest = super().resolve_command(ctx, args)
        return name, None if name is None else self.imported(name), rest

    def imported(self, name: str) -> Any:
        """The command of this name with all of its options."""
        return parsed_by(name, self.entries[name])


def function_of(entry: Entry) -> Callable[..., Any]:
    """Import the function of a command."""
    module, _, function = entry.place.partition(":")
    return getattr(importlib.import_module(f"structmat.cli.{module}"), function)


def parsed_by(name: str, entry: Entry, then: Callable[..., Any] | None = None) -> Any:
    """Make what parses the words of a command.

    Args:
        name: The name of the command.
        entry: Its entry in the list of commands.
        then: What is called with the arguments of the command's function; None for that function.

    Returns:
        A command of typer with all options.
    """
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    epilog = "\n\n".join(("Examples:", *(f"$ {example}" for example in entry.examples)))
    alone.command(name, cls=Command, help=entry.help, epilog=epilog)(command_of(function_of(entry), then))
    return typer.main.get_command(alone)


def loose_words(words: Sequence[str], several: set[str]) -> dict[str, str]:
    """Words behind the value of an option that may be repeated: perhaps they were meant as its further values.

    Args:
        words: The words of a command.
        several: The names of its options that may be repeated.

    Returns:
        How the words would be spelled as values of the option, by word.
    """
    found: dict[str, str] = {}
    option, values = "", 0
    for word in words:
        if word == "--":
            break
        if word.startswith("-") and len(word) > 1:
            name, equals, _ = word.partition("=")
            option, values = (name if name in several else ""), int(bool(equals))
        elif option:
            values += 1
            if values > 1:
                found[word] = f"{option} {word}"
    return found
