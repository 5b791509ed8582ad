"""What benchmarks measure: the times of single layers, and what all results have in common."""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from structmat.bench.machine import Peak, hardware
from structmat.bench.timing import Timing


@dataclass(frozen=True)
class Comparison:
    """Something that was timed beside a reference.

    Attributes:
        ratios: The names of the properties that ``to_dict`` adds to the fields.
    """

    ratios: ClassVar[tuple[str, ...]] = ()

    def to_dict(self) -> dict[str, Any]:
        """All fields and ratios as JSON-compatible data."""
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in self.ratios}}


@dataclass(frozen=True)
class Measured(abc.ABC):
    """The result of a benchmark.

    Attributes:
        hardware: The machine, and the commit of the library.
        settings: The device, the mode, the number of rounds, and what else was chosen.
    """

    hardware: Mapping[str, str] = field(default_factory=hardware, kw_only=True)
    settings: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-compatible data."""

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps(self.to_dict(), indent=1)


@dataclass(frozen=True)
class LayerTime(Comparison):
    """One layer in one setting, beside the dense layer that was timed in the same rounds.

    Attributes:
        format: The label of the format.
        settings: The format, as text.
        algorithm: ``"automatic"``, or the algorithm that was chosen for this machine.
        shape: The shape of the matrix, ``(M, N)``.
        tokens: The number of input vectors of a call.
        dtype: The dtype of weights and input.
        step: ``"forward"``, ``"backward"`` or ``"training"``.
        copies: The number of layers with weights of their own that were called one after the other in a timed run.
        seconds: The time of one layer.
        dense_seconds: The time of one dense layer.
        flop_limit: The seconds that the operations take at the measured peak.
        byte_limit: The seconds that reading the weights and input and writing the output take at the measured peak.
        dense_flop_limit: The seconds that the operations of the dense layer take at the measured peak.
        dense_byte_limit: The seconds that reading and writing take for the dense layer at the measured peak.
    """

    ratios = ("speedup", "flop_share", "byte_share", "limit_share", "dense_limit_share")

    format: str
    settings: str
    algorithm: str
    shape: tuple[int, int]
    tokens: int
    dtype: str
    step: str
    copies: int
    seconds: Timing
    dense_seconds: Timing
    flop_limit: float
    byte_limit: float
    dense_flop_limit: float
    dense_byte_limit: float

    @property
    def speedup(self) -> float:
        """How many times faster than the dense layer it is, by the medians."""
        return self.dense_seconds.median / self.seconds.median

    @property
    def flop_share(self) -> float:
        """The share of the measured peak of operations that is reached."""
        return self.flop_limit / self.seconds.median

    @property
    def byte_share(self) -> float:
        """The share of the measured peak of reading that is reached."""
        return self.byte_limit / self.seconds.median

    @property
    def limit_share(self) -> float:
        """The share of the roofline that is reached: the larger of the two limits over the time."""
        return max(self.flop_share, self.byte_share)

    @property
    def dense_limit_share(self) -> float:
        """The share of the roofline that the dense layer reaches."""
        return max(self.dense_flop_limit, self.dense_byte_limit) / self.dense_seconds.median


@dataclass(frozen=True)
class LayerBench(Measured):
    """What ``bench_layers`` measured.

    Attributes:
        times: One entry for each setting.
        peaks: What was possible in each dtype in the same run.
    """

    times: tuple[LayerTime, ...]
    peaks: Mapping[str, Peak]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-compatible data."""
        return {
            "hardware": dict(self.hardware),
            "settings": dict(self.settings),
            "peaks": {name: dataclasses.asdict(peak) for name, peak in self.peaks.items()},
            "layers": [found.to_dict() for found in self.times],
        }
