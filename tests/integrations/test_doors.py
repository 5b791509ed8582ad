"""The doors through which frameworks come in: an integration is imported in time, or a warning says why not."""

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from networks import build
from torch import nn
from transformers import LlamaForCausalLM

from structmat import LowRank, apply_plan_
from structmat.integrations import doors
from structmat.integrations.doors import Framework

TOO_OLD = (
    r"structmat does not work with this framework_of_a_test: expected framework_of_a_test 2\.10 or newer, got 2\.9\.1; "
    r"run: pip install --upgrade 'framework_of_a_test>=2\.10'\. Until then models of framework_of_a_test are neither "
    r"saved nor loaded with structured layers"
)


@pytest.fixture
def framework(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with a module that loads models, another one that is its integration, and its version, 2.10."""
    package = tmp_path / "framework_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("value = 3\n")
    (package / "loading.py").write_text("value = 4\n")
    (tmp_path / "integration_of_a_test.py").write_text("value = 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    entry = Framework("2.10", "extra", "framework_of_a_test.loading", "integration_of_a_test")
    monkeypatch.setattr(doors, "FRAMEWORKS", {"framework_of_a_test": entry})
    monkeypatch.setattr(doors, "version", lambda name: "2.10")
    monkeypatch.setattr(doors, "_warned", set())
    yield tmp_path
    for name in ("framework_of_a_test", "framework_of_a_test.loading", "integration_of_a_test"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("framework")
def test_an_integration_follows_what_loads_models() -> None:
    module = importlib.import_module("framework_of_a_test")
    assert module.value == 3
    assert "integration_of_a_test" not in sys.modules
    loading = importlib.import_module("framework_of_a_test.loading")
    assert loading.value == 4
    assert "integration_of_a_test" in sys.modules
    for one in (module, loading):
        assert not isinstance(one.__loader__, doors._Follower)
        assert not isinstance(one.__spec__.loader, doors._Follower)  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.usefixtures("framework")
def test_what_is_imported_already_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [one for one in sys.meta_path if not isinstance(one, doors._Watcher)])
    importlib.import_module("framework_of_a_test.loading")
    assert "integration_of_a_test" not in sys.modules
    doors.watch()
    assert "integration_of_a_test" in sys.modules


@pytest.mark.usefixtures("framework")
def test_a_framework_that_is_imported_but_too_old_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("framework_of_a_test")
    monkeypatch.setattr(doors, "version", lambda name: "2.9.1")
    with pytest.warns(UserWarning, match=TOO_OLD):
        doors.watch()


@pytest.mark.usefixtures("framework")
def test_a_framework_that_is_too_old_is_imported_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "version", lambda name: "2.9.1")
    with pytest.warns(UserWarning, match=TOO_OLD) as caught:
        module = importlib.import_module("framework_of_a_test.loading")
    assert (module.value, len(caught)) == (4, 1)
    assert "integration_of_a_test" not in sys.modules
    assert not doors.open_door("framework_of_a_test")


def test_an_integration_that_fails_leaves_the_import_alone(framework: Path) -> None:
    (framework / "integration_of_a_test.py").write_text("raise RuntimeError('broken\\n  in two lines')\n")
    with pytest.warns(UserWarning, match=r"with this framework_of_a_test: broken in two lines\. Until then") as caught:
        module = importlib.import_module("framework_of_a_test.loading")
    assert (module.value, len(caught)) == (4, 1)
    with warnings.catch_warnings(action="error") if sys.version_info >= (3, 11) else warnings.catch_warnings():
        assert not doors.open_door("framework_of_a_test")


def test_an_error_of_the_framework_is_its_own(framework: Path) -> None:
    (framework / "framework_of_a_test" / "loading.py").write_text("raise KeyError('mine')\n")
    with pytest.raises(KeyError, match="mine"):
        importlib.import_module("framework_of_a_test.loading")
    assert "integration_of_a_test" not in sys.modules


@pytest.mark.usefixtures("framework")
def test_what_only_asks_for_a_framework_imports_nothing() -> None:
    spec = importlib.util.find_spec("framework_of_a_test")
    assert spec is not None
    assert isinstance(spec.loader, doors._Follower)
    assert spec.loader.is_package("framework_of_a_test")
    assert "framework_of_a_test" not in sys.modules


def test_the_watch_is_kept_once() -> None:
    doors.watch()
    doors.watch()
    watchers = [finder for finder in sys.meta_path if isinstance(finder, doors._Watcher)]
    assert len(watchers) == 1
    assert watchers[0].find_spec("json", None) is None


def test_surgery_on_a_subclass_of_a_framework_reaches_its_configuration() -> None:
    class Mine(LlamaForCausalLM):
        pass

    model = nn.Sequential(Mine(build("LlamaForCausalLM").config))
    apply_plan_(model, {"0.model.layers.0.self_attn.q_proj": LowRank(32, 32, 4)})
    assert list(model[0].config.quantization_config.layers) == ["model.layers.0.self_attn.q_proj"]


def test_surgery_imports_no_framework() -> None:
    code = """
import sys, torch, structmat
Fake = type("Fake", (torch.nn.Sequential,), {"__module__": "transformers.fake"})
structmat.apply_plan_(Fake(torch.nn.Linear(8, 8)), {"0": structmat.LowRank(8, 8, 2)})
print([name for name in structmat.integrations.doors.FRAMEWORKS if name in sys.modules])
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert finished.stdout == "[]\n"


@pytest.mark.parametrize(
    ("version", "works"),
    [("5.16.9", False), ("4.57.6", False), ("5.17", True), ("5.17.0", True), ("5.18.0.dev0", True), ("10", True)],
)
def test_versions_are_compared_as_numbers(version: str, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doors, "version", lambda name: version)
    if works:
        doors.check_version("transformers")
        return
    with pytest.raises(ImportError, match=r"pip install --upgrade 'transformers>=5\.17'"):
        doors.check_version("transformers")


@pytest.mark.usefixtures("framework")
def test_a_copy_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doors, "version", missing)
    doors.check_version("framework_of_a_test")


@pytest.mark.parametrize("name", ["transformers", "diffusers", "peft", "lm_eval"])
def test_an_integration_that_is_imported_directly_says_what_to_install(name: str) -> None:
    code = f"import sys; sys.modules[{name!r}] = None; import structmat.integrations.{name}"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    extra = doors.FRAMEWORKS[name].extra
    assert finished.returncode == 1
    message = f"ImportError: expected {name} to be installed; run: pip install 'structmat[{extra}]'"
    assert finished.stderr.splitlines()[-1] == message


@pytest.mark.parametrize("name", ["transformers", "diffusers"])
def test_public_names_of_an_integration_are_sorted_and_there(name: str) -> None:
    package = importlib.import_module(f"structmat.integrations.{name}")
    assert package.__all__ == sorted(package.__all__, key=lambda one: (not one[0].isupper(), one))
    assert {one for one in dir(package) if not one.startswith("_")} >= set(package.__all__)
    assert all(getattr(package, one).__name__ == one for one in package.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018 - looked up alone


def test_an_integration_imports_what_is_used_alone() -> None:
    code = """
import sys, structmat.integrations.transformers
print([name.rpartition(".")[2] for name in sys.modules if name.startswith("structmat.integrations.transformers.")])
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert finished.stdout == "['quantizer']\n"
