"""What the source may import and where, what is public, and how lean the import is."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import structmat

SOURCE = Path(structmat.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

LEVELS = {
    0: ("_checks", "_digests", "_files", "_names", "_ranks", "_tables", "_version"),
    1: ("_progress", "ops"),
    2: ("formats",),
    3: ("data", "fit", "nn"),
    4: ("network",),
    5: ("plan",),
    6: ("checkpoint", "compress", "evaluate", "inspect", "training"),
    7: ("bench", "export"),
    8: ("integrations",),
    9: ("demo",),
    10: ("cli",),
    11: ("pretrained",),
}
"""A part imports from lower levels alone: never from above, and never from another part of its own level."""

LEVEL = {part: level for level, parts in LEVELS.items() for part in parts}


def part_of(path: Path) -> str:
    """The top-level part of the package that a file belongs to; ``""`` for the package's own ``__init__``."""
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_parts(tree: ast.AST) -> set[str]:
    """The parts of the package that a file imports."""
    parts: set[str] = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("structmat.")}
        assert "structmat" not in names, "import of the whole package"
    return parts


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))


def test_every_part_has_a_level() -> None:
    assert {part_of(path) for path in FILES} - {""} == set(LEVEL)


@each_file
def test_imports_point_down(path: Path) -> None:
    part, imported = part_of(path), imported_parts(tree_of(path))
    if part == "":
        return
    assert imported <= set(LEVEL)
    assert {other for other in imported - {part} if LEVEL[other] >= LEVEL[part]} == set()


def test_no_name_hides_a_module() -> None:
    """``import structmat.report`` and the like must never give a function."""
    code = """
import importlib, json, pkgutil, types, structmat
hidden = []
for package in ["structmat", *(m.name for m in pkgutil.walk_packages(structmat.__path__, "structmat.") if m.ispkg)]:
    if ".triton" in package:
        continue
    parent = importlib.import_module(package)
    for child in pkgutil.iter_modules(parent.__path__):
        found = getattr(parent, child.name, None)
        if found is not None and not isinstance(found, types.ModuleType):
            hidden.append(f"{package}.{child.name}")
print(json.dumps(hidden))
"""
    assert json.loads(fresh(code)) == []


def test_the_direction_test_sees_imports() -> None:
    source = (
        "from structmat import _checks\nfrom structmat.fit.base import Fit\nimport structmat.nn.linear\nimport torch"
    )
    assert imported_parts(ast.parse(source)) == {"_checks", "fit", "nn"}


@each_file
def test_imports_inside_functions_give_a_reason(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    functions = [
        n for n in ast.walk(tree_of(path)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    ]
    inside = {n.lineno for f in functions for n in ast.walk(f) if isinstance(n, (ast.Import, ast.ImportFrom))}
    assert [lines[k - 1] for k in sorted(inside) if "# noqa: PLC0415 - " not in lines[k - 1]] == []


@each_file
def test_input_is_never_checked_by_assert(path: Path) -> None:
    assert [node.lineno for node in ast.walk(tree_of(path)) if isinstance(node, ast.Assert)] == []


@each_file
def test_no_file_is_too_long_and_no_function(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert [f.name for f in functions_of(path) if lines_of(f) > 80] == []


def test_functions_are_short_and_exceptions_to_the_linter_few() -> None:
    lengths = sorted(lines_of(function) for path in FILES for function in functions_of(path))
    assert lengths[int(0.9 * len(lengths))] <= 25
    lines = [line for path in FILES for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum("noqa" in line for line in lines) < 12
    assert sum("fmt: skip" in line or "fmt: off" in line for line in lines) == 0


def functions_of(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def fresh(code: str) -> str:
    """What a new interpreter prints."""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_the_import_is_lean() -> None:
    code = """
import importlib, json, sys
for name in ("torch", "torch.utils.flop_counter", "numpy", "tqdm.auto", "safetensors.torch"):  # the second has triton
    importlib.import_module(name)
before = {name.partition(".")[0] for name in sys.modules}
import structmat, structmat.cli
after = {name.partition(".")[0] for name in sys.modules}
optional = ["matplotlib", "sklearn", "scipy", "pandas", "transformers", "diffusers", "triton", "datasets"]
print(json.dumps([sorted(after - before - set(sys.stdlib_module_names)), sorted(after & set(optional) - before)]))
print(json.dumps([name for name in sys.modules if name.startswith(("structmat.demo", "structmat.inspect.plots"))]))
"""
    lines = [json.loads(line) for line in fresh(code).splitlines()]
    assert lines == [[["structmat"], []], []]


@pytest.mark.parametrize("module", ["structmat.fit", "structmat.formats", "structmat.nn", "structmat.ops"])
def test_public_names_are_sorted_unique_and_there(module: str) -> None:
    imported = importlib.import_module(module)
    names = imported.__all__
    # as ruff sorts them: SCREAMING_CASE, then CamelCase, then the rest
    order = sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert names == order
    assert len(set(names)) == len(names)
    assert all(hasattr(imported, name) for name in names)


@pytest.mark.parametrize("module", ["structmat.fit", "structmat.formats", "structmat.nn", "structmat.ops"])
def test_public_names_are_complete(module: str) -> None:
    tree = tree_of(Path(str(importlib.import_module(module).__file__)))
    defined = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("structmat.")
        and (module == "structmat" or str(node.module).startswith(module + "."))
        for alias in node.names
    }  # fmt: skip
    defined |= {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    defined |= {
        node.target.id
        for node in tree.body
        if isinstance(node, (ast.AnnAssign, ast.AugAssign)) and isinstance(node.target, ast.Name)
    }
    assert {name for name in defined if not name.startswith("_") or name == "__version__"} == set(
        importlib.import_module(module).__all__
    )


def test_the_public_list() -> None:
    assert len(structmat.__all__) <= 35
    assert structmat.__all__ == [
        "Blast", "BlockDiagonal", "BlockSparse", "Dense", "Fit", "Format", "GaudiGblr", "Gblr", "LowRank", "Monarch",
        "Plan", "Refinement", "Rule", "StructuredConv2d", "StructuredLinear", "__version__", "allocate", "apply_plan_",
        "autotune_", "calibrate", "compress_", "compress_pretrained", "default_method", "densify_", "harden_",
        "load_model", "load_pretrained", "make_plan", "plan_of", "prepare_for_lora", "quantize_", "register_format",
        "report", "save_model", "tile_",
    ]  # fmt: skip


def test_a_star_import_gives_the_public_list() -> None:
    names = json.loads(fresh("import json\nfrom structmat import *\nprint(json.dumps(sorted(globals())))"))
    assert set(structmat.__all__) <= set(names)
