"""When an integration is imported: as soon as its framework is in use, so that ``import structmat`` is all it takes.

Only this module knows which frameworks there are. An integration that cannot be imported, because its framework is too
old for example, is a warning with the remedy: the user's own import of the framework goes on. Whoever imports an
integration directly gets an error with the same words.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Framework:
    """A library that an integration works with.

    Attributes:
        oldest: The oldest version of it that the integration works with.
        extra: The extra of structmat that installs it.
        loader: The module of the framework without which no model is loaded; empty where structmat need not register.
        integration: The module that registers structmat with the framework.
    """

    oldest: str
    extra: str
    loader: str = ""
    integration: str = ""


FRAMEWORKS: dict[str, Framework] = {
    "transformers": Framework(
        "5.17", "transformers", "transformers.modeling_utils", "structmat.integrations.transformers"
    ),
    "diffusers": Framework("0.42", "diffusers", "diffusers.models.modeling_utils", "structmat.integrations.diffusers"),
    "peft": Framework("0.21", "peft"),
    "lm_eval": Framework("0.4.13", "evaluate"),
    "huggingface_hub": Framework("0.25", "transformers"),
}
"""Every library that an integration imports, by the name of its package."""

_warned: set[str] = set()


def watch() -> None:
    """Register with frameworks that are imported already, and with others as soon as they are."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    for name, framework in FRAMEWORKS.items():
        if framework.loader in sys.modules:
            open_door(name)
        elif framework.loader and name in sys.modules:
            look_at(name)


def look_at(name: str) -> bool:
    """Check the version of a framework that is in use; a warning says what to do where it is too old.

    Args:
        name: A key of ``FRAMEWORKS``.

    Returns:
        Whether it is recent enough.
    """
    return _works(name, check_version)


def open_door(name: str) -> bool:
    """Import the integration of a framework that is in use; a warning says why where that fails.

    Args:
        name: A key of ``FRAMEWORKS``.

    Returns:
        Whether the integration works.
    """
    return _works(name, _import_integration)


def _import_integration(name: str) -> None:
    check_version(name)
    importlib.import_module(FRAMEWORKS[name].integration)


def _works(name: str, step: Callable[[str], object]) -> bool:
    """Whether a step succeeds; the first one that fails for a framework is a warning."""
    try:
        step(name)
    except Exception as error:
        if name not in _warned:
            _warned.add(name)
            warnings.warn(
                f"structmat does not work with this {name}: {' '.join(str(error).split()) or repr(error)}. Until then "
                f"models of {name} are neither saved nor loaded with structured layers",
                stacklevel=4,  # the import of the framework, or of structmat
            )
        return False
    return True


def check_version(name: str) -> None:
    """Check that a framework is installed and recent enough.

    Args:
        name: A key of ``FRAMEWORKS``.

    Raises:
        ImportError: If it is missing, or older than its integration supports.
    """
    framework = FRAMEWORKS[name]
    if sys.modules.get(name) is None and importlib.util.find_spec(name) is None:
        raise ImportError(f"expected {name} to be installed; run: pip install 'structmat[{framework.extra}]'")
    try:
        installed = version(name)
    except PackageNotFoundError:  # a copy that is not installed has no version to check
        return
    if _numbers(installed) < _numbers(framework.oldest):
        raise ImportError(
            f"expected {name} {framework.oldest} or newer, got {installed}; run: "
            f"pip install --upgrade '{name}>={framework.oldest}'"
        )


def checked_module(name: str) -> Any:
    """Import a module of a framework for its integration.

    Args:
        name: The module, such as ``"peft.tuners.tuners_utils"``.

    Returns:
        The module.

    Raises:
        ImportError: If the framework is missing or too old, with the command that installs it.
    """
    check_version(name.partition(".")[0])
    return importlib.import_module(name)


def _numbers(text: str) -> tuple[int, ...]:
    """The numbers with which a version begins."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(number) for number in found[0].split(".")) if found else ()


class _Watcher(importlib.abc.MetaPathFinder):
    """A finder that finds nothing itself, and has a door opened right after a framework is imported."""

    def __init__(self) -> None:
        self.looking: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        then = _after(fullname)
        if then is None or fullname in self.looking:
            return None
        self.looking.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.looking.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Follower(spec.loader, then)
        return spec


def _after(module: str) -> Callable[[], object] | None:
    """What is to be done once a module is imported."""
    for name, framework in FRAMEWORKS.items():
        if module == framework.loader:
            return functools.partial(open_door, name)
        if module == name and framework.loader:
            return functools.partial(look_at, name)
    return None


class _Follower(importlib.abc.Loader):
    """A loader that loads a module as its own loader does, and then takes one more step."""

    def __init__(self, loader: importlib.abc.Loader, then: Callable[[], object]) -> None:
        self.loader, self.then = loader, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["loader"], name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.then()
