"""``--push-to-hub``: the upload of a finished folder, to a server on this machine."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

import structmat as sm
from processes import environment
from small_hub import Hub, serving
from structmat.cli import main
from structmat.cli.push import PushOptions
from training import tiny

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of the Hub's library


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama under ``dense`` and texts."""
    path = tmp_path_factory.mktemp("push")
    tiny.llama().save_pretrained(path / "dense")
    tiny.tokenizer().save_pretrained(path / "dense")
    (path / "texts.txt").write_text("<|endoftext|>".join(tiny.sentences(40)), encoding="utf-8")
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the library of this process uses, with a token."""
    with serving() as found:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


WORDS = ["--format", "low_rank", "--layers", ".*up_proj"]


def test_a_compressed_model_is_uploaded(
    folder: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    words = ["compress", str(folder / "dense"), "-o", str(out), *WORDS, "--push-to-hub", "me/small", "--private"]
    assert main(words) == 0
    assert hub.repositories["me/small"] == contents(out)
    assert {"README.md", "structmat.json", "model.safetensors"} <= set(contents(out))
    assert hub.private == {"me/small": True}
    assert "me/small" not in (out / "structmat.json").read_text()
    told = capsys.readouterr().err
    assert told.index(f"wrote {out}") < told.index(f"uploading {out} to me/small") < told.index(f"uploaded {out}: ")
    assert main(["compress", str(folder / "dense"), "-o", str(out), *WORDS, "--push-to-hub", "me/other"]) == 0
    assert hub.repositories["me/other"] == contents(out)  # what is finished is not made again
    assert hub.private["me/other"] is False


def test_a_retrained_model_is_uploaded(folder: Path, tmp_path: Path, hub: Hub) -> None:
    sm.compress_pretrained(
        folder / "dense", tmp_path / "small", format="low_rank", layers=".*up_proj", push_to_hub="small"
    )
    assert hub.repositories["me/small"] == contents(tmp_path / "small")
    words = ["--data", str(folder / "texts.txt"), "--steps", "1", "--device", "cpu", "--length", "16"]
    words += ["--push-to-hub", "me/better"]
    assert main(["retrain", str(tmp_path / "small"), "-o", str(tmp_path / "better"), *words]) == 0
    assert hub.repositories["me/better"] == contents(tmp_path / "better")


def test_a_failed_upload_leaves_the_folder(
    folder: Path, tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    words = ["compress", str(folder / "dense"), "-o", str(out), *WORDS, "--push-to-hub", "me/small", "--private"]
    hub.refuses = "this token cannot write"
    assert main(words) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"structmat: expected to upload {str(out)!r} to 'me/small', but the upload failed: ")
    assert "this token cannot write" in last
    later = f"hf upload me/small {shlex.quote(str(out))} . --private"
    assert last.endswith(f"; the folder is complete, and {later} uploads it")
    assert {path.name for path in tmp_path.iterdir()} == {"small"}
    assert main(["verify", str(out)]) == 0
    hub.refuses = None
    assert main(words) == 0
    assert hub.repositories["me/small"] == contents(out)


def test_a_hub_that_is_not_there(
    folder: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["compress", str(folder / "dense"), "-o", str(tmp_path / "small"), *WORDS, "--push-to-hub", "a/b"]) == 1
    assert "the folder is complete, and hf upload a/b " in capsys.readouterr().err
    assert sm.load_pretrained(tmp_path / "small") is not None


def test_what_cannot_be_uploaded_fails_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected --push-to-hub with --private"):
        PushOptions(private=True)
    with pytest.raises(ValueError, match="expected --push-to-hub to name a repository, such as user/name, got 'a/b/c'"):
        PushOptions("a/b/c").check()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="expected a token of the Hub for --push-to-hub, found none; run hf auth"):
        PushOptions("a/b").check()
    PushOptions().check()


@pytest.mark.slow
def test_a_process_uploads_to_the_hub_that_the_environment_names(folder: Path, tmp_path: Path) -> None:
    words = ["compress", str(folder / "dense"), "-o", str(tmp_path / "small"), *WORDS, "--push-to-hub", "me/small"]
    with serving() as hub:
        own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_test", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        ended = subprocess.run(
            [sys.executable, "-m", "structmat.cli", *words],
            env={**environment(), **own, "PYTHONPATH": os.pathsep.join((environment()["PYTHONPATH"], *sys.path))},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        assert hub.repositories["me/small"] == contents(tmp_path / "small")
