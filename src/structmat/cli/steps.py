"""The steps of a recipe: commands, with their options as the keys of a section."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structmat import _checks
from structmat._names import meant
from structmat.cli import models
from structmat.cli.app import COMMANDS
from structmat.cli.fingerprints import fingerprint
from structmat.cli.options import Options
from structmat.cli.parser import function_of, parsed_by
from structmat.data.sources import Source

MODEL = "$model"
"""How a section names the model of the recipe; ``$compress`` is what the step of that name writes."""

OURS = ("out", "json", "overwrite", "debug")
"""The options that the run sets."""

NOWHERE = Path("structmat-run-writes-nothing-here")
"""The output of a command whose options are only checked."""


@dataclass(frozen=True)
class Kind:
    """What a command does as a step.

    Attributes:
        target: The option that says where it writes.
        ending: The end of the name of the file that it writes, by its options; None for a folder with a model.
    """

    target: str = "out"
    ending: Callable[[Mapping[str, Any]], str] | None = None


KINDS = {
    "compress": Kind(),
    "retrain": Kind(),
    "harden": Kind(),
    "quantize": Kind(),
    "densify": Kind(),
    "evaluate": Kind("json", lambda section: ".json"),
    "export": Kind(ending=lambda section: {"onnx": ".onnx", "executorch": ".pte"}[section["to"]]),
}
"""The commands that may be steps, by name."""


@dataclass(frozen=True)
class Step:
    """One step of a recipe.

    Attributes:
        name: The name: that of the command, with a number where it comes again.
        command: The name of the command.
        section: The value of every option by its long name without dashes, and of the model as ``model``. A value that
            begins with ``$`` names the model of the recipe, or what another step writes.
    """

    name: str
    command: str
    section: Mapping[str, Any]

    @classmethod
    def resolved(cls, name: str, command: str, given: Mapping[str, Any], usual: Mapping[str, Any]) -> Step:
        """Check the section of a step, and fill in what it does not say.

        Args:
            name: The name of the step.
            command: The name of the command.
            given: The section.
            usual: What holds where the section says nothing, for the options that the command has.

        Returns:
            The step.

        Raises:
            ValueError: If there is no such option, or it cannot have its value.
        """
        known = parameters(command)
        for key in given:
            if key not in known:
                why = "which the run sets" if key in OURS else f"which it does not have{meant(str(key), known)}"
                raise ValueError(
                    f"step {name}: expected an option of structmat {command}, got {key!r}, {why}; it has: "
                    f"{', '.join(known)}"
                )
        section = {**{key: value for key, value in usual.items() if key in known}, **given}
        values = flat(parsed(name, command, section, NOWHERE))
        found = {key: plain(values[parameter.name], parameter.metavar or "") for key, parameter in known.items()}
        return cls(name, command, found)

    @property
    def writes_model(self) -> bool:
        """Whether the step writes a folder with a model."""
        return KINDS[self.command].ending is None

    @property
    def place(self) -> str:
        """The name of the folder or the file that the step writes."""
        ending = KINDS[self.command].ending
        return self.name + ("" if ending is None else ending(self.section))

    def references(self) -> list[str]:
        """What the step reads of the recipe, such as ``$model``."""
        return [value for _, value, _ in self._read() if value.startswith("$")]

    def files(self) -> dict[str, str | None]:
        """The digest of all that the step reads beside that, by the option; None for data on the Hub."""
        found: dict[str, str | None] = {}
        for key, value, metavar in self._read():
            if not value.startswith("$"):
                before = sum(name.split()[0] == key for name in found)
                found[f"{key} {before + 1}" if before else key] = digest_of(value, metavar)
        return found

    def _read(self) -> Iterator[tuple[str, str, str]]:
        """The options that name models, data and files, each with its values and what the help shows for them."""
        for key, parameter in parameters(self.command).items():
            metavar, value = str(parameter.metavar), self.section[key]
            if metavar.startswith(("SOURCE", "MODEL")) or parameter.name in ("plan", "task_path"):
                yield from ((key, one, metavar) for one in (value if isinstance(value, list) else [value]) if one)

    def arguments(self, places: Mapping[str, str], out: Path, *, overwrite: bool) -> dict[str, Any]:
        """The arguments of the command's function.

        Args:
            places: The folder or the name on the Hub that each reference means.
            out: What is to be written.
            overwrite: Whether what is there is replaced.

        Returns:
            The arguments.
        """

        def placed(value: Any) -> Any:
            return [placed(one) for one in value] if isinstance(value, list) else places.get(value, value)

        section = {key: placed(value) for key, value in self.section.items()}
        return parsed(self.name, self.command, section, out, overwrite=overwrite)

    def run(self, arguments: Mapping[str, Any]) -> None:
        """Run the command."""
        function_of(COMMANDS[self.command])(**arguments)


@functools.cache
def parser_of(command: str) -> Any:
    """What parses the words of a command, and gives the arguments of its function."""
    return parsed_by(command, COMMANDS[command], dict)


def parameters(command: str) -> dict[str, Any]:
    """The options of a command by their long names without dashes, and its model; without what the run sets."""
    found = {key_of(parameter): parameter for parameter in parser_of(command).params}
    return {key: parameter for key, parameter in found.items() if key not in OURS}


def key_of(parameter: Any) -> str:
    """The key of an option: its long name without dashes."""
    return next((name for name in parameter.opts if name.startswith("--")), parameter.opts[0]).lstrip("-")


def parsed(
    name: str, command: str, section: Mapping[str, Any], out: Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Parse the section of a step as the command line parses options.

    Args:
        name: The name of the step, for messages.
        command: The name of the command.
        section: The options that are set.
        out: What is to be written.
        overwrite: Whether what is there is replaced.

    Returns:
        The arguments of the command's function.

    Raises:
        ValueError: If an option cannot have its value, or one is missing.
    """
    parser = parser_of(command)
    words = [word for key, value in section.items() if key != "model" for word in words_of(name, command, key, value)]
    words += [f"--{KINDS[command].target}={out}", *(["--overwrite"] if overwrite and _overwrites(command) else [])]
    given = section.get("model")
    words += ["--", *([str(one) for one in given] if isinstance(given, list) else [str(given)])]
    with _checks.about(f"step {name}"):
        try:
            return parser.invoke(parser.make_context(command, words, obj={}))
        except Exception as error:
            told = getattr(error, "format_message", None)  # errors of the parser have it
            if told is None:
                raise
            raise ValueError(told().rstrip(".")) from error


def _overwrites(command: str) -> bool:
    return any(parameter.name == "overwrite" for parameter in parser_of(command).params)


def words_of(name: str, command: str, key: str, value: Any) -> list[str]:
    """The words of the command line that set an option.

    Args:
        name: The name of the step, for messages.
        command: The name of the command.
        key: The key of the option.
        value: The value; None for what holds by default.

    Returns:
        The words.

    Raises:
        ValueError: If the option cannot have such a value.
    """
    parameter = parameters(command)[key]
    several = isinstance(value, list) and bool(getattr(parameter, "multiple", False))
    kinds = (bool,) if getattr(parameter, "is_flag", False) else (str, int, float)
    for one in value if several else [value]:
        if one is not None and (not isinstance(one, kinds) or (isinstance(one, bool) and kinds != (bool,))):
            wanted = "true or false" if kinds == (bool,) else "a text or a number"
            raise ValueError(f"step {name}: expected {wanted} for {key}, got {_checks.shown(value)}")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{key}"] if value else list(parameter.secondary_opts[:1])
    return [f"--{key}={one}" for one in (value if several else [value]) if one is not None]


def flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all options by the names of their fields."""
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        is_group = isinstance(value, Options)
        found |= (
            {one.name: getattr(value, one.name) for one in dataclasses.fields(value)} if is_group else {name: value}
        )
    return found


def plain(value: Any, metavar: str) -> Any:
    """The value of an option as YAML has it, with absolute paths.

    Args:
        value: The value.
        metavar: What the help shows in the place of values.

    Returns:
        The value.
    """
    if isinstance(value, (tuple, list)):
        return [plain(one, metavar) for one in value]
    if isinstance(value, Path):
        return os.path.abspath(value)
    if not isinstance(value, str) or value.startswith("$"):
        return value
    if metavar.startswith("SOURCE"):
        return Source.parse(value).spelled
    return os.path.abspath(value) if metavar.startswith("MODEL") and Path(value).is_dir() else value


def digest_of(name: str, metavar: str) -> str | None:
    """The digest of what a command reads, wherever it lies.

    Args:
        name: The data, the model or the file.
        metavar: What the help shows in the place of values.

    Returns:
        The digest; for a model on the Hub its commit, and for data on the Hub None.
    """
    if not metavar.startswith("MODEL"):
        return fingerprint(Source.parse(name) if metavar.startswith("SOURCE") else name, named=False)
    found = fingerprint(models.check_name(name), named=False)
    return getattr(models.configuration(name), "_commit_hash", None) if found is None else found
