"""Processes that work together: who does what, sums in one order, and real processes under ``torchrun``."""

import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sharing
from processes import TESTS, environment
from structmat import LowRank
from structmat._ranks import SHARES, Ranks, Sums, current, group, launched, together
from structmat._ranks.group import deal, share_of

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_each_share_is_that_of_one_batch_in_each_round() -> None:
    assert sorted(map(share_of, range(SHARES))) == list(range(SHARES))
    assert share_of(SHARES + 3) == share_of(3)


@given(st.integers(1, SHARES), st.integers(0, 200))
def test_every_batch_has_one_owner(size: int, count: int) -> None:
    own = [Ranks(rank, size).mine(count) for rank in range(size)]
    assert sorted(number for one in own for number in one) == list(range(count))
    assert all([*map(share_of, one)] == sorted(map(share_of, one)) for one in own)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_batches_in_a_row_are_shared_evenly(size: int) -> None:
    for start in range(0, 64, 8):
        owners = [Ranks(0, size).owner(number) for number in range(start, start + 8)]
        assert sorted(owners) == sorted([*range(size)] * (8 // size))


@given(st.lists(st.floats(0, 1e6), max_size=30), st.integers(1, 8))
def test_work_is_handed_out_by_cost(costs: list[float], size: int) -> None:
    loads = [0.0] * size
    for cost, owner in zip(costs, deal(costs, size), strict=True):
        loads[owner] += cost
    assert max(loads) <= sum(costs) / size + max(costs, default=0.0) + 1e-6


def whole(count: int) -> Any:
    """The definition of the order: shares of batches one by one, then four sums at a time."""
    level: list[torch.Tensor | None] = [None] * SHARES
    for number in range(count):
        share, x = share_of(number), sharing.values(number)["x"]
        level[share] = x if (before := level[share]) is None else before + x
    while len(level) > 1:
        sums: list[torch.Tensor | None] = []
        for k in range(0, len(level), 4):
            total = None
            for one in level[k : k + 4]:
                total = one if total is None else total if one is None else total + one
            sums.append(total)
        level = sums
    return level[0]


@given(st.integers(1, SHARES), st.integers(1, 150))
def test_sums_do_not_depend_on_the_number_of_processes(size: int, count: int) -> None:
    """The sums of all processes, put one behind the other, become one in which everything is added in one order."""
    nodes = []
    try:
        for rank in range(size):
            group._joined = Ranks(rank, size)
            sums = Sums()
            for number in current().mine(count):
                sums.add(number, sharing.values(number))
            sums.complete()
            nodes += sums.nodes
    finally:
        group._joined = Ranks()
    sums = Sums()
    for node in nodes:
        sums.push(node)
    assert len(sums.nodes) == 1
    assert torch.equal(sums.nodes[0].values["x"], whole(count))
    assert sums.nodes[0].values["count"] == sum(range(count))


def test_few_sums_are_in_memory() -> None:
    sums, most = Sums(), 0
    for number in current().mine(4 * SHARES):
        sums.add(number, {"x": torch.zeros(3)})
        most = max(most, sum(1 for _ in sums.values))
    assert most == 1 + math.log(SHARES, 4)


def test_what_launchers_say() -> None:
    assert launched({}) is None
    torchrun = launched({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert (torchrun.rank, torchrun.size, torchrun.local) == (3, 4, 1)  # pyright: ignore[reportOptionalMemberAccess]
    srun = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
    found = launched({**srun, "MASTER_ADDR": "a", "MASTER_PORT": "1"})
    assert (found.rank, found.size, found.local) == (5, 8, 1)  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(
        ValueError, match="expected MASTER_ADDR and MASTER_PORT, by which the processes find each other"
    ):
        launched(srun)
    with pytest.raises(ValueError, match="expected at most 64 processes, among which the data is shared, got 65"):
        launched({**srun, "SLURM_STEP_NUM_TASKS": "65"})


def test_a_process_that_nobody_started_is_alone() -> None:
    with together() as ranks:
        assert ranks == current() == Ranks(0, 1)
        assert ranks.of(0, lambda: "found") == "found"
        assert list(ranks.dealt([1.0, 2.0], lambda k: k)) == [0, 1]


def test_there_is_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # this machine may have none
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(ValueError, match="expected a GPU for each process, got 2 for process 2 of this machine"),
        together(),
    ):
        raise AssertionError("this is not reached")
    assert current() == Ranks()


def run_together(folder: Path, size: int, *words: str) -> dict[str, Any]:
    """What processes find that share a network and a store."""
    finished = subprocess.run(
        [*TORCHRUN, f"--nproc-per-node={size}", f"--master-port={free_port()}", *words,
         str(TESTS / "sharing.py"), str(folder)],
        env={**environment(), "PYTHONPATH": os.environ["PYTHONPATH"]},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-6000:]
    return torch.load(folder / "found.pt", weights_only=False)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape, found.device) == (expected.dtype, expected.shape, expected.device)
        assert expected.is_meta or torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert_same(found[name], value)
    elif isinstance(expected, (tuple, list)):
        for one, value in zip(found, expected, strict=True):
            assert_same(one, value)
    else:
        assert found == expected


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_processes_find_what_one_does(size: int, tmp_path: Path) -> None:
    found = run_together(tmp_path, size)
    assert found["size"] == size
    assert found["ranks"] == list(range(size))
    assert_same(found["of"], sharing.sent())
    assert found["of"]["twice"][0] is found["of"]["twice"][1]
    assert found["of"]["format"] == LowRank(6, 4, 2)
    assert found["any"] == [False, True]
    assert list(found["merged"]) == list(range(6))
    assert [k for k, _ in found["dealt"]] == [0, 1, 2, 3]
    assert dict(found["dealt"])[1] != dict(found["dealt"])[2]
    told = ["ValueError: expected nothing"]
    others = [f"AbandonedError: process {size - 1} has ended with an error, which it tells"] * (size - 1)
    assert found["failures"] == [others + told, others + told]
    assert found["agree"]
    assert re.match(rf"ConnectionError: expected all {size} processes to work until the end, but one", found["left"])
    assert_same(found["sums"], sharing.summed(Ranks()))
    assert_same(found["compressed"], sharing.compressed())
    assert_same(sharing.compressed(tmp_path / "fits"), found["compressed"])  # what they kept serves one process
