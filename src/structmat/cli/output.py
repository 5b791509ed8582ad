"""A folder that appears when it is complete, and what is kept of a run that was interrupted."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from structmat import _checks
from structmat._files import read_json, write_atomically
from structmat._ranks import AbandonedError, current
from structmat.cli.card import write_card
from structmat.cli.fingerprints import versions
from structmat.cli.options import unrooted
from structmat.cli.show import say

RECORD = "structmat.json"
"""The file in a finished folder that says what made it, and what came out."""

TOKEN = "shared"
"""The file in the partial folder by which processes see whether they share it."""

STATE_SCALE = 2
"""How many times larger than other JSON files the state of a trainer may be, which grows with every step it logs."""

SCHEMA = 1
"""The version of the record."""


class Output:
    """The output of a command. While it is entered, this process alone works on it.

    Beside the folder ``OUT`` there is ``OUT.partial`` until the work is done: a lock, which ends with the process
    however that ends, the options, what the command keeps for going on, and the model while it is written.

    Args:
        path: The folder.
        command: The name of the command.
        options: What the result depends on, as JSON-compatible data.
        overwrite: Whether to replace a result that is there.
        resume: Whether a run that was interrupted goes on with other options.
        spelled: The command as others would repeat it, which the card of a model shows.
    """

    def __init__(
        self,
        path: Path,
        command: str,
        options: Mapping[str, Any],
        *,
        overwrite: bool = False,
        resume: bool = True,
        spelled: str = "",
    ) -> None:
        self.path, self.command, self.overwrite, self.resume = path, command, overwrite, resume
        self.spelled = spelled
        self.options = json.loads(json.dumps(options))
        self.partial = path.with_name(f"{path.name}.partial")
        self._lock = FileLock(self.partial / "lock", timeout=0)

    @property
    def folder(self) -> Path:
        """The folder in which the model is written before it moves."""
        return self.partial / "model"

    @property
    def finished(self) -> bool:
        """Whether the folder is there, made by the same command with the same options, and is to stay.

        Raises:
            FileExistsError: If something else is there.
        """
        if not os.path.lexists(self.path) or _is_empty(self.path):
            return False
        record = read_record(self.path)
        if self.overwrite:
            if record is None:
                raise FileExistsError(f"expected a result of structmat to overwrite, got {str(self.path)!r}; remove it")
            return False
        if record is None or record.get("command") != self.command:
            raise FileExistsError(f"expected a new folder for --out, but {str(self.path)!r} is there; choose another")
        changes = differences(record.get("options", {}), self.options)
        if changes:
            raise FileExistsError(
                f"expected a new folder for --out, but {str(self.path)!r} was made with other options ({changes}); "
                "choose another, or pass --overwrite"
            )
        return True

    def said_finished(self) -> bool:
        """Whether the work is done already; the user is told, and what a killed process left beside it is removed."""
        return current().of(0, self._said_finished)

    def _said_finished(self) -> bool:
        if not self.finished:
            return False
        if self.partial.is_dir() and not self.partial.is_symlink() and self._is_ours() and not self._lock.is_locked:
            with self:
                pass
        say(f"{self.path} is finished, with the same options; nothing to do")
        return True

    def _check_partial(self) -> None:
        """Refuse to work in, or clear, a folder that no command of structmat made.

        Raises:
            FileExistsError: If there is a link, a file, or a folder of somebody else.
        """
        what = None
        if self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir()):
            what = "a link" if self.partial.is_symlink() else "a file"
        elif self.partial.is_dir() and not self._is_ours():
            what = "a folder with other things"
        if what is not None:
            raise FileExistsError(
                f"expected {str(self.partial)!r} to be free for what is unfinished, but it is {what} that structmat "
                "did not make; move it away or choose another --out"
            )

    def _is_ours(self) -> bool:
        """Whether the partial folder holds nothing but what a command of structmat leaves there."""
        file = self.partial / "options.json"
        if not file.is_file():
            names = (path.name for path in self.partial.iterdir())
            return all(name == "lock" or name.startswith(".options.json.") for name in names)
        try:
            _read_facts(file)
        except ValueError:
            return False
        return True

    def __enter__(self) -> Output:
        current().of(0, self._enter)
        return self

    def _enter(self) -> None:
        self._check_partial()
        self.partial.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise BlockingIOError(
                f"expected to be alone at {str(self.path)!r}, but another process is writing it; wait for it to end"
            ) from error
        try:
            self._begin()
        except BaseException as error:
            self._leave_with(type(error))
            raise

    def check_shared(self) -> None:
        """Check that all processes have the same options, files and versions, and see the same folder.

        Raises:
            ValueError: If they do not.
            AbandonedError: If they do not, in all processes but the first.
        """
        ranks = current()
        if ranks.size == 1:
            return
        for rank, other in enumerate(ranks.gathered({**self.options, **versions()})):
            changes = differences(ranks.of(0, lambda: {**self.options, **versions()}), other)
            if changes and not ranks.leads:
                raise AbandonedError("the first process tells what differs")
            if changes:
                raise ValueError(
                    f"expected the same model, data, options and versions in all processes, but process {rank} differs "
                    f"({changes}); let all machines see the same"
                )
        token = ranks.of(0, self._put_token)
        blind = [rank for rank, sees in enumerate(ranks.gathered(self._sees(token))) if not sees]
        if blind and not ranks.leads:
            raise AbandonedError("the first process tells which processes do not see the folder")
        if blind:
            raise ValueError(
                f"expected all processes to see {str(self.partial)!r}, but processes {blind} do not; choose an --out "
                "in a folder that all machines share"
            )

    def _put_token(self) -> str:
        """Write a text that no other run has into the partial folder."""
        token = secrets.token_hex(8)
        write_atomically(self.partial / TOKEN, lambda temporary: temporary.write_text(token))
        return token

    def _sees(self, token: str) -> bool:
        """Whether the text is in the folder; shared folders may take a while."""
        file = self.partial / TOKEN
        for wait in (0.0, 0.1, 1.0, 5.0):
            time.sleep(wait)
            if file.is_file() and file.read_text() == token:
                return True
        return False

    def _begin(self) -> None:
        self._put_back()
        if self.finished:
            return
        file = self.partial / "options.json"
        if file.is_file():
            before = _read_facts(file)
            changes = differences(before["options"], self.options)
            if before["command"] != self.command:
                changes = f"the command was {before['command']}"
            if changes and not self.resume and not self.overwrite:
                raise FileExistsError(
                    f"expected the options of the interrupted run in {str(self.partial)!r}, got others ({changes}); "
                    "repeat them to go on, or pass --overwrite to start again"
                )
            if changes and not self.resume:
                self._clear()
                say(f"starting again, with other options than the interrupted run ({changes})")
            else:
                other = f", with other options ({changes}): what still fits is used" if changes else ""
                say(f"going on with the interrupted run in {self.partial}{other}")
        content = json.dumps({"command": self.command, "options": self.options}, indent=1)
        write_atomically(file, lambda temporary: temporary.write_text(content, encoding="utf-8"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if current().leads:
            self._leave_with(kind)

    def _leave_with(self, kind: type[BaseException] | None) -> None:
        if kind is not None:
            self._put_back()
        if kind is None or not any(file.is_file() for file in self.partial.glob("*/**/*")):
            self._clear()
            self._leave()
            return
        if kind is KeyboardInterrupt:
            say(f"{self.partial} keeps what is done; run the same command again to go on")
        self._lock.release()

    def _clear(self) -> None:
        for path in self.partial.iterdir():
            if path.name not in ("lock", "options.json"):
                _remove(path)

    def _leave(self) -> None:
        """Give the lock back and remove the partial folder."""
        (self.partial / "options.json").unlink(missing_ok=True)
        lock = self.partial / "lock"
        if os.name != "nt":  # there an open file cannot be removed
            lock.unlink(missing_ok=True)
        self._lock.release()
        if os.name == "nt":
            lock.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: another process is in it by now
            self.partial.rmdir()

    def new_folder(self) -> Path:
        """The empty folder for the model; what an earlier run wrote there is removed.

        Returns:
            The folder.
        """
        current().of(0, self._renew)
        return self.folder

    def _renew(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def record(self, facts: Mapping[str, Any], folder: Path) -> None:
        """Write down in a folder that the work is done, and the card of a model that is in it.

        Args:
            facts: What came out, as JSON-compatible data.
            folder: The folder with everything else that is to appear.
        """
        written = {"schema": SCHEMA, "command": self.command, "options": self.options, "versions": versions(), **facts}
        if (folder / "config.json").is_file():
            written |= self._lineage()
            write_card(folder, written, self.path)
        write_json(folder / RECORD, written)

    def _lineage(self) -> dict[str, Any]:
        """Where the model comes from: the name of the first one, and the commands from it to this one."""
        model = str(self.options["model"])
        before = (read_record(Path(model)) if Path(model).is_dir() else None) or {}
        with _checks.about(str(Path(model) / RECORD)):
            origin = _checks.typed(before.get("origin", unrooted(model)), str, "'origin' of the record")
            commands = _checks.typed(before.get("commands", []), list, "'commands' of the record")
        return {"origin": origin, "commands": [*map(str, commands), self.spelled]}

    def recorded(self, folder: Path) -> dict[str, Any] | None:
        """The record in a folder that did not come to appear, if it is of this work; None otherwise."""
        found = read_record(folder)
        return found if found is not None and found.get("options") == self.options else None

    def appear(self, folder: Path) -> None:
        """Let a folder with a record be the output.

        Args:
            folder: A folder inside the partial one.
        """
        if _is_empty(self.path):
            self.path.rmdir()
        elif os.path.lexists(self.path):
            self._discard_old()
            os.replace(self.path, self._old)
        os.replace(folder, self.path)
        self._discard_old()
        say(f"wrote {self.path}")

    @property
    def _old(self) -> Path:
        """The place of the output before, from its move until the new one is there."""
        return self.partial / "old"

    def _put_back(self) -> None:
        """Put back the output before, if a run ended between the two moves of ``appear``."""
        if os.path.lexists(self._old) and not os.path.lexists(self.path):
            os.replace(self._old, self.path)

    def _discard_old(self) -> None:
        """Remove the output before; half of it is never at the place from which it is put back."""
        discarded = self.partial / "discarded"
        if os.path.lexists(discarded):
            _remove(discarded)
        if os.path.lexists(self._old):
            os.replace(self._old, discarded)
            _remove(discarded)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the record into ``folder``, and let it be the output, in the first process."""
        current().of(0, lambda: self._finish(facts))

    def _finish(self, facts: Mapping[str, Any]) -> None:
        self.record(facts, self.folder)
        self.appear(self.folder)


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON, atomically."""
    content = json.dumps(data, indent=1, default=str) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in a folder; None where there is none, or one of another program."""
    file = folder / RECORD
    if not file.is_file():
        return None
    record = read_json(file, "the record of structmat")
    return _read_facts(file) if isinstance(record, dict) and "command" in record else None


def _read_facts(file: Path) -> dict[str, Any]:
    """Read a file that says which command made something, with which options."""
    what = "the record of a command"
    found = read_json(file, what)
    with _checks.about(str(file)):
        _checks.fields(found, {"command": str, "options": dict}, what)
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What changed between two sets of options, as text; empty where nothing did."""
    changed = [name for name in (*before, *(n for n in now if n not in before)) if before.get(name) != now.get(name)]
    hashes = {name: name.replace("_", " ") for name in changed if name.endswith(("_files", "_content"))}
    return ", ".join(hashes.get(name, f"{name}: {before.get(name)!r}, now {now.get(name)!r}") for name in changed)


def _remove(path: Path) -> None:
    """Remove a folder with all that is in it, a file, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and next(path.iterdir(), None) is None
