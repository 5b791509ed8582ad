"""Benchmarks that can be trusted: structured against dense in the same run, after a check that the results are right.

``bench_layers`` times single layers, ``bench_generation`` whole language models, ``time_side_by_side`` anything.
"""

from structmat.bench.generation import GenerationBench, ModelSize, ModelTime, bench_generation
from structmat.bench.layers import LayerBench, LayerTime, bench_layers
from structmat.bench.machine import Peak, hardware, measure_peak
from structmat.bench.shapes import random_llama
from structmat.bench.timing import Timing, time_in_turn, time_side_by_side
from structmat.bench.verify import IncorrectResultError, check_format

__all__ = [
    "GenerationBench",
    "IncorrectResultError",
    "LayerBench",
    "LayerTime",
    "ModelSize",
    "ModelTime",
    "Peak",
    "Timing",
    "bench_generation",
    "bench_layers",
    "check_format",
    "hardware",
    "measure_peak",
    "random_llama",
    "time_in_turn",
    "time_side_by_side",
]
