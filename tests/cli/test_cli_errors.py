"""Errors: one line for what a user can cause, a traceback for a fault of the program, and ``--debug``."""

import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from structmat import _checks
from structmat.cli import main, models
from structmat.cli.errors import MEMORY, REPORT, door, explained, is_users
from training import tiny


def error_of(run: Callable[[], object]) -> Exception:
    """The error that a call raises."""
    try:
        run()
    except Exception as error:
        return error
    raise AssertionError("no error")


def raised(error: Exception) -> Callable[[], object]:
    def run() -> None:
        raise error

    return run


def test_what_the_package_raises_is_the_users() -> None:
    error = error_of(lambda: _checks.fraction(2, "--keep"))
    assert explained(error) == "expected --keep to be in (0, 1], got 2"


@pytest.mark.parametrize(
    "run",
    [
        lambda: int("x"),
        lambda: torch.zeros(2) @ torch.zeros(3),
        lambda: {}["x"],
        lambda: 1 / 0,
        lambda: _checks.divisors("x"),  # pyright: ignore[reportArgumentType] - fails inside the package, without raise
        raised(ValueError("not of the package")),
        raised(AttributeError("x")),
    ],
)
def test_anything_else_is_a_fault(run: Callable[[], object]) -> None:
    assert explained(error_of(run)) is None


def test_errors_from_outside_are_the_users(tmp_path: Path) -> None:
    broken = tmp_path / "model.safetensors"
    broken.write_bytes(b"x" * 20)
    assert isinstance(error := error_of(lambda: safe_open(broken, framework="pt")), SafetensorError)
    assert is_users(error)
    assert is_users(error_of(lambda: (tmp_path / "nothing").read_text()))
    assert is_users(error_of(lambda: lzma.decompress(b"x")))
    assert is_users(error_of(lambda: b"\xff".decode("utf-8")))
    assert is_users(error_of(raised(ModuleNotFoundError("No module named 'x'", name="x"))))
    assert not is_users(error_of(lambda: __import__("structmat.nowhere")))
    assert explained(error_of(raised(torch.OutOfMemoryError("CUDA out of memory")))) == "CUDA out of memory" + MEMORY
    assert explained(error_of(raised(RuntimeError("DefaultCPUAllocator: can't allocate memory")))) is not None
    assert explained(error_of(raised(OSError()))) == "OSError"


def test_what_another_package_refuses_is_the_users_at_its_door() -> None:
    def refuse() -> None:
        with door("json", "JSON"):
            json.loads("x")

    error = error_of(refuse)
    assert str(error).startswith("expected JSON: Expecting value")
    assert is_users(error)

    def fail() -> None:
        with door("json", "JSON"):
            int("x")

    assert not is_users(error_of(fail))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved Llama."""
    tiny.llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_a_fault_shows_its_traceback_and_ends_with_one(folder: Path) -> None:
    code = (
        "import sys, structmat.cli, structmat.cli.models as models\n"
        "models.skeleton = lambda name: 'no model'\n"
        f"sys.exit(structmat.cli.main(['plan', {str(folder)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ)
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"structmat: {REPORT}\nTraceback (most recent call last):")
    assert done.stderr.splitlines()[-1].startswith("AttributeError: 'str' object has no attribute")


@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_debug_stands_anywhere(place: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", str(folder), "--keep", "2"]
    with pytest.raises(ValueError, match=r"expected --keep to be in \(0, 1\], got 2.0"):
        main([*words[:place], "--debug", *words[place:]])
    assert "fault" not in capsys.readouterr().err
    assert main(words) == 1
    assert capsys.readouterr().err == "structmat: expected --keep to be in (0, 1], got 2.0\n"


def test_debug_as_a_value_is_a_value(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--layers=--debug"]) == 1
    assert "expected --layers '--debug' to pick a dense linear layer" in capsys.readouterr().err


def test_errors_speak_of_options(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--blocks", "5"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("structmat: layer 'model.layers.0.self_attn.q_proj' does not fit: ")
    assert told.endswith("Give it another format with --rule, leave it alone with --exclude, or pass --skip-misfits\n")
    assert "misfits=" not in told


def test_a_model_that_transformers_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "lama", "architectures": ["Lama"]}')
    assert main(["plan", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(
        f"structmat: expected a model that transformers knows, got {str(tmp_path)!r}"
    )


def test_settings_that_transformers_refuses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.tokenizer().save_pretrained(folder)
    (tmp_path / "x.txt").write_text("<|endoftext|>".join(tiny.sentences(24)), encoding="utf-8")
    words = ["retrain", str(folder), "-o", str(tmp_path / "out"), "--data", str(tmp_path / "x.txt"), "--device", "cpu"]
    assert main([*words, "--set", "optim=newton"]) == 1
    assert (
        "structmat: expected options of the training, --set included, that transformers takes"
        in capsys.readouterr().err
    )


def test_a_broken_checkpoint_is_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").write_bytes(b"x" * 20)
    assert main(["densify", str(folder), "-o", str(tmp_path / "out")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_loading_with_a_wrong_dtype_names_the_option(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"expected --dtype to be one of 'auto', .*, got 'int8'"):
        models.load(str(folder), models.Placement("int8"))


def test_types_are_checked_by_the_parser(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder), "--keep", "half"]) == 2
    assert "Invalid value for '--keep'" in capsys.readouterr().err
