"""Rounding with compensation: against the step-by-step definition, and against rounding each number for itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import structmat as sm
from structmat.fit.rounding import compensate_, round_factors
from structmat.formats import Dense, Quantized


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(N: int, seed: int = 0) -> torch.Tensor:
    """A second moment with few large directions."""
    return (randn(N, N, seed=seed) * torch.logspace(0, -1.5, N, dtype=torch.float64)).mm(randn(N, N, seed=seed).mT)


def step_by_step(values: torch.Tensor, form: torch.Tensor) -> torch.Tensor:
    """The definition: after each rounding, what is not rounded yet is where the loss of all errors is least."""
    wanted, found = values.clone(), values.clone()
    for k in range(values.shape[1]):
        found[:, k] = found[:, k].round()
        rest = slice(k + 1, None)
        if k + 1 < values.shape[1]:
            errors = found[:, : k + 1] - wanted[:, : k + 1]
            found[:, rest] = wanted[:, rest] - torch.linalg.solve(form[rest, rest], form[rest, : k + 1] @ errors.mT).mT
    return found


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
def test_columns_are_rounded_as_the_definition_says(K: int, n: int, together: int, seed: int) -> None:
    values, factor = 3 * randn(2, n, K, seed=seed), randn(2, K, 2 * K, seed=seed + 1)
    forms = factor @ factor.mT + 0.1 * torch.eye(K, dtype=torch.float64)
    rounded = values.clone()
    compensate_(rounded, forms, lambda k, column: column.round(), together)
    for b in range(2):
        assert torch.equal(rounded[b], step_by_step(values[b], forms[b]))


def fitted(format: sm.Format, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(sm.default_method(format)(weight.float(), format).factors)


def test_errors_of_the_matrix_are_less_than_of_rounding_alone() -> None:
    weight = correlated(96)
    for format in (sm.Blast(96, 96, blocks=8, rank=64), sm.LowRank(96, 96, rank=40)):
        factors = fitted(format, weight)
        matrix = format.to_dense(factors)
        for bits, group in ((8, 0), (4, 32)):
            quantized = Quantized(96, 96, format, bits, group)
            plain, made_up_for = (
                float((quantized.to_dense(one) - matrix).norm())
                for one in (quantized.rounded(factors), round_factors(quantized, factors))
            )
            assert made_up_for < 0.95 * plain, (format, bits)


@pytest.mark.parametrize(
    "format", [sm.Blast(64, 96, blocks=(4, 8), rank=32), sm.LowRank(64, 96, rank=24), Dense(64, 96)]
)
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 32), (4, 0)])
def test_a_second_moment_decides_what_counts(format: sm.Format, bits: int, group: int) -> None:
    weight, moment = randn(64, 96), correlated(96, seed=5)
    factors = {"weight": weight.float()} if isinstance(format, Dense) else fitted(format, weight)
    quantized, matrix = Quantized(64, 96, format, bits, group), format.to_dense(factors).double()

    def error(found: dict[str, torch.Tensor]) -> float:
        difference = quantized.to_dense(found).double() - matrix
        return float((difference @ moment * difference).sum())

    aware, plain = round_factors(quantized, factors, moment), round_factors(quantized, factors)
    assert error(aware) < 0.8 * error(plain)
    assert {name: one.shape for name, one in aware.items()} == {
        name: spec.shape for name, spec in quantized.factor_specs().items()
    }
    assert {name: one.dtype for name, one in aware.items()} == {name: one.dtype for name, one in plain.items()}


def test_other_structures_are_rounded_number_by_number() -> None:
    for format in (sm.Monarch(32, 32, blocks=4, rank=4), sm.BlockDiagonal(32, 32, blocks=4)):
        factors = format.init(generator=torch.Generator().manual_seed(0))
        quantized = Quantized(32, 32, format, 8)
        plain, found = quantized.rounded(factors), round_factors(quantized, factors, correlated(32))
        assert all(torch.equal(plain[name], one) for name, one in found.items())
