"""For Python processes that tests start: as conftest does, let torchvision import where its wheel's library does not.

Put this folder on PYTHONPATH. The operators are declared when torchvision is imported, so that a process that does not
need torch does not pay for it.
"""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


class Declaring(importlib.abc.MetaPathFinder):
    """Finds nothing; declares the operators when torchvision is looked for, once."""

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == "torchvision" and "torchvision_ops" not in sys.modules:
            sys.meta_path.remove(self)
            file = Path(__file__).parents[1] / "torchvision_ops.py"
            spec = importlib.util.spec_from_file_location("torchvision_ops", file)
            if spec is not None and spec.loader is not None:
                module = importlib.util.module_from_spec(spec)
                sys.modules["torchvision_ops"] = module
                spec.loader.exec_module(module)
                module.declare()
        return None


sys.meta_path.insert(0, Declaring())
