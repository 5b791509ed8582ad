"""The numbers that describe a learned structure, against what is known of simple ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import structmat as sm
from structmat.inspect.learned import effective_rank, gini, map_similarity, structure_numbers


@given(values=st.lists(st.integers(0, 9), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_gini_is_half_the_mean_absolute_difference(values: list[int]) -> None:
    n, total = len(values), sum(values)
    differences = sum(abs(a - b) for a in values for b in values)
    expected = differences / (2 * n * total) if total else 0.0
    assert math.isclose(gini(torch.tensor(values).float()), expected, abs_tol=1e-9)


def test_effective_rank_counts_equal_directions() -> None:
    Q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    for rank in (1, 3, 8):
        assert effective_rank(Q[:, :rank] @ Q[:, :rank].T) == pytest.approx(rank)
    assert effective_rank(torch.zeros(3, 4)) == 0


def test_a_low_rank_matrix_is_spread_evenly_and_is_no_distance_from_low_rank() -> None:
    format = sm.LowRank(32, 32, 3)
    numbers = structure_numbers(*sm.formats.to_gblr(format, format.init()))
    assert numbers.concentration == pytest.approx(0, abs=1e-9)
    assert numbers.covered == 1
    assert numbers.distances["low-rank"] < 1e-5
    assert numbers.distances["block-sparse"] > 0.1
    assert numbers.keep == pytest.approx(format.keep)
    assert all(1 <= rank <= 3 + 1e-9 for row in numbers.effective_ranks for rank in row)


def test_a_block_diagonal_matrix_is_concentrated_and_is_no_distance_from_block_diagonal() -> None:
    format = sm.BlockDiagonal(32, 32, blocks=4)
    numbers = structure_numbers(*sm.formats.to_gblr(format, format.init()))
    assert numbers.concentration == pytest.approx(0.75)
    assert numbers.covered == pytest.approx(0.25)
    assert numbers.distances["block-diagonal"] < 1e-6
    assert numbers.distances["block-sparse"] < 1e-6
    assert numbers.distances["low-rank"] > 0.3
    ranks = torch.tensor(numbers.effective_ranks)
    assert (ranks.diagonal() > 2).all()
    assert (ranks - torch.diag(ranks.diagonal()) == 0).all()


def test_a_structure_without_so_small_a_member_is_left_out() -> None:
    format = sm.Gblr(32, 32, 1, (4, 4))
    assert set(structure_numbers(format, format.init()).distances) == {"block-sparse"}


def test_maps_are_alike_or_not() -> None:
    one = torch.zeros(4, 4)
    one[:2] = 1
    assert map_similarity(one, 3 * one) == pytest.approx(1)
    assert map_similarity(one, one.flip(0)) == 0
    assert map_similarity(one, torch.ones(4, 4)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"expected two maps of one shape, got \(4, 4\) and \(2, 4\)"):
        map_similarity(one, one[:2])
    with pytest.raises(ValueError, match="expected maps with at least one component"):
        map_similarity(one, 0 * one)


def test_the_report_has_them_where_they_are_asked_for() -> None:
    model = nn.Sequential(sm.StructuredLinear(sm.GaudiGblr(24, 24, 12, 0.4)), nn.ReLU(), nn.Linear(24, 24))
    assert not sm.report(model).structure
    found = sm.report(model, structure=True)
    assert set(found.structure) == {"0"}
    assert "0: 100.0% of the learned budget, keep 0." in str(found)
    assert found.to_dict()["structure"]["0"]["concentration"] == found.structure["0"].concentration
    counts = model[0].format.overlap(model[0].factors)
    assert found.structure["0"].covered == pytest.approx(float((counts > 0).float().mean()))


def test_other_formats_have_none() -> None:
    with pytest.raises(TypeError, match="expected a format with segments, such as Gblr or GaudiGblr, got LowRank"):
        structure_numbers(sm.LowRank(4, 4, 1), sm.LowRank(4, 4, 1).init())
