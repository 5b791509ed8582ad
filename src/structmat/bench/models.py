"""What timing whole models gives, and the shapes of models that are timed with random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from structmat.bench.results import Comparison, Measured
from structmat.bench.timing import Timing

SHAPES: dict[str, dict[str, int]] = {
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "llama-tiny": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "vocab_size": 4096,
    },
}
"""The sizes of Llamas, by name."""


@dataclass(frozen=True)
class ModelTime(Comparison):
    """One model doing one thing, beside the reference that was timed in the same rounds.

    Attributes:
        model: The model's name.
        step: ``"prefill"``, ``"decode"`` (one token), ``"generate"`` or ``"training"``.
        tokens: The number of tokens that were read, written or learned from.
        seconds: The time that the model takes.
        reference_seconds: The time that the reference takes.
        extrapolated: Whether fewer tokens were generated and the time was scaled up.
    """

    ratios = ("speedup", "tokens_per_second")

    model: str
    step: str
    tokens: int
    seconds: Timing
    reference_seconds: Timing
    extrapolated: bool = False

    @property
    def speedup(self) -> float:
        """How many times faster the model is than the reference, by the medians."""
        return self.reference_seconds.median / self.seconds.median

    @property
    def tokens_per_second(self) -> float:
        """The number of tokens per second, by the median."""
        return self.tokens / self.seconds.median


@dataclass(frozen=True)
class ModelSize:
    """The memory that a model takes.

    Attributes:
        parameters: The number of parameters.
        bytes: The bytes of parameters and buffers.
        peak_bytes: The most memory in use while a prompt was read and a token generated, ``bytes`` included; None on a
            CPU.
    """

    parameters: int
    bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class GenerationBench(Measured):
    """What a benchmark of language models measured.

    Attributes:
        times: One entry for each model and each thing it does.
        sizes: The size of each model by name.
    """

    times: tuple[ModelTime, ...]
    sizes: Mapping[str, ModelSize]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-compatible data."""
        return {
            "hardware": dict(self.hardware),
            "settings": dict(self.settings),
            "sizes": {name: dataclasses.asdict(size) for name, size in self.sizes.items()},
            "models": [found.to_dict() for found in self.times],
        }
