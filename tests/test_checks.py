"""Every refusal says what was expected, what came, and where there is one, the remedy."""

import re

import pytest
import torch
from torch import nn

from structmat import (
    Blast,
    BlockDiagonal,
    BlockSparse,
    Dense,
    LowRank,
    Monarch,
    StructuredConv2d,
    StructuredLinear,
    _checks,
)
from structmat.formats import flat_butterfly, format_from_json
from structmat.network.sites import DENSE_KINDS


def refuses(message: str, error: type[Exception] = ValueError):
    return pytest.raises(error, match=re.escape(message))


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", None, float("nan")])
def test_positive_int(value):
    with refuses(f"expected the width to be an integer of at least 1, got {value!r}"):
        _checks.positive_int(value, "the width")


@pytest.mark.parametrize("value", [-1, 2.0, False, "3", None])
def test_natural_int(value):
    with refuses(f"expected the width to be an integer of at least 0, got {value!r}"):
        _checks.natural_int(value, "the width")


@pytest.mark.parametrize("value", [0, -0.5, 1.01, True, "0.5", None, float("nan"), float("inf")])
def test_fraction(value):
    with refuses(f"expected keep to be in (0, 1], got {value!r}"):
        _checks.fraction(value, "keep")


def test_what_the_number_checks_let_through():
    assert _checks.positive_int(1, "") == 1
    assert _checks.natural_int(0, "") == 0
    assert _checks.fraction(1, "") == 1.0
    assert isinstance(_checks.fraction(1, ""), float)
    assert _checks.fraction(1e-9, "") == 1e-9


@pytest.mark.parametrize("blocks", [(2,), (2, 2, 2), "22", 2.0, None, {2, 3}])
def test_block_counts_that_are_no_pair(blocks):
    with refuses(f"expected blocks to be one count or a pair (rows, columns), got {blocks!r}"):
        _checks.block_counts(blocks, 12, 18)


def test_block_counts():
    assert _checks.block_counts(3, 12, 18) == (3, 3)
    assert _checks.block_counts([4, 9], 12, 18) == (4, 9)
    with refuses("expected the block count along the rows to be an integer of at least 1, got 0"):
        _checks.block_counts((0, 3), 12, 18)
    with refuses("expected the block count along the columns to be an integer of at least 1, got 1.5"):
        _checks.block_counts((3, 1.5), 12, 18)
    with refuses("expected a block count that divides the 12 rows, got 5; the divisors of 12 are 1, 2, 3, 4, 6, 12"):
        _checks.block_counts((5, 3), 12, 18)
    with refuses("expected a block count that divides the 18 columns, got 4; the divisors of 18 are 1, 2, 3, 6, 9, 18"):
        _checks.block_counts(4, 12, 18)


@pytest.mark.parametrize("n", [1, 2, 16, 97, 360])
def test_divisors(n: int):
    assert _checks.divisors(n) == [d for d in range(1, n + 1) if n % d == 0]


def test_matrix():
    _checks.matrix(torch.ones(2, 3), (2, 3), "the weight")
    _checks.matrix(torch.ones(2, 3, dtype=torch.bfloat16), (2, 3), "the weight")
    with refuses("expected the weight to be a floating-point tensor, got torch.int64", TypeError):
        _checks.matrix(torch.ones(2, 3, dtype=torch.int64), (2, 3), "the weight")
    with refuses("expected the weight to be a floating-point tensor, got list", TypeError):
        _checks.matrix([[1.0]], (1, 1), "the weight")
    with refuses("expected the weight of shape (3, 2), got (2, 3)"):
        _checks.matrix(torch.ones(2, 3), (3, 2), "the weight")
    weight = torch.tensor([[1.0, float("nan")], [float("-inf"), 0.0]])
    with refuses("expected the weight to be finite, got 2 NaN or infinite of 4 entries; repair or reload"):
        _checks.matrix(weight, (2, 2), "the weight")


def test_same_shapes_lists_every_complaint():
    expected = {"a": (1, 2), "b": (3,), "c": (4,)}
    _checks.same_shapes(dict(expected), expected, "the set")
    with refuses("the set does not fit: missing b (3,); unexpected d (5,); a: expected shape (1, 2), got (2, 1)"):
        _checks.same_shapes({"a": (2, 1), "c": (4,), "d": (5,)}, expected, "the set")


def test_one_of_lists_the_choices():
    _checks.one_of("b", iter("ab"), "the letter")
    with refuses("expected the letter to be one of 'a', 'b', got 'c'"):
        _checks.one_of("c", iter("ab"), "the letter")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dense(0, 4), "expected M (out features) to be an integer of at least 1, got 0"),
        (lambda: Dense(4, 2.5), "expected N (in features) to be an integer of at least 1, got 2.5"),
        (lambda: LowRank(4, 6, 0), "expected rank to be an integer of at least 1, got 0"),
        (lambda: LowRank(4, 6, 5), "expected a rank of at most min(M, N) = 4, got 5"),
        (lambda: BlockDiagonal(4, 6, 4), "expected a block count that divides the 6 columns, got 4"),
        (lambda: BlockDiagonal(4, 4, (2, 2)), "expected blocks to be an integer of at least 1, got (2, 2)"),
        (lambda: Monarch(8, 12, (2, 5), 1), "expected a block count that divides the 12 columns, got 5"),
        (lambda: Monarch(8, 12, 2, -1), "expected rank to be an integer of at least 1, got -1"),
        (lambda: Monarch(8, 12, (4, 2), 3), "expected a rank of at most min(P, Q) = 2, got 3"),
        (lambda: Blast(8, 12, 3, 1), "expected a block count that divides the 8 rows, got 3"),
        (lambda: Blast(8, 12, 2, 0), "expected rank to be an integer of at least 1, got 0"),
        (lambda: BlockSparse(4, 4, ("10", "01"), -1), "expected rank to be an integer of at least 0, got -1"),
        (lambda: BlockSparse(4, 4, ("10", "01"), 5), "expected a rank of at most min(M, N) = 4, got 5"),
        (lambda: BlockSparse(5, 4, ("10", "01")), "expected a block count that divides the 5 rows, got 2"),
        (lambda: BlockSparse.from_mask(4, 4, torch.ones(2)), "expected a two-dimensional block mask, got shape (2,)"),
        (lambda: BlockSparse.from_mask(4, 4, torch.zeros(2, 2)), "at least one '1'"),
        (
            lambda: BlockSparse.from_magnitude(torch.ones(4, 4), keep=0.2, blocks=2),
            "expected a keep of at least 1/4 for 2 x 2 blocks, got 0.2",
        ),
        (
            lambda: BlockSparse.from_magnitude(torch.ones(4, 4), keep=2, blocks=2),
            "expected keep to be in (0, 1], got 2",
        ),
        (lambda: flat_butterfly((4, 4), 3), "expected a stride of 0 or a power of two, got 3"),
        (lambda: flat_butterfly((4, 4), -1), "expected stride to be an integer of at least 0, got -1"),
    ],
)
def test_formats_refuse(make, message: str):
    with refuses(message):
        make()


@pytest.mark.parametrize(
    "mask", [(), "10", ("10", "1"), ("12", "01"), ("", ""), ("00", "00"), ((1, 0), (0, 1)), None], ids=str
)
def test_masks_that_are_none(mask):
    with refuses(
        "expected the mask as equally long strings of '0' and '1', at least one '1', one string for each block row, "
        f"got {mask!r}; BlockSparse.from_mask takes a tensor"
    ):
        BlockSparse(4, 4, mask)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LowRank.for_budget(10, 10, keep=0.1),
            "expected a keep of at least 0.2 for a 10 x 10 low_rank matrix with these options, got 0.1; raise keep",
        ),
        (
            lambda: Monarch.for_budget(8, 8, keep=0.4, blocks=2),
            "expected a keep of at least 0.5 for a 8 x 8 monarch matrix",
        ),
        (
            lambda: Blast.for_budget(8, 8, keep=0.25, blocks=2),
            "expected a keep of at least 0.3125 for a 8 x 8 blast matrix",
        ),
        (
            lambda: BlockSparse.for_budget(8, 8, keep=0.4, blocks=2),
            "expected a keep of at least 0.5 for a 8 x 8 block-sparse matrix with 2 x 2 blocks, got 0.4; raise keep",
        ),
        (
            lambda: BlockDiagonal.for_budget(8, 12, keep=0.2),
            "expected a keep of at least 0.25 for a 8 x 12 block-diagonal matrix "
            "(the common divisors of the shape are 1, 2, 4), got 0.2",
        ),
        (
            lambda: Dense.for_budget(8, 12, keep=0.5),
            "expected keep=1 and no options for a dense matrix, got keep=0.5, {}",
        ),
        (
            lambda: Dense.for_budget(8, 12, keep=1, blocks=2),
            "expected keep=1 and no options for a dense matrix, got keep=1, {'blocks': 2}",
        ),
        (lambda: LowRank.for_budget(8, 12, keep=50), "expected keep to be in (0, 1], got 50"),
    ],
)
def test_budgets_that_are_too_small(make, message: str):
    with refuses(message):
        make()


@pytest.mark.parametrize(
    ("format", "remedy"),
    [
        (LowRank(8, 8, 4), "the largest rank that saves parameters here is 3"),
        (Blast(4, 4, 4, 1), "no rank saves anything at this shape; use fewer blocks, or leave this layer dense"),
        (BlockDiagonal(8, 8, 1), "use a smaller member of the format, or leave this layer dense"),
    ],
    ids=str,
)
def test_check_saves(format, remedy: str):
    size = format.M * format.N
    with refuses(
        f"expected fewer parameters than the dense {format.M} x {format.N} = {size}, "
        f"got {format.num_parameters()} from {format}; {remedy}"
    ):
        format.check_saves()


def test_check_saves_spares_the_dense_matrix():
    Dense(8, 8).check_saves()
    BlockDiagonal(8, 8, 2).check_saves()


def test_check_saves_of_a_block_sparse_matrix_whose_blocks_alone_would_save():
    with pytest.raises(ValueError, match="the largest rank that saves parameters here is 0"):
        BlockSparse(4, 4, ("11", "10"), rank=1).check_saves()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"M": 4, "N": 4}, "expected the format's name to be one of 'dense', 'low_rank', "),
        ({"format": "butterfly", "M": 4, "N": 4}, "'merged', got 'butterfly'"),
        ({"format": "low_rank", "M": 4, "N": 4}, "the fields of a low_rank format do not fit: "),
        ({"format": "dense", "M": 4, "N": 4, "rank": 1}, "the fields of a dense format do not fit: "),
        ({"format": "low_rank", "M": 4, "N": 4, "rank": 9}, "expected a rank of at most min(M, N) = 4, got 9"),
    ],
)
def test_format_from_json(data: dict, message: str):
    with refuses(message):
        format_from_json(data)


def test_layers_refuse_what_is_no_format():
    with refuses("expected a structmat format, got 'blast'", TypeError):
        StructuredLinear("blast")


def test_layers_refuse_factors_that_do_not_fit():
    with refuses("the set of factors of LowRank(M=4, N=6, rank=2) does not fit: missing right (2, 6)"):
        StructuredLinear(LowRank(4, 6, 2), factors={"left": torch.ones(4, 2)})


@pytest.mark.parametrize("shape", [(5, 4), (12,), (2, 0)])
def test_linear_refuses_other_features(shape: tuple[int, ...]):
    with refuses(f"expected an input with 6 features, got shape {shape}"):
        StructuredLinear(Dense(4, 6))(torch.ones(shape))


@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (8, 8), (1, 2, 3, 8, 8), (8, 3, 8)])
def test_conv_refuses_other_images(shape: tuple[int, ...]):
    with refuses(f"expected an input (batch, 3, height, width) or without the batch, got shape {shape}"):
        StructuredConv2d(Dense(4, 27), (3, 3))(torch.ones(shape))


def test_conv_refuses_other_geometry():
    with refuses("expected N to be a multiple of the kernel's 9 positions, got 28"):
        StructuredConv2d(Dense(4, 28), (3, 3))
    with refuses("expected padding_mode to be one of 'zeros', 'reflect', 'replicate', 'circular', got 'mirror'"):
        StructuredConv2d(Dense(4, 27), (3, 3), padding_mode="mirror")
    with refuses("expected padding to be one of 'same', 'valid', got 'full'"):
        StructuredConv2d(Dense(4, 27), (3, 3), padding="full")


def test_the_convolution_kind_refuses_other_layers():
    with refuses("expected an nn.Conv1d or nn.Conv2d, got Linear", TypeError):
        DENSE_KINDS[nn.Conv2d].structured(nn.Linear(4, 4), Dense(4, 4), None, None)


def test_monarch_refuses_a_permutation_that_is_no_truth_value() -> None:
    with pytest.raises(ValueError, match="permute_output to be true or false, got 'false'"):
        Monarch(4, 4, (2, 2), 1, "false")  # pyright: ignore


@pytest.mark.parametrize("shape", [(4,), (2, 2, 2)])
def test_from_magnitude_refuses_what_is_no_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two-dimensional weight, got shape"):
        BlockSparse.from_magnitude(torch.ones(shape), keep=0.5, blocks=2)


def test_from_magnitude_refuses_nan() -> None:
    with pytest.raises(ValueError, match="the weight to be finite, got 1 NaN"):
        BlockSparse.from_magnitude(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), keep=0.5, blocks=2)


def test_flat_butterfly_refuses_a_count_of_zero() -> None:
    with pytest.raises(ValueError, match="a block count to be an integer of at least 1, got 0"):
        flat_butterfly((0, 4), 1)
