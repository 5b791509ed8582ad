"""The cost model of a compression by many processes."""

import dataclasses
import math

import pytest

from structmat.compress.processes import H100, KINDS, Job, Machine, Network, expected
from structmat.compress.spectra import spectrum_cost
from structmat.fit import Lee2024Blast
from structmat.formats import Blast

SEVEN = Network.llama(4096, 11008, 32, 4096, 32000)
SHAPES = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
JOB = Job(steps=100)


def test_parameters_are_those_of_the_models() -> None:
    assert SEVEN.parameters == pytest.approx(6.74e9, rel=1e-3)
    assert Network.llama(8192, 28672, 80, 1024, 32000).parameters == pytest.approx(69e9, rel=1e-2)
    mixture = Network.llama(4096, 14336, 32, 1024, 32000, experts=8, active=2)
    assert mixture.parameters == pytest.approx(46.7e9, rel=1e-2)  # Mixtral 8x7B
    assert mixture.block_active * mixture.blocks + mixture.outside == pytest.approx(12.9e9, rel=1e-2)


def test_work_is_counted_layer_by_layer() -> None:
    work = expected(SEVEN, dataclasses.replace(JOB, allocates=False), H100, 1).work
    formats = [Blast.for_budget(*shape, keep=0.5, blocks=16) for shape in SHAPES]
    assert work["fits"] == 32 * sum(Lee2024Blast().cost(format, aware=True) for format in formats)
    assert work["refinement"] == 32 * 3 * 100 * 8 * 512 * 0.5 * sum(M * N for M, N in SHAPES)
    assert work["gradients"] == work["spectra"] == 0
    shared = expected(SEVEN, JOB, H100, 1).work
    assert shared["spectra"] == pytest.approx(32 * sum(spectrum_cost(*shape) for shape in SHAPES))
    assert shared["fits"] > work["fits"]


def test_more_processes_take_less_time_up_to_what_comes_one_after_the_other() -> None:
    alone, pair, many = (expected(SEVEN, JOB, Machine(H100.seconds, math.inf, 0.0), n) for n in (1, 2, 64))
    for kind in ("gradients", "calls", "moments", "spectra", "refinement"):
        assert pair.seconds[kind] == pytest.approx(alone.seconds[kind] / 2)
    assert many.seconds["refinement"] == pytest.approx(alone.seconds["refinement"] / 8)  # of eight batches in a step
    assert many.seconds["calls"] == pytest.approx(alone.seconds["calls"] / 64)
    assert pair.seconds["solves"] == many.seconds["solves"] == alone.seconds["solves"]
    assert alone.seconds["fits"] / many.seconds["fits"] < 2.5
    assert alone.total > pair.total > many.total
    assert alone.moved == 0 < pair.moved < many.moved


def test_what_is_moved_and_held() -> None:
    slow = Machine(dict.fromkeys(KINDS, 0.0), 1e9, 0.0)
    found = expected(SEVEN, JOB, slow, 8)
    assert found.total == pytest.approx(found.moved / 1e9)
    assert found.memory[0] < expected(SEVEN, JOB, slow, 1).memory[0]
    assert found.memory[1] < expected(SEVEN, JOB, slow, 1).memory[1] / 3
