"""What a benchmark ran on, for its results."""

from __future__ import annotations

from structmat.bench import hardware

__all__ = ["hardware", "hardware_line"]


def hardware_line(facts: dict[str, str]) -> str:
    """The same as one line of text."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())
