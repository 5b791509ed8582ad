"""Benchmarks that can be trusted: structured against dense in the same run, after a check that the results are right.

``bench_layers`` times single layers, ``time_side_by_side`` anything, and ``autotune_`` chooses how layers multiply.
"""

from structmat.bench.autotune import Choice, Tuning, autotune_
from structmat.bench.layers import bench_layers
from structmat.bench.machine import Peak, hardware, measure_peak
from structmat.bench.results import LayerBench, LayerTime
from structmat.bench.seconds import Seconds
from structmat.bench.timing import Timing, time_in_turn, time_side_by_side
from structmat.bench.verify import IncorrectResultError, check_format

__all__ = [
    "Choice",
    "IncorrectResultError",
    "LayerBench",
    "LayerTime",
    "Peak",
    "Seconds",
    "Timing",
    "Tuning",
    "autotune_",
    "bench_layers",
    "check_format",
    "hardware",
    "measure_peak",
    "time_in_turn",
    "time_side_by_side",
]
