"""What a benchmark ran on, for its results."""

from __future__ import annotations

from structmat.bench import hardware

__all__ = ["hardware", "hardware_line", "same_machine"]


def hardware_line(facts: dict[str, str]) -> str:
    """The same as one line of text."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def same_machine(one: dict[str, str], other: dict[str, str]) -> bool:
    """Whether two results come from one machine with the same versions, whatever the commits."""
    commits = {"commit", "dirty"}
    return {k: v for k, v in one.items() if k not in commits} == {k: v for k, v in other.items() if k not in commits}
