"""When an integration is imported: as soon as its framework is in use, so that ``import structmat`` is all it takes.

Only this module knows which frameworks there are. An integration that cannot be imported, with a framework that is too
old for example, is a warning with the remedy: the user's own import of the framework goes on.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

FRAMEWORKS: dict[str, str] = {
    "transformers": "transformers.modeling_utils",
    "diffusers": "diffusers.models.modeling_utils",
}
"""Every framework that has an integration, and the module of the framework without which no model is loaded."""

INTEGRATIONS: dict[str, str] = {
    "transformers": "structmat.integrations.transformers.quantizer",
    "diffusers": "structmat.integrations.diffusers",
}
"""The module that registers the library with each framework."""

OLDEST: dict[str, str] = {"transformers": "5.17", "diffusers": "0.42"}
"""The oldest version of each framework that its integration works with."""


def watch() -> None:
    """Register with frameworks that are imported already, and with others as soon as they are."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
    for framework, loader in FRAMEWORKS.items():
        if loader in sys.modules:
            open_door(framework)


def open_door(framework: str) -> bool:
    """Import the integration of a framework that is in use; a warning says why where that fails.

    Args:
        framework: A key of ``FRAMEWORKS``.

    Returns:
        Whether the integration works.
    """
    try:
        check_version(framework)
        importlib.import_module(INTEGRATIONS[framework])
    except Exception as error:
        warnings.warn(
            f"structmat does not work with this {framework}: {' '.join(str(error).split())}. Models of {framework} are "
            "neither saved nor loaded with structured layers in this process",
            stacklevel=2,
        )
        return False
    return True


def check_version(framework: str) -> None:
    """Check that an installed framework is recent enough.

    Args:
        framework: A key of ``OLDEST``.

    Raises:
        ImportError: If it is older than its integration supports.
    """
    try:
        installed = version(framework)
    except PackageNotFoundError:
        return
    if _numbers(installed) < _numbers(OLDEST[framework]):
        raise ImportError(
            f"expected {framework} {OLDEST[framework]} or newer, got {installed}; run: "
            f"pip install --upgrade 'structmat[{framework}]'"
        )


def _numbers(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing itself; lets the integration be imported right after the module that loads models."""

    def __init__(self) -> None:
        self.looking: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        framework = next((name for name, loader in FRAMEWORKS.items() if loader == fullname), None)
        if framework is None or fullname in self.looking:
            return None
        self.looking.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.looking.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Follower(spec.loader, framework)
        return spec


class _Follower(importlib.abc.Loader):
    """Loads a module as its own loader does, then opens the door of a framework."""

    def __init__(self, loader: importlib.abc.Loader, framework: str) -> None:
        self.loader = loader
        self.framework = framework

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        open_door(self.framework)
