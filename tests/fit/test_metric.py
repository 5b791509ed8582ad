"""The metric of activation-aware fits: against dense linear algebra, and on moments that are hard."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from structmat.fit.linalg import conjugate_gradients
from structmat.fit.metric import (
    FLOOR,
    SHRINKAGE,
    diagonal_blocks,
    prepared,
    quiet,
    roots,
    times_blocks,
    whitened_metric,
)

N = 12


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(tokens: int = 50, seed: int = 0) -> Tensor:
    """The second moment ``(N, N)`` of correlated random inputs."""
    x = randn(tokens, N, seed=seed) @ randn(N, N, seed=seed + 100)
    return x.mT @ x / tokens


def enormous() -> Tensor:
    """One channel a million times as large as the others."""
    gram = moment()
    gram[3] *= 1e6
    gram[:, 3] *= 1e6
    return gram


def with_dead_inputs() -> Tensor:
    gram = moment()
    gram[[2, 7]] = 0
    gram[:, [2, 7]] = 0
    return gram


HARD = {
    "full": moment(),
    "singular": moment(tokens=3),
    "one token": moment(tokens=1),
    "zero": torch.zeros(N, N, dtype=torch.float64),
    "dead inputs": with_dead_inputs(),
    "enormous channel": enormous(),
    "tiny": 1e-30 * moment(),
    "huge": 1e30 * moment(),
    "almost dead": torch.diag(torch.tensor([1e-20] + [1.0] * (N - 1), dtype=torch.float64)),
}

every_moment = pytest.mark.parametrize("gram", list(HARD.values()), ids=list(HARD))


def test_the_median_energy_ignores_dead_inputs_and_outliers() -> None:
    energies = torch.tensor([[0.0, 0.0, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0, 1e12], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert quiet(energies).tolist() == [2.0, 5.0, 1.0]


@every_moment
def test_a_prepared_metric_is_symmetric_positive_definite_of_unit_mean_diagonal(gram: Tensor) -> None:
    (metric,) = prepared(gram[None])
    assert metric.dtype == torch.float64
    assert torch.equal(metric, metric.mT)
    assert float(metric.diagonal().mean()) == pytest.approx(1, rel=1e-5)
    assert (metric.diagonal() > 0).all()
    values = torch.linalg.eigvalsh(metric)
    assert values[0] > -1e-14 * values[-1]


def test_a_prepared_metric_is_the_moment_with_a_little_more_on_the_diagonal() -> None:
    gram = moment()
    scaled = gram * N / gram.trace()
    expected = scaled + SHRINKAGE * torch.diag(scaled.diagonal() + scaled.diagonal().median())
    torch.testing.assert_close(prepared(gram[None])[0], expected, rtol=0, atol=1e-12)


@given(st.integers(-60, 60))
def test_the_scale_of_a_moment_does_not_matter(exponent: int) -> None:
    gram = torch.stack([HARD["full"], HARD["dead inputs"]])
    torch.testing.assert_close(prepared(gram * 2.0**exponent), prepared(gram), rtol=1e-13, atol=0)


def test_each_moment_of_a_batch_is_prepared_by_itself() -> None:
    together = prepared(torch.stack(list(HARD.values())))
    for one, gram in zip(together, HARD.values(), strict=True):
        assert torch.equal(one, prepared(gram[None])[0])


def test_a_moment_of_lower_precision_becomes_symmetric() -> None:
    gram = moment().float()
    gram[0, 1] += 1e-3
    (metric,) = prepared(gram[None])
    assert metric.dtype == torch.float64
    assert torch.equal(metric, metric.mT)


def test_dead_inputs_weigh_as_very_quiet_ones_and_a_zero_moment_is_the_identity() -> None:
    (metric,) = prepared(with_dead_inputs()[None])
    live = metric.diagonal()[[k for k in range(N) if k not in (2, 7)]]
    for dead in (2, 7):
        assert float(metric[dead].abs().sum()) == float(metric[dead, dead])  # coupled to nothing
        assert 1e-8 < float(metric[dead, dead] / live.median()) < 1e-4
    zero = prepared(HARD["zero"][None])[0]
    torch.testing.assert_close(zero, torch.eye(N, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2, 3, 12])
@every_moment
def test_roots_are_those_of_the_diagonal_blocks(gram: Tensor, blocks: int) -> None:
    metric = prepared(torch.stack([gram, moment(seed=5)]))
    root, inverse = roots(metric, blocks)
    Q = N // blocks
    assert root.shape == inverse.shape == (2, blocks, Q, Q)
    for b in range(2):
        for j in range(blocks):
            block = metric[b, j * Q : (j + 1) * Q, j * Q : (j + 1) * Q]
            size = float(torch.linalg.matrix_norm(block, 2))
            assert torch.linalg.eigvalsh(root[b, j])[0] > 0
            torch.testing.assert_close(root[b, j], root[b, j].mT, rtol=0, atol=1e-12 * size**0.5)
            assert float((root[b, j] @ root[b, j] - block).abs().max()) <= 2 * FLOOR * size
            condition = float(torch.linalg.cond(block))
            slack = 1e-12 * min(condition, 1 / FLOOR) ** 0.5
            torch.testing.assert_close(
                root[b, j] @ inverse[b, j], torch.eye(Q).double(), rtol=0, atol=max(slack, 1e-10)
            )


def test_diagonal_blocks_are_slices() -> None:
    matrices = randn(2, N, N)
    blocks = diagonal_blocks(matrices, 3)
    assert blocks.shape == (2, 3, 4, 4)
    for j in range(3):
        assert torch.equal(blocks[:, j], matrices[:, 4 * j : 4 * j + 4, 4 * j : 4 * j + 4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_blocks_is_the_product_with_the_block_diagonal_matrix(dtype: torch.dtype) -> None:
    matrices, blocks = randn(2, 5, N).to(dtype), randn(2, 3, 4, 4, seed=1)
    product = times_blocks(matrices, blocks)
    assert product.dtype == dtype
    for b in range(2):
        dense = torch.block_diag(*blocks[b]).to(dtype)
        torch.testing.assert_close(product[b], matrices[b] @ dense)


@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_the_whitened_metric_is_the_identity_in_its_diagonal_blocks(blocks: int) -> None:
    metric = prepared(torch.stack([moment(), moment(seed=5)]))
    _, inverse = roots(metric, blocks)
    whitened = whitened_metric(metric, inverse)
    eye = torch.eye(N // blocks, dtype=torch.float64).expand(2, blocks, -1, -1)
    torch.testing.assert_close(diagonal_blocks(whitened, blocks), eye, rtol=0, atol=1e-9)
    for b in range(2):
        S = torch.linalg.inv(torch.block_diag(*roots(metric, blocks)[0][b]))
        torch.testing.assert_close(whitened[b], S @ metric[b] @ S, rtol=0, atol=1e-8)


@pytest.mark.parametrize("blocks", [1, 3])
@every_moment
def test_the_error_is_the_same_in_whitened_coordinates(gram: Tensor, blocks: int) -> None:
    metric = prepared(gram[None])
    error = randn(1, 5, N, seed=3)
    root, inverse = roots(metric, blocks)
    white = times_blocks(error, root)
    plain = ((error @ metric) * error).sum()
    assert float(((white @ whitened_metric(metric, inverse)) * white).sum()) == pytest.approx(float(plain), rel=1e-6)


# Conjugate gradients


def spd(batch: int, n: int) -> Tensor:
    root = randn(batch, n, n)
    return root @ root.mT + 0.1 * torch.eye(n, dtype=torch.float64)


def jacobi(grams: Tensor, x: Tensor) -> Tensor:
    return x / grams.diagonal(dim1=1, dim2=2)[..., None]


def test_conjugate_gradients_solve_to_precision_in_as_many_steps_as_unknowns() -> None:
    grams, rhs = spd(3, 6), randn(3, 6, 2, seed=1)
    x = conjugate_gradients(lambda v: grams @ v, lambda v: jacobi(grams, v), rhs, 14)
    torch.testing.assert_close(x, torch.linalg.solve(grams, rhs), rtol=1e-6, atol=1e-8)


def test_with_an_exact_preconditioner_one_step_is_enough() -> None:
    grams, rhs = spd(3, 6), randn(3, 6, 2, seed=1)
    expected = torch.linalg.solve(grams, rhs)
    x = conjugate_gradients(lambda v: grams @ v, lambda v: torch.linalg.solve(grams, v), rhs, 1)
    torch.testing.assert_close(x, expected)


@given(st.integers(1, 6), st.integers(0, 1000))
def test_every_step_lowers_the_quadratic_and_each_entry_of_a_batch_is_alone(iterations: int, seed: int) -> None:
    grams, rhs = spd(2, 8), randn(2, 8, 3, seed=seed)

    def solved(count: int, which: slice = slice(None)) -> Tensor:
        some = grams[which]
        return conjugate_gradients(lambda v: some @ v, lambda v: jacobi(some, v), rhs[which], count)

    def quadratic(x: Tensor) -> Tensor:
        return (0.5 * x * (grams @ x) - x * rhs).sum((1, 2))

    assert (quadratic(solved(iterations)) < quadratic(solved(iterations - 1))).all()
    torch.testing.assert_close(solved(iterations)[1:], solved(iterations, slice(1, 2)))


def test_conjugate_gradients_stay_finite_where_there_is_nothing_to_solve() -> None:
    grams, rhs = spd(3, 4), torch.ones(3, 4, 1, dtype=torch.float64)
    rhs[1] = 0
    grams[2] = 0
    x = conjugate_gradients(lambda v: grams @ v, lambda v: v, rhs, 30)
    torch.testing.assert_close(x[0], torch.linalg.solve(grams[0], rhs[0]))
    assert not x[1:].any()
