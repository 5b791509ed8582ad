"""The linear algebra of the fits on what is not a batch of good systems."""

import pytest
import torch
from torch import Tensor

from structmat.fit.linalg import conjugate_gradients, factorize
from structmat.fit.moments import Moments


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_factorize_takes_one_matrix_without_a_batch() -> None:
    root = randn(5, 9)
    matrix = root @ root.mT
    torch.testing.assert_close(factorize(matrix.clone()), torch.linalg.cholesky(matrix))
    broken = torch.full((3, 3), torch.nan)
    with pytest.raises(FloatingPointError, match=r"normal equations of a fit are not finite, for weights \[0\]"):
        factorize(broken)


@pytest.mark.parametrize("tokens", [1, 4], ids="{} tokens".format)
def test_moments_of_too_few_tokens_pose_a_problem_without_a_ridge(tokens: int) -> None:
    """Singular second moments: the factorisation adds what little it needs."""
    x, t, weight = randn(tokens, 9), randn(tokens, 9, seed=1), randn(6, 9, seed=2)
    moments = Moments(tokens, x.mT @ x / tokens, x.mean(0), t.mT @ x / tokens, t.mean(0), ridge=0.0)
    target, second_moment = moments.problem(weight)
    assert torch.isfinite(target).all()
    torch.testing.assert_close(target @ second_moment, weight @ moments.cross, rtol=1e-5, atol=1e-5)


def test_conjugate_gradients_solve_each_system_of_a_batch_by_itself() -> None:
    roots, rhs = randn(2, 3, 6, 8), randn(2, 3, 6, seed=1)
    matrices = roots @ roots.mT
    together = conjugate_gradients(lambda v: (matrices @ v[..., None])[..., 0], lambda v: v, rhs, 4, batch_dimensions=2)
    for i in range(2):
        for j in range(3):
            one = matrices[i, j]
            alone = conjugate_gradients(lambda v, one=one: v @ one, lambda v: v, rhs[i, j][None], 4)[0]
            torch.testing.assert_close(together[i, j], alone)
