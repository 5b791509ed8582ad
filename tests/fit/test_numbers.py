"""Weights and second moments at the edges of what numbers can be: honest errors, refusals, no fit worse than zero."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structmat import Blast, BlockDiagonal, BlockSparse, GaudiGblr, LowRank, Monarch
from structmat.fit import GradientFit, Lee2024Blast, Lee2024Gblr, Method, TruncatedSvd, default_method
from structmat.formats import Format, flat_butterfly

FORMATS: tuple[Format, ...] = (
    LowRank(24, 24, 4),
    Blast(24, 24, 3, rank=4),
    Monarch(24, 24, (3, 3), 2),
    BlockDiagonal(24, 24, 3),
    BlockSparse(24, 24, flat_butterfly((4, 4), stride=2), rank=2),
    GaudiGblr(24, 24, 24),
)
METHODS: list[tuple[Method, Format]] = [
    *((default_method(format), format) for format in FORMATS),
    (Lee2024Blast.published(sweeps=20), FORMATS[1]),
    (Lee2024Gblr.published(steps=20), FORMATS[5]),
    (Lee2024Gblr.published(steps=20, learning_rate=3.0), FORMATS[5]),
    (GradientFit(steps=3, learning_rate=20), FORMATS[0]),
]
IDS = [f"{type(method).__name__}-{k}" for k, (method, _) in enumerate(METHODS)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output_error(weight: Tensor, dense: Tensor, inputs: Tensor) -> float:
    """The plain definition on the inputs themselves, in float64."""
    x, W, W_hat = inputs.double(), weight.double(), dense.double()
    return float((x @ (W - W_hat).mT).norm() / (x @ W.mT).norm())


@pytest.mark.parametrize("larger", [1.0, 1e2, 1e4, 1e30])
@pytest.mark.parametrize("format", FORMATS[:4], ids=lambda format: type(format).__name__)
def test_the_error_of_the_output_is_that_of_the_data(format: Format, larger: float) -> None:
    """An input that is always zero may have any weight; it must not count in the error of the output."""
    x, weight = randn(100, 24, seed=1).double(), randn(24, 24)
    x[:, 0] = 0
    weight[:, 0] *= larger
    fit = default_method(format)(weight, format, second_moment=x.mT @ x / len(x))
    dense = format.to_dense({name: factor.double() for name, factor in fit.factors.items()})
    assert fit.output_error == pytest.approx(output_error(weight, dense, x), rel=1e-4)
    assert fit.output_error <= 1


@pytest.mark.parametrize(("method", "format"), METHODS, ids=IDS)
@pytest.mark.parametrize("aware", [False, True])
@settings(max_examples=6)
@given(seed=st.integers(0, 1000), power=st.sampled_from([-38, -20, 0, 18]), low=st.booleans())
def test_no_fit_is_worse_than_a_matrix_of_zeros(
    method: Method, format: Format, aware: bool, seed: int, power: int, low: bool
) -> None:
    weight = randn(24, 24, seed=seed) * 10.0**power
    if low:
        weight[:, 1:] *= 1e-3
    x = randn(40, 24, seed=seed + 1) * torch.logspace(0, -3, 24)
    fit = method(weight, format, second_moment=x.mT @ x if aware else None)
    error = fit.output_error if aware else fit.error
    assert error is not None
    assert 0 <= error <= 1 + 1e-6
    assert math.isfinite(fit.error)


@pytest.mark.parametrize("learning_rate", [1e-2, 3.0])
def test_the_published_start_of_gaudi_gblr_never_gets_worse(learning_rate: float) -> None:
    fit = Lee2024Gblr.published(steps=30, learning_rate=learning_rate)(randn(24, 24), FORMATS[5])
    assert fit.error <= fit.history[0] * (1 + 1e-5)


@pytest.mark.parametrize("entry", [1e-45, 1e-40, 1e-30, 1e30, 3e38])
def test_one_entry_of_any_size_is_fitted(entry: float) -> None:
    weight = torch.zeros(24, 24)
    weight[0, 0] = entry
    assert TruncatedSvd()(weight, FORMATS[0]).error < 1e-5


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 65504.0), (torch.float32, 3e38)])
def test_an_approximation_that_its_dtype_cannot_hold_is_refused(dtype: torch.dtype, largest: float) -> None:
    weight = (randn(24, 24).sign() * largest).to(dtype)
    with pytest.raises(FloatingPointError, match="overflow"):
        TruncatedSvd()(weight, FORMATS[0])
    assert TruncatedSvd()(weight / 8, FORMATS[0]).error < 1


@pytest.mark.parametrize(
    "matrix",
    [-torch.eye(24), torch.diag(torch.tensor([1.0] * 23 + [-0.01])), torch.ones(24, 24) - 2 * torch.eye(24)],
    ids=["negative", "one negative", "off the diagonal"],
)
def test_an_indefinite_second_moment_is_refused(matrix: Tensor) -> None:
    with pytest.raises(ValueError, match="no negative eigenvalue"):
        TruncatedSvd()(randn(24, 24), FORMATS[0], second_moment=matrix)


def test_a_second_moment_that_is_not_symmetric_is_refused() -> None:
    with pytest.raises(ValueError, match="symmetric"):
        TruncatedSvd()(randn(24, 24), FORMATS[0], second_moment=torch.eye(24) + 0.1 * randn(24, 24).triu(1))


@given(seed=st.integers(0, 1000), count=st.integers(1, 60), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_every_second_moment_of_data_is_accepted(seed: int, count: int, dtype: torch.dtype) -> None:
    x = (randn(count, 24, seed=seed) * torch.logspace(3, -3, 24)).to(dtype)
    fit = TruncatedSvd()(randn(24, 24), FORMATS[0], second_moment=x.mT @ x / count)
    assert fit.output_error is not None
    assert fit.output_error <= 1
