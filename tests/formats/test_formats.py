"""The definitions of methods.md, written again index by index, and what each format promises beyond the suite."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from conformance import CASES
from structmat import Blast, BlockDiagonal, BlockSparse, Dense, Format, Gblr, LowRank, Monarch
from structmat.formats import FORMATS, RankedFormat, flat_butterfly, register_format, to_blast


def cases_of(kind: type[Format]) -> pytest.MarkDecorator:
    chosen = {name: format for name, format in CASES.items() if type(format) is kind}
    return pytest.mark.parametrize("format", chosen.values(), ids=chosen.keys())


def check_definition(format: Format, factors: dict[str, Tensor], rows: list[list[float]]) -> None:
    W = torch.tensor(rows, dtype=torch.float64)
    assert W.shape == format.shape
    torch.testing.assert_close(format.to_dense(factors), W, rtol=1e-12, atol=1e-12)
    identity = torch.eye(format.N, dtype=torch.float64)
    torch.testing.assert_close(format.matmul(identity, factors), W.T, rtol=1e-12, atol=1e-12)


def drawn(format: Format) -> tuple[dict[str, Tensor], list[list[float]], dict[str, list[list[float]]]]:
    """Factors, a matrix of zeros, and the factors as lists."""
    factors = format.init(dtype=torch.float64)
    zeros = [[0.0] * format.N for _ in range(format.M)]
    return factors, zeros, {name: factor.tolist() for name, factor in factors.items()}


@cases_of(Dense)
def test_dense_by_definition(format: Dense):
    factors, _, lists = drawn(format)
    check_definition(format, factors, lists["weight"])


@cases_of(LowRank)
def test_low_rank_by_definition(format: LowRank):
    factors, W, lists = drawn(format)
    for m, n, r in product(range(format.M), range(format.N), range(format.rank)):
        W[m][n] += lists["left"][m][r] * lists["right"][r][n]
    check_definition(format, factors, W)


@cases_of(BlockDiagonal)
def test_block_diagonal_by_definition(format: BlockDiagonal):
    factors, W, lists = drawn(format)
    P, Q = format.M // format.blocks, format.N // format.blocks
    for i, p, q in product(range(format.blocks), range(P), range(Q)):
        W[i * P + p][i * Q + q] = lists["blocks"][i * P + p][q]
    check_definition(format, factors, W)


@cases_of(Monarch)
def test_monarch_by_definition(format: Monarch):
    factors, W, lists = drawn(format)
    (I, J), t = format.blocks, format.rank
    P, Q = format.M // I, format.N // J
    for i, p, j, q, k in product(range(I), range(P), range(J), range(Q), range(t)):
        row = p * I + i if format.permute_output else i * P + p
        W[row][j * Q + q] += lists["left"][i * P + p][j * t + k] * lists["right"][(j * I + i) * t + k][q]
    check_definition(format, factors, W)


@cases_of(BlockSparse)
def test_block_sparse_by_definition(format: BlockSparse):
    factors, W, lists = drawn(format)
    I, J = len(format.mask), len(format.mask[0])
    P, Q = format.M // I, format.N // J
    n = 0
    for i, j in product(range(I), range(J)):
        if format.mask[i][j] == "1":
            for p, q in product(range(P), range(Q)):
                W[i * P + p][j * Q + q] = lists["blocks"][n * P + p][q]
            n += 1
    for row, column, r in product(range(format.M), range(format.N), range(format.rank)):
        W[row][column] += lists["left"][row][r] * lists["right"][r][column]
    check_definition(format, factors, W)


@cases_of(Blast)
def test_blast_by_definition(format: Blast):
    factors, W, lists = drawn(format)
    (I, J), R = format.blocks, format.rank
    P, Q = format.M // I, format.N // J
    for i, p, j, q, r in product(range(I), range(P), range(J), range(Q), range(R)):
        coupling = lists["diag"][i * J + j][r]
        W[i * P + p][j * Q + q] += lists["left"][i * P + p][r] * coupling * lists["right"][j * R + r][q]
    check_definition(format, factors, W)


@pytest.mark.parametrize(
    ("format", "parameters"),
    [
        (Dense(12, 10), 120),
        (LowRank(10, 14, rank=3), 3 * 24),
        (BlockDiagonal(8, 20, blocks=4), 40),
        (Monarch(15, 21, blocks=(5, 3), rank=2), 2 * (3 * 15 + 5 * 21)),
        (BlockSparse(15, 21, ("110", "001", "111", "010", "101"), rank=2), 9 * 3 * 7 + 2 * 36),
        (Blast(15, 21, blocks=(5, 3), rank=6), 6 * (15 + 21 + 15)),
    ],
    ids=str,
)
def test_sizes_are_those_of_the_table(format: Format, parameters: int):
    assert format.num_parameters() == format.multiplications() == parameters


BUTTERFLIES = {
    0: ("10000000", "01000000", "00100000", "00010000", "00001000", "00000100", "00000010", "00000001"),
    1: ("11000000", "11000000", "00110000", "00110000", "00001100", "00001100", "00000011", "00000011"),
    2: ("11100000", "11010000", "10110000", "01110000", "00001110", "00001101", "00001011", "00000111"),
    4: ("11101000", "11010100", "10110010", "01110001", "10001110", "01001101", "00101011", "00010111"),
}
STRETCHED = {  # two rows of the square pattern fall into one
    0: ("11000000", "00110000", "00001100", "00000011"),
    1: ("11000000", "00110000", "00001100", "00000011"),
    2: ("11110000", "11110000", "00001111", "00001111"),
    4: ("11111100", "11110011", "11001111", "00111111"),
}


@pytest.mark.parametrize("stride", [0, 1, 2, 4])
def test_flat_butterfly(stride: int):
    assert flat_butterfly((8, 8), stride) == BUTTERFLIES[stride]
    assert flat_butterfly((4, 8), stride) == STRETCHED[stride]
    assert flat_butterfly((8, 4), stride) == tuple("".join(column) for column in zip(*STRETCHED[stride], strict=True))


def test_flat_butterfly_of_counts_that_do_not_divide_each_other():
    """Of 3 rows over 2 columns, the middle row lies under both."""
    assert flat_butterfly((3, 2), 0) == ("10", "11", "01")
    assert flat_butterfly((2, 3), 0) == ("110", "011")


@st.composite
def requests(draw: st.DrawFn) -> tuple[int, int, tuple[int, int], float]:
    """``M``, ``N``, block counts that divide them, and a keep."""
    (I, P), (J, Q) = (draw(st.tuples(st.integers(1, 5), st.integers(1, 40))) for _ in range(2))
    return I * P, J * Q, (I, J), draw(st.integers(10, 1000)) / 1000


ROUNDING = 1 + 1e-12
"""A keep is a float: a share like 1/49 has none of its own."""


def check_largest(format: RankedFormat, keep: float, least: int) -> None:
    """The rank is the largest within the budget, or the multiple of 8 below it where that loses under 2 %."""
    budget = keep * format.M * format.N * ROUNDING
    assert format.num_parameters() <= budget
    ranks = range(least, format.max_rank + 1)
    largest = max(rank for rank in ranks if replace(format, rank=rank).num_parameters() <= budget)
    multiple = largest - largest % 8
    assert format.rank == (multiple if largest - multiple < 0.02 * largest else largest)


def check_remedy(error: ValueError, for_budget: Callable[[float], Format]) -> None:
    """The keep that the message asks for is enough, where any share of the dense matrix is."""
    enough = float(re.search(r"at least ([\d.e+-]+)", str(error)).group(1))
    if enough <= 1:
        for_budget(enough)


RANKED = {
    "low-rank": lambda M, N, blocks: (LowRank(M, N, 1), {}),
    "monarch": lambda M, N, blocks: (Monarch(M, N, blocks, 1), {"blocks": blocks}),
    "permuted": lambda M, N, blocks: (Monarch(M, N, blocks, 1, True), {"blocks": blocks, "permute_output": True}),
    "blast": lambda M, N, blocks: (Blast(M, N, blocks, 1), {"blocks": blocks}),
}


@pytest.mark.parametrize("smallest_and_options", RANKED.values(), ids=RANKED.keys())
@given(request=requests())
def test_for_budget_takes_the_largest_rank(smallest_and_options, request):
    M, N, blocks, keep = request
    smallest, options = smallest_and_options(M, N, blocks)
    if smallest.num_parameters() > keep * M * N * ROUNDING:
        with pytest.raises(ValueError, match=f"a keep of at least .* {M} x {N} {smallest.name} matrix") as info:
            type(smallest).for_budget(M, N, keep=keep, **options)
        check_remedy(info.value, lambda enough: type(smallest).for_budget(M, N, keep=enough, **options))
        return
    format = type(smallest).for_budget(M, N, keep=keep, **options)
    assert format == replace(smallest, rank=format.rank)
    check_largest(format, keep, least=1)


@pytest.mark.parametrize(
    ("keep", "rank"), [(0.07, 7), (0.08, 8), (0.09, 9), (0.49, 49), (0.5, 50), (0.57, 56), (0.81, 80), (1, 100)]
)
def test_for_budget_rounds_to_a_multiple_of_8_where_that_loses_under_2_percent(keep: float, rank: int):
    assert LowRank.for_budget(200, 200, keep=keep).rank == rank


@pytest.mark.parametrize(
    ("format", "rank"),
    [
        (LowRank(10, 14, rank=1), 10),
        (Monarch(15, 21, blocks=(5, 3), rank=1), 3),
        (Blast(15, 21, blocks=(5, 3), rank=1), 5 * 3),
        (Blast(16, 8, blocks=(2, 4), rank=1), 4 * 2),
        (BlockSparse(15, 21, ("110", "001", "111", "010", "101")), 15),
    ],
    ids=str,
)
def test_max_rank(format: RankedFormat, rank: int):
    assert format.max_rank == rank


@given(request=requests())
def test_for_budget_block_sparse_takes_the_largest_stride_and_rank(request):
    M, N, blocks, keep = request
    strides = (0, 1, 2, 4)  # at most 5 blocks along an axis
    members = [BlockSparse(M, N, flat_butterfly(blocks, stride)) for stride in strides]
    fitting = [member for member in members if member.num_parameters() <= keep * M * N * ROUNDING]
    if not fitting:
        with pytest.raises(ValueError, match=f"expected a keep of at least .* {M} x {N} block-sparse matrix") as info:
            BlockSparse.for_budget(M, N, keep=keep, blocks=blocks)
        check_remedy(info.value, lambda enough: BlockSparse.for_budget(M, N, keep=enough, blocks=blocks))
        return
    assert BlockSparse.for_budget(M, N, keep=keep, blocks=blocks, rank=0) == fitting[-1]
    format = BlockSparse.for_budget(M, N, keep=keep, blocks=blocks)
    assert format.mask == fitting[-1].mask
    check_largest(format, keep, least=0)


def test_for_budget_block_sparse_leaves_room_for_the_rank_asked_for():
    format = BlockSparse.for_budget(64, 64, keep=0.5, blocks=8, rank=8)
    assert format == BlockSparse(64, 64, flat_butterfly((8, 8), 1), rank=8)
    assert BlockSparse.for_budget(64, 64, keep=0.5, blocks=8, rank=0).mask == flat_butterfly((8, 8), 4)


@given(request=requests())
def test_for_budget_block_diagonal_takes_the_fewest_blocks(request):
    M, N, _, keep = request
    fitting = [
        I for I in range(1, M + 1) if M % I == 0 and N % I == 0 and BlockDiagonal(M, N, I).keep <= keep * ROUNDING
    ]
    if fitting:
        assert BlockDiagonal.for_budget(M, N, keep=keep) == BlockDiagonal(M, N, fitting[0])
    else:
        with pytest.raises(ValueError, match=f"expected a keep of at least .* {M} x {N} block-diagonal matrix") as info:
            BlockDiagonal.for_budget(M, N, keep=keep)
        check_remedy(info.value, lambda enough: BlockDiagonal.for_budget(M, N, keep=enough))


def test_for_budget_dense_takes_the_whole_budget_only():
    assert Dense.for_budget(6, 4, keep=1) == Dense(6, 4)


@pytest.mark.parametrize("count", [1, 48, 49, 98, 103])
def test_a_share_is_enough_for_the_format_that_has_it(count: int):
    """The share 1/49 times 49 x 49 is a little less than 49 in floats."""
    format = BlockDiagonal(count, count, blocks=count)
    assert BlockDiagonal.for_budget(count, count, keep=format.keep) == format


@given(request=requests(), rank=st.integers(1, 7))
def test_a_share_is_enough_for_the_rank_that_has_it(request, rank: int):
    M, N, blocks, _ = request
    format = Blast(M, N, blocks, rank)
    assume(format.keep <= 1 and rank <= format.max_rank)
    assert Blast.for_budget(M, N, keep=format.keep, blocks=blocks) == format


@pytest.mark.parametrize(
    ("make", "rank"),
    [
        (lambda rank: LowRank(40, 60, rank), 23),
        (lambda rank: Monarch(40, 60, (2, 4), rank), 8),
        (lambda rank: Blast(40, 60, (2, 4), rank), 22),
        (lambda rank: BlockSparse(40, 60, flat_butterfly((4, 4), 0), rank), 17),
    ],
    ids=["low-rank", "monarch", "blast", "block-sparse"],
)
def test_check_saves_names_the_break_even_rank(make, rank: int):
    make(rank).check_saves()
    with pytest.raises(ValueError, match=rf"got \d+ from .*; the largest rank that saves parameters here is {rank}$"):
        make(rank + 1).check_saves()


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.5, 0.0]]),
        torch.tensor([[True, False, True], [False, True, False]]),
        [[1, 0, 1], [0, 1, 0]],
    ],
    ids=["floats", "booleans", "lists"],
)
def test_from_mask(mask):
    assert BlockSparse.from_mask(8, 9, mask, rank=2) == BlockSparse(8, 9, ("101", "010"), rank=2)


@pytest.mark.parametrize(("keep", "count"), [(0.2, 1), (0.5, 3), (0.99, 5), (1, 6)])
def test_from_magnitude_is_the_best_mask(keep: float, count: int):
    W = torch.randn(4, 9, dtype=torch.float64)
    W[:2, :3] *= 0.01

    def error(on) -> float:
        rest = W.clone()
        for i, j in on:
            rest[2 * i : 2 * i + 2, 3 * j : 3 * j + 3] = 0
        return rest.norm().item()

    best = min(error(on) for on in combinations(product(range(2), range(3)), count))
    format = BlockSparse.from_magnitude(W, keep=keep, blocks=(2, 3))
    assert len(format.positions) == count
    assert error(format.positions) == best


def test_from_magnitude_takes_transposed_weights():
    W = torch.zeros(9, 4).T
    W[2:, 3:6] = 1
    assert BlockSparse.from_magnitude(W, keep=1 / 6, blocks=(2, 3)).mask == ("000", "010")


@pytest.mark.parametrize("count", [1, 48, 49, 98, 103])
def test_from_magnitude_keeps_the_share_of_a_count(count: int):
    format = BlockSparse.from_magnitude(torch.ones(1, count), keep=1 / count, blocks=(1, count))
    assert len(format.positions) == 1


def check_conversion(format: Format) -> Blast:
    factors = format.init(dtype=torch.float64)
    target, blast_factors = to_blast(format, factors)
    target.check_factors(blast_factors)
    W = format.to_dense(factors)
    torch.testing.assert_close(target.to_dense(blast_factors), W, rtol=1e-12, atol=1e-12)
    x = torch.randn(7, format.N, dtype=torch.float64)
    torch.testing.assert_close(target.matmul(x, blast_factors), x @ W.T, rtol=1e-12, atol=1e-12)
    return target


@cases_of(LowRank)
def test_low_rank_is_blast_with_one_block(format: LowRank):
    assert check_conversion(format) == Blast(format.M, format.N, (1, 1), format.rank)


@cases_of(BlockDiagonal)
def test_block_diagonal_is_blast_of_a_blocks_rank(format: BlockDiagonal):
    I = format.blocks
    assert check_conversion(format) == Blast(format.M, format.N, (I, I), min(format.M // I, format.N // I))


@pytest.mark.parametrize(
    "format",
    [
        Monarch(12, 12, blocks=3, rank=2),
        Monarch(15, 21, blocks=(5, 3), rank=2),
        Monarch(15, 21, blocks=(3, 7), rank=3),
        Monarch(7, 5, blocks=1, rank=1),
    ],
    ids=["I == J", "I > J", "I < J", "one block"],
)
def test_monarch_is_blast_with_a_latin_square(format: Monarch):
    rank = format.rank * max(format.blocks)
    assert check_conversion(format) == Blast(format.M, format.N, format.blocks, rank)


@cases_of(Blast)
def test_blast_stays_as_it_is(format: Blast):
    assert check_conversion(format) == format


@pytest.mark.parametrize(
    "format", [Monarch(12, 12, 3, 2, permute_output=True), Dense(4, 4), BlockSparse(4, 4, ("10", "01"))], ids=str
)
def test_other_formats_are_not_blast(format: Format):
    with pytest.raises(ValueError, match="expected a LowRank, BlockDiagonal, Blast or unpermuted Monarch format"):
        to_blast(format, format.init())


def test_to_blast_checks_the_factors():
    with pytest.raises(ValueError, match="missing left"):
        to_blast(LowRank(4, 4, 1), {})


def test_facts_follow_from_what_a_format_defines():
    assert {kind.name for kind in FORMATS.values() if kind.has_overlap} == {"gblr", "gaudi_gblr"}
    assert {kind.name for kind in FORMATS.values() if kind.has_couplings} == {"blast"}
    assert {kind.name for kind in FORMATS.values() if kind.has_inference_layout} == {"gblr"}
    assert {kind.name for kind in FORMATS.values() if kind.learns} == {"gaudi_gblr"}
    assert {kind.name for kind in FORMATS.values() if not kind.replaces} == {"dense"}
    for kind in FORMATS.values():
        assert bool(kind.drawn_by) == (kind.has_overlap or kind.has_couplings)
        assert kind.label


def test_what_a_format_does_not_have_is_refused():
    format = LowRank(4, 4, 1)
    with pytest.raises(TypeError, match="expected a format with segments, such as Gblr or GaudiGblr, got LowRank"):
        format.overlap(format.init())
    with pytest.raises(TypeError, match="expected a format with couplings, such as Blast, got LowRank"):
        format.couplings(format.init())
    with pytest.raises(TypeError, match="expected a format that learns its structure, such as GaudiGblr, got LowRank"):
        format.hardened(format.init())
    assert format.for_inference(format.init()) is None
    empty = Gblr(4, 4, 0, (0, 0))
    assert empty.for_inference(empty.init()) is None


@pytest.mark.parametrize(
    ("format", "text"),
    [
        (Dense(4, 4), ""),
        (BlockDiagonal(8, 8, 4), "blocks 4"),
        (Monarch(8, 8, (2, 4), 1), "2 x 4 blocks, rank 1"),
        (Monarch(8, 8, (2, 4), 1, permute_output=True), "2 x 4 blocks, rank 1, permute_output"),
        (BlockSparse(8, 8, ("10", "11"), 3), "3 of 2 x 2 blocks, rank 3"),
        (Gblr(8, 8, 4, (9, 10)), "components 4, entries [9, 10]"),
    ],
    ids=str,
)
def test_settings_are_short_text(format: Format, text: str):
    assert format.settings() == text


def test_only_formats_with_their_facts_and_a_name_of_their_own_are_registered(monkeypatch: pytest.MonkeyPatch):
    class Nameless(LowRank):
        pass

    class Anonymous(Format):
        def factor_specs(self):
            return {}

        def to_dense(self, factors):
            return torch.zeros(self.shape)

    with pytest.raises(TypeError, match="expected a subclass of Format, got 3"):
        register_format(3)  # pyright: ignore
    with pytest.raises(ValueError, match="expected Anonymous to state name and scale_exponents as class attributes"):
        register_format(Anonymous)
    with pytest.raises(ValueError, match="expected a name that no other format has, but 'low_rank' is LowRank"):
        register_format(Nameless)
    assert register_format(LowRank) is LowRank
