"""What pages and docstrings refer to exists: names of the package, files, commands and their options."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import structmat
from structmat.cli.app import COMMANDS, app
from test_architecture import LEVELS

ROOT = Path(__file__).parents[1]
SOURCE = Path(structmat.__file__).parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
MODULES = sorted([*SOURCE.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")])
PARTS = {path.stem for path in SOURCE.iterdir() if not path.name.startswith("__")}

DOTTED = re.compile(r"(?<![\w./])(sm\.|structmat\.)?([A-Za-z_]\w*(?:\.\w+)*)")
QUOTED = re.compile(r"`+([\w.]+)(?:\([^`]*\))?`+")
COMMAND = re.compile(r"(?:^ {4}|`)structmat ([a-z][a-z-]*)(?: ([^`\n]*))?", re.MULTILINE)


def exists(dotted: str) -> bool:
    """Whether the package has this name, such as ``training.parameter_groups``; what ``torch`` has counts too."""
    found: Any = structmat
    path = "structmat"
    for part in dotted.split("."):
        path += f".{part}"
        try:
            found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)
        except ModuleNotFoundError as error:
            if not (error.name or "structmat").startswith("structmat"):
                return True  # it needs a package that is not installed
            return hasattr(torch.nn, dotted.removeprefix("nn."))
    return True


def names_in(text: str) -> set[str]:
    """The names of the package that a text refers to: after ``sm.``, or in quotes and beginning with a part of it."""
    prefixed = {match[2] for match in DOTTED.finditer(text) if match[1]}
    quoted = {match[1] for match in QUOTED.finditer(text) if match[1].partition(".")[0] in PARTS and "." in match[1]}
    return {name.rstrip(".") for name in prefixed | quoted if not name.endswith((".md", ".py", "json"))}


def problems_of_command(name: str, words: str) -> list[str]:
    """What is wrong with a command line: the command, or options that it does not have."""
    if name not in COMMANDS:
        return [f"no command {name}"]
    commands: Any = typer.main.get_command(app)
    known = {option for parameter in commands.imported(name).params for option in parameter.opts}
    used = [word.partition("=")[0] for word in shlex.split(words, comments=True) if re.match(r"--?[a-z]", word)]
    return [f"{name} has no option {option}" for option in used if option not in known | {"--help", "--debug"}]


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*PAGES, *MODULES], ids=identify)
def test_names_exist(path: Path) -> None:
    assert sorted(name for name in names_in(path.read_text(encoding="utf-8")) if not exists(name)) == []


@pytest.mark.parametrize("path", PAGES, ids=identify)
def test_links_lead_to_files(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text) for link in link if link]
    assert [link for link in links if "://" not in link and not (path.parent / link).exists()] == []
    quoted = re.findall(r"`((?:benchmarks|tests|examples|src|docs)/[\w./]+)`", text)
    assert [name for name in quoted if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=identify)
def test_commands_and_options_exist(path: Path) -> None:
    found = COMMAND.findall(path.read_text(encoding="utf-8").replace("…", ""))
    assert [problem for name, words in found for problem in problems_of_command(name, words)] == []


def test_contributing_names_the_levels() -> None:
    rows = re.findall(
        r"^\| (\d+) \| ((?:`\w+` ?)+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {int(level): tuple(re.findall(r"\w+", parts)) for level, parts in rows} == LEVELS


def test_commands_and_options_of_the_help_exist() -> None:
    lines = [line for entry in COMMANDS.values() for line in entry.examples]
    assert len(lines) > 10
    assert [p for line in lines for p in problems_of_command(*line.removeprefix("structmat ").split(" ", 1))] == []


def test_the_check_sees_what_does_not_exist() -> None:
    text = "`sm.Blast(4, 4)`, sm.gone, `training.gone`, `nn.Linear`, `structmat.plan.Plan.save`. `benchmarks.x`"
    assert names_in(text) == {"Blast", "gone", "training.gone", "nn.Linear", "plan.Plan.save"}
    assert [name for name in sorted(names_in(text)) if not exists(name)] == ["gone", "training.gone"]
    assert problems_of_command("plan", "MODEL --keep 0.5 --gone -o plan.json") == ["plan has no option --gone"]
    assert problems_of_command("gone", "") == ["no command gone"]
    assert COMMAND.findall("    structmat plan MODEL --keep 0.5\n`structmat bench`") == [
        ("plan", "MODEL --keep 0.5"),
        ("bench", ""),
    ]
