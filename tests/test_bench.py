"""Timing: how often, in which order, and the median."""

import time

import pytest

from structmat.bench import time_side_by_side


def test_candidates_take_turns_after_warming_up() -> None:
    calls: list[str] = []
    times = time_side_by_side({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert "".join(calls) == "aabb" + "ab" * 3
    assert list(times) == ["a", "b"]
    assert all(seconds >= 0 for seconds in times.values())


def test_the_time_is_the_median() -> None:
    pauses = iter([0, 0, 0.02, 0.02, 0.5])  # two to warm up; one round of three is disturbed
    times = time_side_by_side({"pause": lambda: time.sleep(next(pauses))}, rounds=3)
    assert 0.02 <= times["pause"] < 0.4


def test_the_slower_one_takes_longer() -> None:
    times = time_side_by_side({"slow": lambda: time.sleep(0.01), "fast": lambda: None}, rounds=3)
    assert times["slow"] >= 0.01 > times["fast"]


def test_there_must_be_a_round() -> None:
    with pytest.raises(ValueError, match="rounds to be an integer of at least 1, got 0"):
        time_side_by_side({"a": lambda: None}, rounds=0)
