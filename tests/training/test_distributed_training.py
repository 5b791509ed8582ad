"""Two processes that share each batch, with the network whole or sharded, end where one process does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from structmat import plan_of
from structmat.evaluate import perplexity
from training import distributed_run, tiny

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder in which two processes trained, and what they say."""
    folder = tmp_path_factory.mktemp("distributed")
    student = tiny.structured(tiny.llama(seed=0))
    with torch.no_grad():
        student.model.layers[0].mlp.up_proj.left.mul_(4)  # so that there is something to balance
    student.save_pretrained(folder / "student")
    tiny.llama(seed=1).save_pretrained(folder / "teacher")
    tiny.learning_llama(seed=2).save_pretrained(folder / "learning")
    finished = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}",
            str(HERE / "distributed_run.py"), str(folder),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-6000:]
    return folder, json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def reference(runs: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same in one process: the network and its log."""
    folder, _ = runs
    model = tiny.transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
    args = tiny.arguments(
        tmp_path_factory.mktemp("one"), teacher=str(folder / "teacher"), per_device_train_batch_size=4,
        **distributed_run.OPTIONS,
    )  # fmt: skip
    run = tiny.trainer("causal-lm", args, model=model)
    run.train()
    return run.model, run.state.log_history[0]


def largest_difference(model: nn.Module, other: nn.Module) -> float:
    ours, theirs = model.state_dict(), other.state_dict()
    assert set(ours) == set(theirs)
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one(runs: tuple[Path, dict[str, Any]], reference: tuple[Any, Any], kind: str) -> None:
    folder, facts = runs
    model, log = reference
    loaded = tiny.transformers.AutoModelForCausalLM.from_pretrained(folder / kind)
    start = tiny.transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
    assert plan_of(loaded) == plan_of(model)
    assert largest_difference(model, start) > 1e-2
    assert largest_difference(loaded, model) < 1e-5
    for name in ("loss", "loss_task", "loss_logits", "loss_hidden"):
        assert facts[kind][name] == pytest.approx(log[name], rel=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.filterwarnings("ignore:the layers with a budget of 0.5 are at")  # so few steps do run into a cliff
def test_two_processes_learn_the_structure_that_one_does(
    runs: tuple[Path, dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    folder, facts = runs
    load = tiny.transformers.AutoModelForCausalLM.from_pretrained
    args = tiny.arguments(tmp_path, per_device_train_batch_size=4, **distributed_run.STRUCTURE)
    run = tiny.trainer("causal-lm", args, model=load(folder / "learning"))
    run.train()
    loaded = load(folder / f"learning-{kind}")
    assert largest_difference(loaded, load(folder / "learning")) > 1e-2
    assert largest_difference(loaded, run.model) < 1e-5
    for name in ("structure_share", "structure_dead", "structure_sigma"):
        assert facts[f"learning-{kind}"][name] == run.state.log_history[0][name]
    assert run.state.log_history[0]["structure_share"] <= 0.5


def test_retrain_shares_and_measures(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, facts = runs
    loaded = tiny.transformers.AutoModelForCausalLM.from_pretrained(folder / "again")
    found = perplexity(loaded, tiny.tokenizer(), tiny.sentences(12), length=32, truncate=True, progress=False)
    assert facts["again"]["eval_perplexity"] == pytest.approx(found.token, rel=1e-5)


def test_the_processes_really_shared(runs: tuple[Path, dict[str, Any]]) -> None:
    _, facts = runs
    assert (facts["processes"], facts["wrapper"], facts["teacher"]) == (
        2,
        "DistributedDataParallel",
        "LlamaForCausalLM",
    )
    assert facts["sharded"] == [True, True]
