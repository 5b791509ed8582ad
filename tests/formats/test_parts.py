"""Equal parts of a matrix, such as several devices hold: each is the rows or columns of the dense matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structmat import Blast, BlockDiagonal, Dense, Format, LowRank, Monarch
from structmat.formats import Quantized

SHAPES = st.tuples(*[st.sampled_from([12, 24, 36])] * 2)
COUNTS = st.sampled_from([1, 2, 3, 4, 6])


@st.composite
def formats(draw: st.DrawFn) -> Format:
    M, N = draw(SHAPES)
    blocks = draw(st.tuples(*[st.sampled_from([1, 2, 3, 4])] * 2))
    rank = draw(st.integers(1, 9))
    kinds = [Dense(M, N), LowRank(M, N, rank), Blast(M, N, blocks, rank), Monarch(M, N, blocks, 1)]
    return draw(st.sampled_from(kinds))


def check_parts(format: Format, axis: int, count: int) -> list[Format]:
    factors = format.init(generator=torch.Generator().manual_seed(0))
    whole, x = format.to_dense(factors).chunk(count, axis), torch.randn(3, format.N)
    found = []
    for index in range(count):
        part, own = format.part(factors, axis, index, count)
        part.check_factors(own)
        torch.testing.assert_close(part.to_dense(own), whole[index])
        some = x.chunk(count, 1)[index] if axis else x
        own = {name: factor.contiguous() for name, factor in own.items()}
        torch.testing.assert_close(part.matmul(some, own), some @ whole[index].mT, rtol=1e-4, atol=1e-5)
        _, on_meta = format.part(format.init(device="meta"), axis, index, count)
        assert {n: (f.shape, f.dtype) for n, f in on_meta.items()} == {n: (f.shape, f.dtype) for n, f in own.items()}
        found.append(part)
    return found


@given(formats(), st.sampled_from([0, 1]), COUNTS)
def test_a_part_is_rows_or_columns(format: Format, axis: int, count: int) -> None:
    parts = check_parts(format, axis, count)
    assert isinstance(format, LowRank) or all(type(part) is type(format) for part in parts)


@given(formats(), st.sampled_from([0, 1]), COUNTS, st.sampled_from([(8, 0), (8, 5), (4, 0), (4, 4), (4, 32)]))
def test_a_part_of_integers_has_the_same_integers(base: Format, axis: int, count: int, kind: tuple[int, int]) -> None:
    format = Quantized(*base.shape, base, *kind)
    parts = check_parts(format, axis, count)
    if kind[0] == 8 and isinstance(base, Blast):
        assert all(isinstance(part, Quantized) for part in parts)


def test_a_low_rank_part_with_fewer_rows_than_its_rank_is_dense() -> None:
    assert check_parts(LowRank(12, 24, 8), 0, 2) == [Dense(6, 24)] * 2
    assert check_parts(LowRank(12, 24, 6), 0, 2) == [LowRank(6, 24, 6)] * 2


def test_what_cannot_be_cut() -> None:
    for format, axis, features in (
        (BlockDiagonal(12, 12, 2), 0, "out"),
        (BlockDiagonal(12, 12, 2), 1, "in"),
        (Monarch(12, 12, (2, 2), 2, permute_output=True), 0, "out"),
        (Monarch(12, 12, (4, 2), 2), 0, "out"),  # blocks of one row cannot have rank 2
    ):
        with pytest.raises(ValueError, match=f"expected a matrix that can be cut along its {features} features, got"):
            format.part(format.init(), axis, 0, 3)
    check_parts(Monarch(12, 12, (2, 2), 2, permute_output=True), 1, 3)
