"""``structmat run``."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from filelock import FileLock, Timeout

from structmat import _checks
from structmat._tables import print_table
from structmat.cli.compress import Compression
from structmat.cli.fingerprints import fingerprint, versions
from structmat.cli.options import Options
from structmat.cli.output import RECORD, SCHEMA, read_record, write_json
from structmat.cli.recipe import Recipe, read_recipe, with_settings
from structmat.cli.show import say, warn
from structmat.cli.steps import MODEL, NOWHERE, Step
from structmat.compress.estimate import duration

FINISHED, BEGUN, CHANGED, OTHER, OPEN = "finished", "begun", "changed since", "made with other options", ""
"""How far a step is."""

KNOWN = {"digest": str, "finished": bool, "output": (str, type(None)), "seconds": (float, type(None))}
"""What is known of a step, and of which kind it is."""


@dataclass(frozen=True)
class RunOptions(Options):
    """The options of a run.

    Attributes:
        out: The folder for what all steps write; None for one that is called like the recipe.
        settings: Other values of options, ``STEP.OPTION=VALUE`` each.
        dry_run: Whether to show the steps alone.
        overwrite: Whether to replace results of steps that are others now.
    """

    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The folder for what the steps write; by default one that is called like the recipe."
        ),
    ] = None
    settings: Annotated[
        tuple[str, ...],
        typer.Option(
            "--set",
            metavar="STEP.OPTION=VALUE",
            help="Another value of an option in the recipe, repeated for several; STEP. may be left out where one step "
            "alone has the option.",
        ),
    ] = ()
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the steps, how far they are and what is known of their times.")
    ] = False
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the results of steps whose options or files changed.")
    ] = False


def run(
    recipe: Annotated[
        str,
        typer.Argument(help="The file with the recipe, or the name of one: quick, default, best.", metavar="RECIPE"),
    ],
    options: RunOptions,
    model: Annotated[
        str | None,
        typer.Argument(
            help="The folder with the model, or its name on the Hugging Face Hub; by default the one in the recipe.",
            metavar="[MODEL]",
        ),
    ] = None,
) -> None:
    """Run ``structmat run``."""
    out = Path(Path(recipe).stem) if options.out is None else options.out
    given = with_settings(read_recipe(recipe), options.settings)
    work = Run.of(given, model, out, overwrite=options.overwrite)
    if options.dry_run:
        work.show()
    else:
        work.go()


@dataclass
class Run:
    """A run of the steps of a recipe.

    Attributes:
        recipe: The recipe.
        folder: The folder for what all steps write.
        overwrite: Whether results of steps that are others now are replaced.
        digests: The digest of all that each step depends on, by its name.
        done: What is known of each step, by its name.
    """

    recipe: Recipe
    folder: Path
    overwrite: bool
    digests: Mapping[str, str]
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, Any], model: str | None, folder: Path, *, overwrite: bool) -> Run:
        """Check a recipe and the folder of its run.

        Args:
            given: The recipe, as it was read.
            model: The model in place of the one in the recipe; None for that one.
            folder: The folder for what all steps write.
            overwrite: Whether results of steps that are others now are replaced.

        Returns:
            The run.

        Raises:
            ValueError: If a file is not as it was when the recipe was resolved.
        """
        recipe = Recipe.resolved(given, model)
        changed = recipe.changed_files(given)
        if changed:
            raise ValueError(
                f"expected the files that the recipe was made with, but others are there now: {', '.join(changed)}; "
                "put them back, or remove 'files:' from the recipe"
            )
        others = recipe.other_versions(given)
        if others:
            warn(f"the last bits of weights may differ from those of the recipe: {', '.join(others)}")
        found = cls(recipe, folder, overwrite, digests_of(recipe))
        found.read()
        return found

    def read(self) -> None:
        """Read what is known of the steps.

        Raises:
            FileExistsError: If something else is in the place of the folder.
        """
        if self.folder.is_dir():
            record = read_record(self.folder)
            if record is not None and record["command"] == "run":
                with _checks.about(str(self.folder / RECORD)):
                    steps = _checks.values(record.get("steps", {}), dict, "'steps' of the record of a run")
                    self.done = {name: _checks.fields(step, KNOWN, f"step {name!r}") for name, step in steps.items()}
                return
            if all(path.name == "lock" or path.name.startswith(f".{RECORD}.") for path in self.folder.iterdir()):
                return
        if os.path.lexists(self.folder):
            raise FileExistsError(f"expected a new folder for --out, but {str(self.folder)!r} is there; choose another")

    def state(self, step: Step) -> str:
        """How far a step is."""
        known, out = self.done.get(step.name), self.folder / step.place
        if known is None:
            return OPEN
        if known["digest"] != self.digests[step.name]:
            return OTHER if known["finished"] and out.exists() else OPEN
        if not known["finished"]:
            return BEGUN
        if not out.exists():
            return OPEN
        return FINISHED if fingerprint(out, named=False) == known["output"] else CHANGED

    def places(self) -> dict[str, str]:
        """The folder or the name on the Hub that each reference means."""
        written = {f"${step.name}": str(self.folder / step.place) for step in self.recipe.steps if step.writes_model}
        return {MODEL: self.recipe.model, **written}

    def show(self) -> None:
        """Print the steps."""
        rows = []
        for number, step in enumerate(self.recipe.steps, 1):
            state = self.state(step)
            reads = ", ".join(dict.fromkeys(step.references())) or "models of its own"
            rows.append((str(number), step.name, reads, str(self.folder / step.place), state, self._time(step, state)))
        print_table(("", "step", "reads", "writes", "state", "time"), rows, right=(0,))

    def _time(self, step: Step, state: str) -> str:
        """What is known of the time that a step takes, as text."""
        known = self.done.get(step.name, {}).get("seconds")
        if state == FINISHED or known is not None:
            return f"{duration(known)}, the last time" if known is not None else ""
        arguments = step.arguments(self.places(), NOWHERE, overwrite=False)
        if step.command != "compress" or not Path(arguments["model"]).is_dir():
            return ""
        del arguments["target"]
        return f"about {Compression(**arguments).expected()}"

    def go(self) -> dict[str, Any]:
        """Run all steps that are not finished.

        Returns:
            The record of the run.
        """
        count = len(self.recipe.steps)
        with self._alone():
            for number, step in enumerate(self.recipe.steps, 1):
                head = f"step {number} of {count}, {step.name}"
                state = self.state(step)
                if state == FINISHED:
                    say(f"{head}: finished already")
                    continue
                say(f"{head}: {'going on with' if state == BEGUN else 'writing'} {self.folder / step.place}")
                seconds = self._run(step, state)
                say(f"{head}: took {duration(seconds)}{self._left(number)}")
        say(f"{self.folder} is complete")
        return read_record(self.folder) or {}

    def _left(self, number: int) -> str:
        """What is left after the step with this number, as the end of a line."""
        rest = [step for step in self.recipe.steps[number:] if self.state(step) != FINISHED]
        if not rest:
            return ""
        known = [self.done.get(step.name, {}).get("seconds") for step in rest]
        total = sum(seconds or 0.0 for seconds in known)
        time_left = "" if None in known else f", about {duration(total)} as the last time"
        return f"; {len(rest)} step{'s are' if len(rest) > 1 else ' is'} left{time_left}"

    def _run(self, step: Step, state: str) -> float:
        """Run one step, write the recipe beside its weights, and note that it is finished; return the seconds."""
        out, started = self.folder / step.place, time.perf_counter()
        there = fingerprint(out, named=False) if out.exists() else None
        replace = self._replaces(step, state, there)
        spent = self.done[step.name]["seconds"] if state == BEGUN else None
        if state != BEGUN:
            self._note(step, finished=False, output=there, seconds=None)
        step.run(step.arguments(self.places(), out, overwrite=replace))
        if step.writes_model:
            self.recipe.upto(step).save(out)
        seconds = time.perf_counter() - started + (spent or 0.0)
        self._note(step, finished=True, output=fingerprint(out, named=False), seconds=seconds)
        return seconds

    def _replaces(self, step: Step, state: str, there: str | None) -> bool:
        """Whether what is at the place of a step is replaced.

        Args:
            step: The step.
            state: How far it is.
            there: The digest of what is at its place; None where there is nothing.

        Returns:
            True where it is.

        Raises:
            FileExistsError: If something is there that is not to be replaced.
        """
        if state == BEGUN:  # a file appears when it is complete; a folder says itself whether it is the new one
            return not step.writes_model or (there is not None and there == self.done[step.name]["output"])
        if there is not None and not self.overwrite and (state == CHANGED or not step.writes_model):
            why = "it changed since" if state == CHANGED else "it is not of this step with these options"
            place = str(self.folder / step.place)
            raise FileExistsError(f"expected {place!r} as step {step.name} wrote it, but {why}; pass --overwrite")
        return self.overwrite

    def _note(self, step: Step, **facts: Any) -> None:
        """Note what is known of a step, in the record of the run."""
        self.done[step.name] = {"digest": self.digests[step.name], **facts}
        self._write()

    def _write(self) -> None:
        record = {"schema": SCHEMA, "command": "run", "options": {"model": self.recipe.model}, "versions": versions()}
        write_json(self.folder / RECORD, {**record, "steps": self.done})

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no other process work in the folder, while this is entered."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise BlockingIOError(
                f"expected to be alone in {str(self.folder)!r}, but another process is running a recipe there; wait "
                "for it to end"
            ) from error
        try:
            self.read()  # what a process did that has ended since
            self._write()
            self.recipe.save(self.folder)
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


def digests_of(recipe: Recipe) -> dict[str, str]:
    """The digest of all that each step depends on: its options, its files, and the steps whose results it reads.

    Args:
        recipe: The recipe.

    Returns:
        The digests by the names of the steps.
    """
    known = {MODEL: str(recipe.files.get("model") or recipe.model)}
    found: dict[str, str] = {}
    for step in recipe.steps:
        section = {
            key: [known.get(one, one) for one in value] if isinstance(value, list) else known.get(value, value)
            for key, value in step.section.items()
        }
        files = {name: value for name, value in recipe.files.items() if name.startswith(f"{step.name}.")}
        text = json.dumps([step.command, section, files], sort_keys=True)
        found[step.name] = hashlib.sha256(text.encode()).hexdigest()[:16]
        known[f"${step.name}"] = found[step.name]
    return found
