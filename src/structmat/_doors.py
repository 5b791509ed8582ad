"""The one door to optional frameworks: what the library does for transformers and diffusers without importing them.

The core knows no framework. ``structmat.integrations.<framework>`` knows one, and is imported in either of two moments:
when surgery meets a module of that framework (``open_doors``), and when the framework's own module that loads models
has been imported (``watch``), so that ``import structmat`` is all that ``from_pretrained`` needs.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from torch import nn

FRAMEWORKS: dict[str, str] = {
    "transformers": "transformers.modeling_utils",
    "diffusers": "diffusers.models.modeling_utils",
}
"""Every framework that has a door, and the module of it without which no model is loaded."""

RECORDERS: dict[str, Callable[[nn.Module], None]] = {}
"""By framework, what writes the structure of a network into the configurations of the framework's models in it."""


def open_doors(model: nn.Module) -> None:
    """Import the integration of every framework that a module of the network comes from."""
    bases = {base for kind in {type(module) for module in model.modules()} for base in kind.__mro__}
    packages = {base.__module__.partition(".")[0] for base in bases}
    for framework in FRAMEWORKS:
        if framework in packages and framework in sys.modules:
            importlib.import_module(f"structmat.integrations.{framework}")


def record(model: nn.Module) -> None:
    """Let every framework write down what the network is now made of, so that its own way of saving works."""
    open_doors(model)
    for recorder in RECORDERS.values():
        recorder(model)


def watch() -> None:
    """Register with frameworks that are there already, and with others as soon as they are imported."""
    for framework, loader in FRAMEWORKS.items():
        if loader in sys.modules:
            importlib.import_module(f"structmat.integrations.{framework}")
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


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
            spec.loader = _Follower(spec.loader, f"structmat.integrations.{framework}")
        return spec


class _Follower(importlib.abc.Loader):
    """Loads a module as its own loader does, then imports another."""

    def __init__(self, loader: importlib.abc.Loader, follower: str) -> None:
        self.loader = loader
        self.follower = follower

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        importlib.import_module(self.follower)
