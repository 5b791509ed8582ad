"""Files that are read: whatever is in them, an error names the file, at once and in little memory."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from structmat import LowRank, Plan, StructuredLinear, load_model
from structmat._files import DEEPEST_JSON, parse_json, read_json
from structmat.bench import Tuning
from structmat.cli.output import Output, read_record
from structmat.cli.report import read_history
from structmat.formats import format_from_json
from structmat.integrations.integrity import read_configuration, read_index, verify

LONG = 5
"""Seconds that no reader takes on any machine: these files take a few milliseconds, and a hang takes for ever."""

BOMBS: dict[str, str] = {
    "deep lists": "[" * 10**5,
    "deep lists that end": "[" * 500 + "]" * 500,
    "deep objects": '{"a":' * 10**5,
    "many lists": "[" + "[]," * 10**6 + "[]]",
    "many digits": '{"schema": ' + "9" * 10**6 + "}",
    "a name twice": '{"schema": 1, "layers": {}, "skipped": {}, "layers": {}}',
    "null": "null",
    "a list": "[1]",
    "a number": "1e999",
    "text": '"text"',
    "half": '{"schema": 1, "layers": {',
    "nothing": "",
    "no text": "\udcff\udcfe",
}


def read_plan(path: Path) -> Any:
    return Plan.load(path)


def read_tuning(path: Path) -> Any:
    return Tuning.load(path)


def read_resumed(path: Path) -> Any:
    """The record of an interrupted run, which nothing but such a record may be taken for."""
    output = Output(path.parent / "out", "compress", {})
    output.partial.mkdir()
    (output.partial / "options.json").write_bytes(path.read_bytes())
    with output:
        pass


def read_state(path: Path) -> Any:
    return read_history(path.rename(path.with_name("trainer_state.json")).parent)


def read_finished(path: Path) -> Any:
    return read_record(path.rename(path.with_name("structmat.json")).parent)


def read_header(path: Path) -> Any:
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    save_file({"a": torch.zeros(2)}, path, {"structmat": text.encode("utf-8", "replace").decode()})
    return load_model(nn.Linear(1, 1), path)


READERS: dict[str, Callable[[Path], Any]] = {
    "plan": read_plan,
    "tuning": read_tuning,
    "configuration": read_configuration,
    "index": read_index,
    "interrupted run": read_resumed,
    "state of a trainer": read_state,
    "finished run": read_finished,
    "header of a checkpoint": read_header,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("bomb", BOMBS)
def test_junk_in_any_stored_file_is_refused_by_name_at_once(reader: str, bomb: str, tmp_path: Path) -> None:
    path = tmp_path / "stored"
    path.write_bytes(BOMBS[bomb].encode("utf-8", "surrogateescape"))
    started = time.perf_counter()
    if reader == "finished run" and bomb in ("null", "a list", "a number", "text"):
        assert READERS[reader](path) is None  # another program's file
        return
    with pytest.raises((ValueError, FileExistsError), match=str(tmp_path)):
        READERS[reader](path)
    assert time.perf_counter() - started < LONG


def test_a_huge_file_is_refused_without_being_read(tmp_path: Path) -> None:
    with (tmp_path / "plan").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="plan' as JSON, got something else: it has more than 32 MiB"):
        Plan.load(tmp_path / "plan")


@pytest.mark.parametrize("text", ["[" + "[]," * 499_000 + "[]]", "[" + '{"":0},' * 330_000 + "0]", "[" * 10**6])
def test_memory_is_bounded(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan").write_text(text)
    code = f"""
import resource
from structmat._files import read_json
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_json({str(tmp_path / "plan")!r}, "a plan")
except ValueError:
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert int(run.stdout) < 200 * 1024


def test_what_is_within_the_limits_is_read(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(DEEPEST_JSON):
        deep = [deep]
    for data in (deep, {"a": [1, -2.5, None, True, "ü"]}, 10**30, []):
        (tmp_path / "file").write_text(json.dumps(data))
        assert read_json(tmp_path / "file", "data") == data
    with pytest.raises(
        ValueError, match=f"expected data as JSON, got something else: .* more than {DEEPEST_JSON} deep"
    ):
        parse_json(json.dumps([deep]), "data")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "expected the JSON of a format to be an object, got None"),
        ({"format": ["blast"], "M": 8, "N": 8}, r"expected the format's name to be text, got \['blast'\]"),
        ({"format": "gaudi_gblr", "M": 8, "N": 8, "components": 10**13}, "components to be .* at most 1000000"),
        ({"format": "gblr", "M": 8, "N": 8, "components": 10**9, "entries": [1, 1]}, "components to be .* at most"),
        ({"format": "blast", "M": 8, "N": 8, "blocks": 2, "rank": 10**400}, "rank .*, got an integer of 1329 bits"),
        ({"format": "blast", "M": 8, "N": 8, "blocks": "2" * 10**6, "rank": 1}, r"expected blocks .{,200}$"),
        ({"format": "blast", "M": 8, "N": 8, "blocks": [[[[[[2]]]]]], "rank": 1}, "expected lists at most 4 deep"),
        ({"format": "low_rank", "M": "8", "N": 8, "rank": 1}, "expected M .* to be an integer of at least 1, got '8'"),
        ({"format": "low_rank", "M": 8, "N": 8, "rank": True}, "expected rank to be an integer .*, got True"),
        ({"format": "low_rank", "M": 8, "N": 8, "rank": 1, "": 2}, "the fields of a low_rank format do not fit"),
        (
            {
                "format": "tiled_gblr", "M": 8, "N": 8, "components": 2, "out_groups": [1, 10**12], "in_groups": [1, 2],
                "block_sizes": [8, 8],
            },
            "expected tiles of at most 1000000 rows",
        ),
    ],
)  # fmt: skip
def test_numbers_and_kinds_that_no_format_has_are_refused(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        format_from_json(data)


def test_large_numbers_take_no_time() -> None:
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"expected a multiple that divides 10{18} and 10{18}, got 7$"):
        format_from_json({"format": "gaudi_gblr", "M": 10**18, "N": 10**18, "components": 4, "multiple": 7})
    assert format_from_json({"format": "gaudi_gblr", "M": 8, "N": 8, "components": 10**6}).keep > 0
    assert time.perf_counter() - started < LONG


CHOICE = {
    "layer": "0", "format": "LowRank(M=16, N=16, rank=2)", "tokens": 1, "dtype": "float32", "algorithm": "vectors",
    "seconds": 1, "automatic_seconds": 1.0, "dense_seconds": 1, "dense_bytes": -8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokens", 1.5, "'tokens' of a choice to be an integer, got 1.5"),
        ("tokens", 0, "'tokens' of a choice to be an integer of at least 1, got 0"),
        ("tokens", 10**30, "'tokens' of a choice to be an integer of at most 9223372036854775807"),
        ("seconds", 0, "expected seconds above 0"),
        ("dense_seconds", float("nan"), "'dense_seconds' of a choice to be a number, got nan"),
        ("algorithm", None, "'algorithm' of a choice to be text, got None"),
        ("layer", {}, "'layer' of a choice to be text"),
    ],
)
def test_a_choice_of_another_kind_is_refused(field: str, value: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "choices.json"
    file.write_text(json.dumps({"hardware": {}, "choices": [CHOICE]}))
    model = nn.Sequential(StructuredLinear(LowRank(16, 16, 2)))
    with pytest.raises(ValueError, match="the algorithm of '0' to be one of"):
        Tuning.load(file).apply_(model)
    file.write_text(json.dumps({"hardware": {}, "choices": [{**CHOICE, field: value}]}))
    with pytest.raises(ValueError, match=message) as raised:
        Tuning.load(file)
    assert str(file) in str(raised.value)
    file.write_text(json.dumps({"hardware": {"processor": 5}, "choices": []}))
    with pytest.raises(ValueError, match="'processor' of 'hardware' of the choices to be text, got 5"):
        Tuning.load(file)


@pytest.mark.parametrize(
    "file", ["../../etc/secret.safetensors", "..", "", "/x.safetensors", "x.bin", "\ud800.safetensors"]
)
def test_an_index_stays_in_its_folder(file: str, tmp_path: Path) -> None:
    (tmp_path / "index").write_text(json.dumps({"metadata": {}, "weight_map": {"a": file}}))
    with pytest.raises(ValueError, match="index': expected names of safetensors files in the same folder"):
        read_index(tmp_path / "index")


@pytest.mark.parametrize("place", ["missing", "folder", "fifo"])
def test_what_is_no_file_is_not_opened(place: str, tmp_path: Path) -> None:
    path = tmp_path / place
    if place == "folder":
        path.mkdir()
    elif place == "fifo":
        os.mkfifo(path)
    for read in (Plan.load, Tuning.load, read_configuration, verify):
        with pytest.raises(FileNotFoundError, match=str(path)):
            read(path)
