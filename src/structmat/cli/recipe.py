"""Recipes: files that say which commands run one after the other, and with which options."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from structmat import _checks
from structmat._files import write_atomically
from structmat._names import meant
from structmat.cli.fingerprints import versions
from structmat.cli.steps import KINDS, MODEL, Step, digest_of, parameters

NAMED = Path(__file__).with_name("recipes")
"""The folder with the recipes that have names."""

FILE = "recipe.yaml"
"""The file with the recipe beside what it made."""

LARGEST = 2**18
"""The most bytes of a recipe that is read."""

KEYS = ("model", "seed", "steps", "made-with", "files")
"""What a recipe consists of; the last two are there once it is resolved."""

HEAD = "# structmat run {file} -o FOLDER makes the same again from the same files, with the same versions.\n"


@dataclass(frozen=True)
class Recipe:
    """A recipe in which nothing is left open.

    Attributes:
        model: The folder with the model that the first step reads, or its name on the Hub.
        seed: The seed of all steps that do not say another one.
        steps: The steps in their order.
        files: The digest of all that is read, by the step and its option; that of the model is under ``model``.
        made_with: The versions of the libraries, and the number of threads.
    """

    model: str
    seed: int
    steps: tuple[Step, ...]
    files: Mapping[str, str | None] = field(default_factory=dict)
    made_with: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def resolved(cls, given: Mapping[str, Any], model: str | None = None) -> Recipe:
        """Check a recipe, and fill in what it leaves open.

        Args:
            given: The recipe, as ``read_recipe`` reads it.
            model: The model in place of the one that the recipe names; None for that one.

        Returns:
            The recipe, with the digests of the files as they are now.

        Raises:
            ValueError: If it has no steps or no model, or a step reads what no step before it writes.
        """
        sections = sections_of(given)
        name = _checks.typed(given.get("model") if model is None else model, (str, type(None)), "the model")
        if name is None:
            raise ValueError("expected a model, got none; give it behind the recipe, or as model: in it")
        seed = _checks.natural_int(given.get("seed", 0), "the seed")
        name = str(Path(name).absolute()) if Path(name).is_dir() else name
        steps: list[Step] = []
        last, known = MODEL, [MODEL]
        for step, (command, section) in zip(names_of([one for one, _ in sections]), sections, strict=True):
            steps.append(Step.resolved(step, command, section, {"model": last, "seed": seed}))
            for one in steps[-1].references():
                if one not in known:
                    there = ", ".join(known)
                    raise ValueError(f"step {step}: expected a model that there is by then ({there}), got {one!r}")
            if steps[-1].writes_model:
                last = f"${step}"
                known.append(last)
        files = {f"{step.name}.{key}": value for step in steps for key, value in step.files().items()}
        made_with = {**versions(), "threads": torch.get_num_threads()}
        return cls(name, seed, tuple(steps), {"model": digest_of(name, "MODEL"), **files}, made_with)

    def upto(self, step: Step) -> Recipe:
        """The part of the recipe that ends with a step."""
        steps = self.steps[: self.steps.index(step) + 1]
        names = {"model", *(one.name for one in steps)}
        files = {name: value for name, value in self.files.items() if name.partition(".")[0] in names}
        return dataclasses.replace(self, steps=steps, files=files)

    def data(self) -> dict[str, Any]:
        """The recipe as YAML has it."""
        return {
            "model": self.model,
            "seed": self.seed,
            "steps": [{step.command: dict(step.section)} for step in self.steps],
            "made-with": dict(self.made_with),
            "files": dict(self.files),
        }

    def text(self) -> str:
        """The recipe as the text of a file."""
        return HEAD.format(file=FILE) + yaml().safe_dump(self.data(), sort_keys=False, allow_unicode=True, width=120)

    def save(self, folder: Path) -> None:
        """Write the recipe into a folder, atomically."""
        write_atomically(folder / FILE, lambda temporary: temporary.write_text(self.text(), encoding="utf-8"))

    def changed_files(self, given: Mapping[str, Any]) -> list[str]:
        """The names of files that are not as they were when a recipe was resolved.

        Args:
            given: The recipe of that time, as it was read.

        Returns:
            The names, as in ``files``; none for a recipe that is not resolved yet.
        """
        before = _checks.typed(given.get("files", {}), dict, "'files' of a recipe")
        return [name for name, value in self.files.items() if name in before and before[name] != value]

    def other_versions(self, given: Mapping[str, Any]) -> list[str]:
        """What a recipe was resolved with that is another version now, as text."""
        before = _checks.typed(given.get("made-with", {}), dict, "'made-with' of a recipe")
        now = self.made_with
        return [f"{name} {now[name]}, was {before[name]}" for name in now if before.get(name, now[name]) != now[name]]


def yaml() -> Any:
    """The package yaml, whose only door this is.

    Returns:
        The package.

    Raises:
        ImportError: If it is not installed.
    """
    if importlib.util.find_spec("yaml") is None:
        raise ImportError("recipes need pyyaml: pip install 'structmat[cli]'")
    return importlib.import_module("yaml")


def named_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in NAMED.glob("*.yaml"))


def read_recipe(recipe: str) -> dict[str, Any]:
    """Read a recipe.

    Args:
        recipe: The file, or the name of a recipe of the package.

    Returns:
        What the file holds.

    Raises:
        FileNotFoundError: If there is no such recipe.
        ValueError: If the file holds no recipe.
    """
    path = NAMED / f"{recipe}.yaml" if recipe in named_recipes() and not Path(recipe).is_file() else Path(recipe)
    if not path.is_file():
        names = named_recipes()
        raise FileNotFoundError(
            f"expected a file with a recipe, or one of {', '.join(names)}, got {recipe!r}{meant(recipe, names)}"
        )
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    with _checks.about(str(path)):
        if len(content) > LARGEST:
            raise ValueError(f"expected a recipe of at most {LARGEST // 2**10} KiB")
        return parsed_yaml(content)


def parsed_yaml(content: str | bytes) -> Any:
    """Parse YAML in which no key comes twice.

    Args:
        content: The text.

    Returns:
        The data.

    Raises:
        ValueError: If it is no YAML, or a key comes twice.
    """
    library = yaml()

    class Loader(library.SafeLoader):
        """A loader that refuses keys that come twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise ValueError(f"the key {twice!r} comes twice, in line {node.start_mark.line + 1}")
            return super().construct_mapping(node, deep)

    try:
        return library.load(content, Loader)
    except (library.YAMLError, ValueError, TypeError, RecursionError) as error:
        why = "it is too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise ValueError(f"expected YAML, got something else: {why}") from error


def sections_of(given: Any) -> list[tuple[str, dict[str, Any]]]:
    """The commands of a recipe with their sections, which are copies.

    Args:
        given: What the file holds.

    Returns:
        The pairs.

    Raises:
        ValueError: If it is no recipe.
    """
    recipe = _checks.typed(dict(given) if isinstance(given, Mapping) else given, dict, "a recipe")
    for key in recipe:
        if key not in KEYS:
            raise ValueError(f"expected {', '.join(KEYS)} in a recipe, got {key!r}{meant(str(key), KEYS)}")
    steps = _checks.typed(recipe.get("steps", []), list, "the steps of a recipe")
    if not steps:
        raise ValueError(f"expected at least one step, a list of {', '.join(KINDS)} under steps:, got none")
    return [_section(step) for step in steps]


def _section(step: Any) -> tuple[str, dict[str, Any]]:
    """The command of a step, and its section; a command alone has an empty one."""
    one = step if isinstance(step, dict) else {step: None}
    command, section = next(iter(one.items()), (None, None))
    if len(one) != 1 or command not in KINDS:
        hint = meant(command, KINDS) if isinstance(command, str) else ""
        raise ValueError(f"expected each step to be one of {', '.join(KINDS)}, got {_checks.shown(step)}{hint}")
    return command, dict(_checks.typed(section or {}, dict, f"the section of {command}"))


def names_of(commands: Sequence[str]) -> Iterator[str]:
    """The names of steps: those of their commands, with a number where a command comes again."""
    for k, command in enumerate(commands):
        before = commands[:k].count(command)
        yield f"{command}-{before + 1}" if before else command


def with_settings(given: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A recipe with other values.

    Args:
        given: The recipe, as it was read.
        settings: The values, ``OPTION=VALUE`` or ``STEP.OPTION=VALUE`` each, the value as YAML.

    Returns:
        The recipe.

    Raises:
        ValueError: If there is no such step or option, or several steps have it.
    """
    sections = sections_of(given)
    named = dict(zip(names_of([command for command, _ in sections]), sections, strict=True))
    for text in settings:
        where, equals, value = text.partition("=")
        step, dot, option = where.rpartition(".")
        having = [name for name, (command, _) in named.items() if option in parameters(command)]
        chosen = [step] if dot else having
        if not equals or not option or len(chosen) > 1:
            there = f", where OPTION is one of several steps: {', '.join(having)}" if len(chosen) > 1 else ""
            raise ValueError(f"expected --set STEP.OPTION=VALUE{there}, got {text!r}")
        if not chosen or chosen[0] not in named:
            known = named if dot else sorted({key for command, _ in sections for key in parameters(command)})
            what = "one of the steps" if dot else "an option of a step"
            raise ValueError(f"expected {what} for --set, got {text!r}{meant(step if dot else option, known)}")
        named[chosen[0]][1][option] = parsed_yaml(value)
    return {**given, "steps": [{command: section} for command, section in sections]}
