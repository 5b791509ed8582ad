"""Every reader of stored files against thousands of small damages: a clear error, or what was stored.

Each case damages a file once: a bit, a cut, a slice, a value of another kind, a huge number, a name that comes twice,
tensors that change places. The seeds are fixed. ``STRUCTMAT_FUZZ=10000`` runs that many cases instead of a few hundred.
"""

import copy
import json
import os
import random
import resource
import shutil
import struct
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import structmat as sm
from structmat.bench import Tuning
from structmat.bench.autotune import Choice
from structmat.cli.output import Output, read_record
from structmat.cli.report import errors_of, read_history
from structmat.cli.retrain import last_checkpoint
from structmat.formats import TiledGblr
from structmat.integrations.integrity import verify
from structmat.integrations.transformers import skeleton

CASES = int(os.environ.get("STRUCTMAT_FUZZ", "600"))
SECONDS, MEBIBYTES = 5, 500
EXPECTED = (ValueError, OSError)
"""The errors that a damaged file may cause; FileNotFoundError and FileExistsError are among them."""

MISMATCH = "You set `ignore_mismatched_sizes` to `False`"
"""What transformers says, as docs/huggingface.md tells, where a configuration names no plan of ours any more."""

Rng = random.Random
Check = Callable[[Path], None]

# Damages


def of_bytes(content: bytes, rng: Rng) -> bytes:
    """Damage bytes: bits, a cut, or a slice that is gone, twice there, random, or elsewhere."""
    data, size = bytearray(content), len(content)
    a, b = sorted((rng.randrange(size), rng.randrange(size + 1)))
    b = min(b, a + rng.choice((1, 2, 8, 64, size)))
    how = rng.randrange(6)
    if how == 0:
        for _ in range(rng.choice((1, 1, 2, 9))):
            data[rng.randrange(size)] ^= 1 << rng.randrange(8)
    elif how == 1:
        del data[rng.randrange(size) :]
    elif how == 2:
        del data[a:b]
    elif how == 3:
        data[a:a] = data[a:b]
    elif how == 4:
        data[a:b] = rng.randbytes(b - a)
    else:
        data[a:b] = bytes(b - a)
    return bytes(data)


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 1.5, 2.0, 1e308, float("inf"), float("nan"), 2**31, 2**63, 10**13, 10**30, 10**400,
    "", "0", "blast", "../x", "x" * 5000, "\ud800", "é", [], [[]], [0, 0], [1, "a"], {}, {"": {}}, {"format": "blast"},
    deep(40), deep(400),
]  # fmt: skip
TWICE = "\u0001twice"


def of_json(data: Any, rng: Rng) -> str:
    """Damage parsed JSON in one place, and give the text."""
    data = copy.deepcopy(data)
    places = list(_places([data], ()))
    *way, last = rng.choice(places)
    parent: Any = [data]
    root = parent
    for step in way:
        parent = parent[step]
    how, value = rng.randrange(7), parent[last]
    if how == 0 and isinstance(parent, dict):
        del parent[last]
    elif how == 1 and isinstance(parent, dict):
        parent[rng.choice(("", "x", f"{last}x", *parent))] = parent.pop(last)
    elif how == 2 and isinstance(parent, dict):
        parent[TWICE] = rng.choice((value, *JUNK[:6]))
        return json.dumps(root[0]).replace(json.dumps(TWICE), json.dumps(last))
    elif how == 3:
        *there, other = rng.choice(places)
        target: Any = root
        for step in there:
            target = target[step]
        parent[last] = copy.deepcopy(target[other])
    elif how == 4 and isinstance(value, (int, float)):
        parent[last] = rng.choice((value + 1, value - 1, -value, value * 2, float(value), str(value), value * 10**9))
    elif how == 5 and isinstance(value, list) and value:
        rng.choice((value.reverse, value.pop, lambda: value.append(value[0]), value.clear))()
    else:
        parent[last] = rng.choice(JUNK)
    return json.dumps(root[0])


def _places(value: Any, way: tuple[Any, ...]) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield (*way, key)
        yield from _places(one, (*way, key))


def of_text(file: Path, rng: Rng) -> None:
    """Damage a JSON file, as bytes or as JSON."""
    content = file.read_bytes()
    damaged = of_bytes(content, rng) if rng.random() < 0.3 else of_json(json.loads(content), rng).encode()
    file.write_bytes(damaged)


def of_tensors(file: Path, rng: Rng) -> None:
    """Damage a safetensors file: its bytes, its header, the JSON within its metadata, or its tensors."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    how = rng.randrange(5)
    if how == 0:
        file.write_bytes(of_bytes(content, rng))
    elif how == 1:
        header = of_json(json.loads(content[8 : 8 + length]), rng).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    elif how == 2:
        file.write_bytes(content[: 8 + length] + of_bytes(content[8 + length :], rng))
    else:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        if how == 3 and len(metadata) + ("format" not in metadata) > 1:
            key = rng.choice([key for key in metadata if key != "format"])
            metadata[key] = of_json(json.loads(metadata[key]), rng)
        else:
            _of_values(tensors, rng)
        save_file(tensors, file, metadata)


def _of_values(tensors: dict[str, Tensor], rng: Rng) -> None:
    a, b = rng.choice(list(tensors)), rng.choice(list(tensors))
    how = rng.randrange(6)
    if how == 0:
        tensors[a], tensors[b] = tensors[b], tensors[a]
    elif how == 1:
        del tensors[a]
    elif how == 2:
        tensors[a] = tensors[b].clone()
    elif how == 3 and tensors[a].is_floating_point() and tensors[a].numel():
        tensors[a].view(-1)[rng.randrange(tensors[a].numel())] = rng.choice((float("nan"), float("inf"), 0.0, 1e30))
    elif how == 4:
        tensors[a] = tensors[a].to(rng.choice((torch.float16, torch.float64, torch.int32, torch.uint8, torch.bool)))
    else:
        tensors[a] = tensors[a].flip(0) if rng.random() < 0.5 and tensors[a].dim() else tensors[a].reshape(-1)


# What is stored


class Network(nn.Module):
    """One layer of every format, and a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(9))
        self.layers[8].weight = self.layers[0].weight
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.norm(x)


PLAN = {
    "layers.0": sm.Blast(16, 16, (2, 2), 3),
    "layers.1": sm.LowRank(16, 16, 3),
    "layers.2": sm.Monarch(16, 16, (2, 2), 2),
    "layers.3": sm.BlockDiagonal(16, 16, 4),
    "layers.4": sm.BlockSparse(16, 16, ("1010", "0101", "1001", "0110"), 1),
    "layers.5": sm.GaudiGblr(16, 16, 4, 0.25),
    "layers.6": sm.GaudiGblr(16, 16, 4, 0.25),
    "layers.7": sm.GaudiGblr(16, 16, 4, 0.25),
}
X = torch.linspace(-1, 1, 5 * 16).reshape(5, 16)


def network() -> nn.Module:
    """The network with a layer of every format, hardened and tiled ones included."""
    torch.manual_seed(0)
    model = sm.apply_plan_(Network(), PLAN).eval()
    sm.harden_(model, ["layers.6", "layers.7"])
    sm.tile_(model, ["layers.7"])
    assert isinstance(sm.plan_of(model)["layers.7"], TiledGblr)
    return model


def same(got: Tensor, expected: Tensor) -> None:
    close = torch.allclose(got, expected, rtol=1e-5, atol=1e-6)  # where memory is aligned otherwise, rounding differs
    assert close, "the outputs changed without a word"


@dataclass(frozen=True)
class Target:
    """Something stored: how it is made in a folder, damaged, and read.

    Attributes:
        share: The share of all cases.
        make: Makes the files, and gives what reads them; that raises an AssertionError where a result is wrong.
        damage: Damages one of the files.
    """

    share: float
    make: Callable[[Path], Check]
    damage: Callable[[Path, Rng], None]


def plan(folder: Path) -> Check:
    sm.plan_of(network()).save(folder / "plan.json")

    def check(folder: Path) -> None:
        found = sm.Plan.load(folder / "plan.json")
        assert sm.Plan.from_json(found.to_json()) == found
        assert len(str(found)) >= 0
        for format in found.values():
            assert format.multiplications(3) >= 0
        with outside_files():
            sm.apply_plan_(Network(), found)

    return check


class AboutNoFileError(ValueError):
    """An error that is expected, and has no file to name."""


class outside_files:
    """Let errors of what is done with something that was read name no file."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if type(error) is ValueError and _raised_by_us(error):
            raise AboutNoFileError(str(error)) from error


def checkpoint(folder: Path) -> Check:
    model = network()
    sm.save_model(model, folder / "m.safetensors")
    expected = model(X)

    def check(folder: Path) -> None:
        same(sm.load_model(Network().eval(), folder / "m.safetensors")(X), expected)
        found = verify(folder / "m.safetensors")
        assert found.problems == ()

    return check


def old_checkpoint(folder: Path) -> Check:
    """Without digests, values may differ, and nothing else."""
    checkpoint(folder)
    file = folder / "m.safetensors"
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["structmat"])
    del header["digests"]
    save_file(
        {name: tensor.clone() for name, tensor in load_file(file).items()}, file, {"structmat": json.dumps(header)}
    )

    def check(folder: Path) -> None:
        sm.load_model(Network().eval(), folder / "m.safetensors")(X)
        verify(folder / "m.safetensors")

    return check


TOKENS = torch.arange(1, 8)[None]


def llama(folder: Path, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    formats = [*PLAN.values()][:7]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name]
    sm.apply_plan_(model, dict(zip(names, formats, strict=True)))
    sm.harden_(model, [names[6]])
    model.save_pretrained(folder, **options)
    return model


def pretrained(folder: Path) -> Check:
    model = llama(folder, max_shard_size="6KB")
    assert (folder / "model.safetensors.index.json").is_file()
    expected = model(TOKENS).logits

    def check(folder: Path) -> None:
        loaded: Any = sm.load_pretrained(folder)
        same(loaded(TOKENS).logits, expected)
        same(AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits, expected)
        assert all("'model.safetensors.index.json' has it" in problem for problem in verify(folder).problems)
        assert skeleton(folder).config.hidden_size == 16

    return check


def of_pretrained(folder: Path, rng: Rng) -> None:
    """Damage the shards, the index, or what the configuration says about structured layers."""
    if rng.random() < 0.5:
        of_tensors(rng.choice(sorted(folder.glob("*.safetensors"))), rng)
    elif rng.random() < 0.3:
        of_text(folder / "model.safetensors.index.json", rng)
    else:
        config = json.loads((folder / "config.json").read_text())
        if rng.random() < 0.8:
            text = json.dumps({**config, "quantization_config": "\u0002"})
            text = text.replace(json.dumps("\u0002"), of_json(config["quantization_config"], rng))
        else:
            text = json.dumps({**config, rng.choice(("architectures", "quantization_config")): rng.choice(JUNK)})
        (folder / "config.json").write_text(text)


def cache(folder: Path) -> Check:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    plan = {"0": sm.LowRank(16, 16, 3), "1": sm.GaudiGblr(16, 16, 4, 0.25)}
    expected = copy.deepcopy(dense)
    sm.compress_(expected, plan, cache=folder / "fits", progress=False)

    def check(folder: Path) -> None:
        model = copy.deepcopy(dense)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the finished fit in .* is damaged and is made again")
            fits = sm.compress_(model, plan, cache=folder / "fits", progress=False)
        same(model(X), expected(X))
        assert all(0 <= fit.error < 1 for fit in fits.values())

    return check


OPTIONS = {"model": "m", "keep": 0.5, "layers": ["a", "b"], "model_files": "0123"}


def run_records(folder: Path) -> Check:
    interrupted = folder / "out.partial"
    interrupted.mkdir(parents=True)
    (interrupted / "options.json").write_text(json.dumps({"command": "compress", "options": OPTIONS}))
    (interrupted / "fits").mkdir()
    (interrupted / "fits" / "a").write_text("x")
    finished = folder / "done"
    finished.mkdir()
    layers = {"a": {"error": 0.5}, "b": {"error": 0.25}}
    facts = {"schema": 1, "command": "compress", "options": OPTIONS, "layers": layers}
    (finished / "structmat.json").write_text(json.dumps(facts))
    checkpoint = folder / "run" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    entry = {"step": 1, "structure_share": 0.5, "costs": {"a": 0.5}}
    state = {"stateful_callbacks": {"StructureCallback": {"args": {}, "attributes": {"history": [entry, entry]}}}}
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 7, **state}))

    def check(folder: Path) -> None:
        with Output(folder / "out", "compress", OPTIONS):
            assert (folder / "out.partial" / "fits" / "a").read_text() == "x"
            raise_to_leave = Output(folder / "done", "compress", OPTIONS)
            assert isinstance(raise_to_leave.finished, bool)
        record = read_record(folder / "done")
        if record is not None:
            assert len(errors_of(record, folder / "done")) >= 0
        assert last_checkpoint(folder / "run") in (None, folder / "run" / "checkpoint-7")
        for entry in read_history(folder / "run"):
            assert isinstance(entry["step"], int)

    return check


def of_records(folder: Path, rng: Rng) -> None:
    names = ("out.partial/options.json", "done/structmat.json", "run/checkpoint-7/trainer_state.json")
    of_text(folder / rng.choice(names), rng)


def tuning(folder: Path) -> Check:
    model = network()
    expected = model(X)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, sm.StructuredLinear)}
    choices = [
        Choice(
            name, str(layer.format), tokens, "float32", (*layer.format.algorithms, "automatic")[0], 1e-3, 2e-3, 3e-3, 9
        )
        for name, layer in layers.items()
        for tokens in (1, 5)
    ]
    Tuning(tuple(choices), {"processor": "x"}).save(folder / "choices.json")

    def check(folder: Path) -> None:
        found = Tuning.load(folder / "choices.json")
        assert len(str(found)) >= 0
        other = copy.deepcopy(model)
        with warnings.catch_warnings(), outside_files():
            warnings.filterwarnings("ignore", "the choices were measured elsewhere")
            found.apply_(other)
        assert torch.allclose(other(X), expected, atol=1e-5)

    return check


def launches(folder: Path) -> Check:
    launching = pytest.importorskip("structmat.ops.triton.tuning")
    stored = {"blast|16|float32": {"BLOCK": 16, "num_warps": 4}, "monarch|8": {"BLOCK": 32, "way": "x"}}
    (folder / "gpu.json").write_text(json.dumps(stored))

    def check(folder: Path) -> None:
        found = launching._read(folder / "gpu.json")  # damaged: all is measured again
        assert all(isinstance(key, str) and isinstance(choice, dict) for key, choice in found.items())

    return check


TARGETS = {
    "plan": Target(0.17, plan, lambda folder, rng: of_text(folder / "plan.json", rng)),
    "checkpoint": Target(0.2, checkpoint, lambda folder, rng: of_tensors(folder / "m.safetensors", rng)),
    "checkpoint without digests": Target(
        0.13, old_checkpoint, lambda folder, rng: of_tensors(folder / "m.safetensors", rng)
    ),
    "folder of transformers": Target(0.15, pretrained, of_pretrained),
    "cache of fits": Target(
        0.1, cache, lambda folder, rng: of_tensors(rng.choice(sorted((folder / "fits").iterdir())), rng)
    ),
    "records of runs": Target(0.1, run_records, of_records),
    "tuning": Target(0.1, tuning, lambda folder, rng: of_text(folder / "choices.json", rng)),
    "launches": Target(0.05, launches, lambda folder, rng: of_text(folder / "gpu.json", rng)),
}


def _raised_by_us(error: BaseException) -> bool:
    """Whether the error comes from a line of this package that raises."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "structmat" in Path(last.filename).parts and (last.line or "").startswith(("raise", "_checks"))


def complaint(error: Exception, folder: Path) -> str:
    """What is wrong with an error; empty if it is one that a damaged file may cause."""
    if isinstance(error, AboutNoFileError) or (type(error) is RuntimeError and MISMATCH in str(error)):
        return ""
    last = traceback.extract_tb(error.__traceback__)[-1]
    said = f"{type(error).__name__}: {str(error)[:300]} ({last.filename}:{last.lineno})"
    if not isinstance(error, EXPECTED):
        return said
    return "" if str(folder) in str(error) else f"names no file: {said}"


@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_file_is_an_error_that_names_it_or_makes_no_difference(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    (tmp_path / "whole").mkdir()
    check = target.make(tmp_path / "whole")
    cases = max(1, round(target.share * CASES))
    outcomes = {"error": 0, "same": 0}
    wrong: list[str] = []
    for case in range(-1, cases):
        folder = tmp_path / "case"
        shutil.copytree(tmp_path / "whole", folder)
        if case >= 0:
            target.damage(folder, Rng(f"{name} {case}"))
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            check(folder)
            outcomes["same"] += case >= 0
        except Exception as error:
            outcomes["error"] += 1
            said = complaint(error, folder)
            if said or case < 0:
                wrong.append(f"case {case}: {said or error}")
        seconds, more = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if case >= 0 and (seconds > SECONDS or more > MEBIBYTES * 1024):
            wrong.append(f"case {case}: {seconds:.1f} s, {more / 1024:.0f} MiB")
        shutil.rmtree(folder)
    print(f"{name}: {cases} cases, {outcomes}")
    assert not wrong, f"{len(wrong)} of {cases}:\n" + "\n".join(wrong[:40])
