"""The BLAST fit: its systems against autograd, its sweeps against a plain reading of the formulas, its results."""

import contextlib
import dataclasses
import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian

from structmat import Blast
from structmat.fit import Lee2024Blast
from structmat.fit import blast_systems as systems
from structmat.fit.lee2024blast import balancing
from structmat.fit.linalg import factorize

GRIDS = {"I < J": (2, 3, 5, 4, 3), "I > J": (3, 2, 4, 5, 3), "I == J": (3, 3, 4, 5, 2)}
"""``I, J, P, Q, R``: no two sizes that a swap could confuse are equal, but for the counts in the last."""

every_grid = pytest.mark.parametrize("grid", list(GRIDS.values()), ids=list(GRIDS))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(grid: tuple[int, ...], batch: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random ``weights (B, M, N)``, ``left (B, I, P, R)``, ``diag (B, I, J, R)``, ``right (B, J, R, Q)`` in float64."""
    (I, J, P, Q, R), g = grid, generator()
    shapes = (batch, I * P, J * Q), (batch, I, P, R), (batch, I, J, R), (batch, J, R, Q)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)  # pyright: ignore


def approximation(left: Tensor, diag: Tensor, right: Tensor) -> Tensor:
    """``W_hat (B, M, N)``, block by block as the definition says."""
    I, J = diag.shape[1:3]
    rows = [
        torch.cat([left[:, i] @ torch.diag_embed(diag[:, i, j]) @ right[:, j] for j in range(J)], -1) for i in range(I)
    ]
    return torch.cat(rows, -2)


def loss(weights: Tensor, left: Tensor, diag: Tensor, right: Tensor) -> Tensor:
    return (weights - approximation(left, diag, right)).square().sum()


def left_system(weights: Tensor, diag: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return systems.left_gram(diag, systems.gram_of_rows(right)), systems.left_target(weights, diag, right)


def right_system(weights: Tensor, left: Tensor, diag: Tensor) -> tuple[Tensor, Tensor]:
    gram = systems.right_gram(diag, systems.gram_of_columns(left))
    return gram, systems.right_target(systems.projected_blocks(weights, left), diag)


def diag_system(weights: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    gram = systems.diag_gram(systems.gram_of_columns(left), systems.gram_of_rows(right))
    return gram, systems.diag_target(systems.projected_blocks(weights, left), right)


def times(gram: Tensor, vectors: Tensor) -> Tensor:
    return (gram @ vectors[..., None])[..., 0]


# The systems against autograd


@every_grid
def test_gradient_for_left(grid: tuple[int, ...]) -> None:
    weights, left, diag, right = problem(grid, batch=2)
    left.requires_grad_()
    (expected,) = torch.autograd.grad(loss(weights, left, diag, right), left)
    gram, target = left_system(weights, diag, right)
    torch.testing.assert_close(2 * (left @ gram - target), expected)


@every_grid
def test_gradient_for_right(grid: tuple[int, ...]) -> None:
    weights, left, diag, right = problem(grid, batch=2)
    right.requires_grad_()
    (expected,) = torch.autograd.grad(loss(weights, left, diag, right), right)
    gram, target = right_system(weights, left, diag)
    torch.testing.assert_close(2 * (gram @ right - target), expected)


@every_grid
def test_gradient_for_diag(grid: tuple[int, ...]) -> None:
    weights, left, diag, right = problem(grid, batch=2)
    diag.requires_grad_()
    (expected,) = torch.autograd.grad(loss(weights, left, diag, right), diag)
    gram, target = diag_system(weights, left, right)
    torch.testing.assert_close(2 * (times(gram, diag) - target), expected)


def hessian_blocks(whole: Tensor, lead: int) -> Tensor:
    """The blocks of a Hessian that couple the entries of one group, whose index is the first ``lead`` axes."""
    half = whole.ndim // 2
    count = whole.shape[:lead].numel()
    rest = whole.shape[lead:half]
    matrix = whole.reshape(count, rest.numel(), count, rest.numel())
    off = matrix.clone()
    off[range(count), :, range(count)] = 0
    assert not off.any()  # nothing couples different groups
    return matrix[range(count), :, range(count)].view(*whole.shape[:lead], rest.numel(), rest.numel())


def left_hessian(grid: tuple[int, ...]) -> Tensor:
    """``(I, P R, P R)``."""
    weights, left, diag, right = problem(grid)
    return hessian_blocks(hessian(lambda f: loss(weights, f[None], diag, right), left[0]), 1)


def right_hessian(grid: tuple[int, ...]) -> Tensor:
    """``(J, R Q, R Q)``."""
    weights, left, diag, right = problem(grid)
    return hessian_blocks(hessian(lambda f: loss(weights, left, diag, f[None]), right[0]), 1)


def diag_hessian(grid: tuple[int, ...]) -> Tensor:
    """``(I, J, R, R)``."""
    weights, left, diag, right = problem(grid)
    return hessian_blocks(hessian(lambda f: loss(weights, left, f[None], right), diag[0]), 2)


def left_kron(gram: Tensor, P: int) -> Tensor:
    """``2 I_P ⊗ G_i``."""
    return torch.stack([torch.kron(torch.eye(P, dtype=gram.dtype), 2 * one) for one in gram[0]])


def right_kron(gram: Tensor, Q: int) -> Tensor:
    """``2 G_j ⊗ I_Q``."""
    return torch.stack([torch.kron(2 * one.contiguous(), torch.eye(Q, dtype=gram.dtype)) for one in gram[0]])


@every_grid
def test_grams_are_the_exact_hessians(grid: tuple[int, ...]) -> None:
    weights, left, diag, right = problem(grid)
    _, _, P, Q, _ = grid
    torch.testing.assert_close(left_kron(left_system(weights, diag, right)[0], P), left_hessian(grid))
    torch.testing.assert_close(right_kron(right_system(weights, left, diag)[0], Q), right_hessian(grid))
    torch.testing.assert_close(2 * diag_system(weights, left, right)[0][0], diag_hessian(grid))


def swapped(grid_of_blocks: Tensor) -> Tensor:
    """``x[b, i, j]`` with ``x_ji`` in its place, read from the same memory where the counts differ."""
    return grid_of_blocks.transpose(1, 2).reshape(grid_of_blocks.shape)


def assert_differ(wrong: Tensor, right: Tensor) -> None:
    assert wrong.shape == right.shape
    assert float((wrong - right).norm()) > 0.1 * float(right.norm())


@every_grid
def test_swapped_indices_are_caught(grid: tuple[int, ...]) -> None:
    weights, left, diag, right = problem(grid)
    _, _, P, Q, _ = grid
    assert_differ(2 * swapped(diag_system(weights, left, right)[0])[0], diag_hessian(grid))
    assert_differ(left_kron(left_system(weights, swapped(diag), right)[0], P), left_hessian(grid))
    assert_differ(right_kron(right_system(weights, left, swapped(diag))[0], Q), right_hessian(grid))


@every_grid
def test_swapped_targets_are_caught(grid: tuple[int, ...]) -> None:
    weights, left, diag, right = problem(grid)
    for get in (
        lambda d: left_system(weights, d, right)[1],
        lambda d: right_system(weights, left, d)[1],
    ):
        assert_differ(get(swapped(diag)), get(diag))
    target = diag_system(weights, left, right)[1]
    assert_differ(swapped(target), target)


@every_grid
def test_one_exact_step_takes_each_gradient_to_zero(grid: tuple[int, ...]) -> None:
    weights, left, diag, right = problem(grid, batch=2)
    none = torch.zeros(2, 1, dtype=torch.float64)

    gram, target = left_system(weights, diag, right)
    solved = torch.cholesky_solve(target.mT, factorize(gram, none)).mT.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(weights, solved, diag, right), solved)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)

    gram, target = right_system(weights, left, diag)
    solved = torch.cholesky_solve(target, factorize(gram, none)).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(weights, left, diag, solved), solved)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)

    gram, target = diag_system(weights, left, right)
    factors = factorize(gram, none[..., None])
    solved = torch.cholesky_solve(target[..., None], factors)[..., 0].requires_grad_()
    (gradient,) = torch.autograd.grad(loss(weights, left, solved, right), solved)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)


@pytest.mark.parametrize("size", [1, 100, 10**9])
def test_chunks_cover_everything_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systems, "CHUNK_BYTES", size)
    _, left, diag, right = problem(GRIDS["I < J"], batch=2)
    left_grams, right_grams = systems.gram_of_columns(left), systems.gram_of_rows(right)
    seen = torch.zeros(2, 3)
    for rows, columns in systems.diag_chunks(left_grams, right_grams):
        seen[rows, columns] += 1
    assert torch.equal(seen, torch.ones(2, 3))
    expected = torch.einsum("bijr,bjrs,bijs->birs", diag, right_grams, diag)
    torch.testing.assert_close(systems.left_gram(diag, right_grams), expected)
    assert [item for some in systems.chunks(7, 8) for item in range(7)[some]] == list(range(7))


# The solvers


def spd(*shape: int) -> Tensor:
    root = torch.randn(*shape, shape[-1], generator=generator(), dtype=torch.float64)
    return root @ root.mT + torch.eye(shape[-1], dtype=torch.float64)


def test_conjugate_gradients_solve_to_precision_in_as_many_steps_as_unknowns() -> None:
    grams, damping = spd(2, 3, 6), torch.tensor([0.0, 0.5], dtype=torch.float64)[:, None]
    rhs = torch.randn(2, 3, 6, generator=generator(1), dtype=torch.float64)
    expected = torch.linalg.solve(grams + damping[..., None, None] * torch.eye(6, dtype=torch.float64), rhs)
    torch.testing.assert_close(systems.approximately_solved(grams, damping, rhs, 6), expected, rtol=1e-8, atol=1e-10)
    early = systems.approximately_solved(grams, damping, rhs, 2)
    assert float((early - expected).norm()) > 1e-4 * float(expected.norm())


def test_conjugate_gradients_stay_finite_past_the_solution() -> None:
    grams, rhs = spd(3, 4), torch.ones(3, 4, dtype=torch.float64)
    rhs[1] = 0
    grams[2] = 0  # nothing to solve
    x = systems.approximately_solved(grams, torch.zeros(1, dtype=torch.float64), rhs, 50)
    torch.testing.assert_close(x[0], torch.linalg.solve(grams[0], rhs[0]))
    assert not x[1:].any()


@pytest.mark.parametrize("kind", ["singular", "slightly indefinite", "zero", "tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_factorize_copes_with_systems_that_are_not_definite(kind: str, dtype: torch.dtype) -> None:
    root = torch.randn(4, 6, 2, generator=generator(), dtype=dtype)
    gram = root @ root.mT  # rank 2 of 6
    if kind == "slightly indefinite":
        gram -= 10 * torch.finfo(dtype).eps * torch.eye(6, dtype=dtype)
    if kind in ("zero", "tiny"):
        gram *= 0 if kind == "zero" else 1e-30
    factors = factorize(gram.clone(), torch.zeros(4, dtype=dtype))
    assert torch.isfinite(factors).all()
    assert (factors.diagonal(dim1=-2, dim2=-1) > 0).all()
    slack = 1e-4 if dtype == torch.float32 else 1e-11
    assert float((factors @ factors.mT - gram).norm()) <= slack * max(float(gram.norm()), 1e-12)


def test_factorize_adds_the_damping() -> None:
    gram, damping = spd(2, 3, 4), torch.tensor([[0.5], [2.0]], dtype=torch.float64)
    factors = factorize(gram.clone(), damping)
    expected = gram + damping[..., None, None] * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(factors @ factors.mT, expected)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail, rather than hang, where a loop does not end."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (1, 0)], ids=["on the diagonal", "beside it"])
def test_factorize_refuses_non_finite_systems(value: float, place: tuple[int, int]) -> None:
    gram = torch.eye(3)[None].repeat(2, 1, 1)
    gram[1, place[0], place[1]] = gram[1, place[1], place[0]] = value
    with (
        time_limit(5),
        pytest.raises(FloatingPointError, match=r"not finite, for weights \[1\] of its batch; lower its step"),
    ):
        factorize(gram, torch.zeros(2))


def balanced(left: Tensor, diag: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = balancing(left, diag, right)
    return left * a[:, None, None], diag * b[:, None, None], right * c[:, None, :, None]


def test_balancing_keeps_the_matrix_and_evens_the_factors() -> None:
    _, left, diag, right = problem(GRIDS["I < J"], batch=2)
    left[..., 0] *= 1e4
    diag[..., 1] *= 1e-3
    a, b, c = balanced(left, diag, right)
    torch.testing.assert_close(approximation(a, b, c), approximation(left, diag, right))
    sizes = a.square().mean((1, 2)), b.square().mean((1, 2)), c.square().mean((1, 3))
    torch.testing.assert_close(sizes[0], sizes[1])
    torch.testing.assert_close(sizes[0], sizes[2])


def test_balancing_leaves_a_dead_component_finite() -> None:
    _, left, diag, right = problem(GRIDS["I < J"])
    diag[..., 0] = 0
    factors = balanced(left, diag, right)
    assert all(torch.isfinite(factor).all() for factor in factors)
    torch.testing.assert_close(approximation(*factors), approximation(left, diag, right))


def test_fitted_factors_are_balanced() -> None:
    format = Blast(12, 20, (3, 4), rank=3)
    factors = Lee2024Blast.published(sweeps=5)(low_rank_plus_noise(0)[:12, :20], format).factors
    left, diag, right = format.views(factors)
    sizes = left.square().mean((0, 1)), diag.square().mean((0, 1)), right.square().mean((0, 2))
    torch.testing.assert_close(sizes[0], sizes[1])
    torch.testing.assert_close(sizes[0], sizes[2])


# The sweeps


def test_published_schedule() -> None:
    method = Lee2024Blast.published()
    assert (method.sweeps, method.damping, method.start, method.step, method.settling) == (300, 0.1, 1e-3, 2.0, None)
    assert list(method.steps()) == pytest.approx([2 * (1 - k / 300) for k in range(300)], rel=1e-14)
    assert Lee2024Blast.published(sweeps=7, seed=3) == Lee2024Blast(
        **{**vars(method), "sweeps": 7, "seed": 3}  # everything else stays
    )


def test_a_settling_schedule_ends_at_step_one() -> None:
    assert list(Lee2024Blast(sweeps=10, step=1.9, settling=0.3).steps()) == [1.9] * 7 + [1.0] * 3
    assert list(Lee2024Blast(sweeps=10, step=1.9, settling=0.0).steps()) == [1.9] * 9 + [1.0]
    assert list(Lee2024Blast(sweeps=2, step=1.9, settling=1.0).steps()) == [1.0] * 2


def naive_published(W: Tensor, format: Blast, method: Lee2024Blast) -> Tensor:
    """Algorithm 2 as ``methods.md`` section 4 writes it, one block at a time; returns ``W_hat``."""
    sweeps = method.sweeps
    (I, J), (P, Q), R = format.blocks, format.block_shape, format.rank
    left, diag, right = (factor[0].clone() for factor in method.initial(W[None], format))
    scale = W.square().mean().sqrt()
    W = W / scale
    blocks = [[W[i * P : (i + 1) * P, j * Q : (j + 1) * Q] for j in range(J)] for i in range(I)]
    eye = torch.eye(R, dtype=W.dtype)

    def epsilon() -> Tensor:
        return 0.1 * (W - approximation(left[None], diag[None], right[None])[0]).norm()

    for k in range(sweeps):
        eta = 2 * (1 - k / sweeps)
        for r in range(R if method.balanced else 0):
            parts = left[:, :, r], diag[:, :, r], right[:, r, :]
            sizes = [part.square().mean().sqrt() for part in parts]
            for part, size in zip(parts, sizes, strict=True):
                part *= (sizes[0] * sizes[1] * sizes[2]) ** (1 / 3) / size
        eps = epsilon()
        for i in range(I):
            D = [torch.diag(diag[i, j]) for j in range(J)]
            G = sum(D[j] @ right[j] @ right[j].T @ D[j] for j in range(J))
            B = sum(blocks[i][j] @ right[j].T @ D[j] for j in range(J))
            left[i] -= eta * (left[i] @ G - B) @ torch.linalg.inv(G + eps * eye)
        eps = epsilon()
        for j in range(J):
            D = [torch.diag(diag[i, j]) for i in range(I)]
            G = sum(D[i] @ left[i].T @ left[i] @ D[i] for i in range(I))
            B = sum(D[i] @ left[i].T @ blocks[i][j] for i in range(I))
            right[j] -= eta * torch.linalg.inv(G + eps * eye) @ (G @ right[j] - B)
        eps = epsilon()
        for i in range(I):
            for j in range(J):
                H = (left[i].T @ left[i]) * (right[j] @ right[j].T)
                g = ((left[i].T @ blocks[i][j]) * right[j]).sum(1)
                diag[i, j] -= eta * torch.linalg.inv(H + eps * eye) @ (H @ diag[i, j] - g)
    return scale * approximation(left[None], diag[None], right[None])[0]


@every_grid
@pytest.mark.parametrize("sweeps", [1, 2, 12])
@pytest.mark.parametrize(
    "changes",
    [{}, {"start": 1.0}, {"start": 1.0, "balanced": True}],
    ids=["published", "larger start", "balanced, larger start"],
)
def test_published_sweeps_are_those_of_the_formulas(
    grid: tuple[int, ...], sweeps: int, changes: dict[str, Any]
) -> None:
    I, J, P, Q, R = grid
    W, format = 3 * problem(grid)[0][0] + 1, Blast(I * P, J * Q, (I, J), R)
    published = Lee2024Blast.published(sweeps=sweeps, seed=5)
    assert not published.balanced
    method = dataclasses.replace(published, **changes)
    expected = naive_published(W, format, method)
    if sweeps == 12:
        assert float((W - expected).norm()) < 0.9 * float(W.norm())  # it has left the start
    size = float(expected.abs().max())
    torch.testing.assert_close(format.to_dense(method(W, format).factors), expected, rtol=0, atol=1e-8 * size)


@every_grid
def test_the_start_is_that_of_the_formulas(grid: tuple[int, ...]) -> None:
    format = Blast(grid[0] * 40, grid[1] * 50, grid[:2], rank=30)
    left, diag, right = Lee2024Blast.published().initial(torch.ones(1, *format.shape), format)
    assert (float(left.std()), float(right.std())) == pytest.approx((1e-3 / 30**0.5,) * 2, rel=0.1)
    assert float(diag.std()) == pytest.approx(1, rel=0.15)


@every_grid
def test_the_last_step_at_step_one_zeroes_the_gradient(grid: tuple[int, ...]) -> None:
    I, J, P, Q, R = grid
    W, format = problem(grid)[0][0], Blast(I * P, J * Q, (I, J), R)
    fit = Lee2024Blast(sweeps=3, step=1.0, damping=0.0)(W, format)
    factors = {name: factor.clone().requires_grad_() for name, factor in fit.factors.items()}
    (W - format.to_dense(factors)).square().sum().backward()
    diag, left = factors["diag"].grad, factors["left"].grad
    torch.testing.assert_close(diag, torch.zeros(I * J, R, dtype=torch.float64), atol=1e-8, rtol=0)
    assert left is not None
    assert float(left.norm()) > 1e-3  # the step for diag, which comes last, moved the others' optimum


@every_grid
def test_alternating_least_squares_never_gets_worse(grid: tuple[int, ...]) -> None:
    I, J, P, Q, R = grid
    fit = Lee2024Blast(sweeps=40, step=1.0, damping=0.0)(problem(grid)[0][0], Blast(I * P, J * Q, (I, J), R))
    falls = [before - after for before, after in zip(fit.history, fit.history[1:], strict=False)]
    assert min(falls) > -1e-9
    assert fit.history[-1] < 0.9 * fit.history[0]
    assert fit.error <= fit.history[-1] + 1e-9  # the history leaves out the last step for diag


@pytest.mark.parametrize("direct_rank", [0, 10])
@pytest.mark.parametrize("size", [1, 500, 1500])
def test_chunks_change_nothing(size: int, direct_rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W, format = low_rank_plus_noise(0)[:35, :55].double(), Blast(35, 55, (7, 5), rank=4)
    method = Lee2024Blast(sweeps=3, direct_rank=direct_rank)
    whole = method(W, format)
    monkeypatch.setattr(systems, "CHUNK_BYTES", size)
    chunked = method(W, format)
    torch.testing.assert_close(format.to_dense(chunked.factors), format.to_dense(whole.factors), rtol=0, atol=1e-9)


@every_grid
def test_without_damping_balancing_changes_nothing(grid: tuple[int, ...]) -> None:
    I, J, P, Q, R = grid
    W, format = problem(grid)[0][0], Blast(I * P, J * Q, (I, J), R)
    with_it, without = (Lee2024Blast(sweeps=4, step=1.5, damping=0.0, balanced=b)(W, format) for b in (True, False))
    torch.testing.assert_close(format.to_dense(with_it.factors), format.to_dense(without.factors), rtol=0, atol=1e-8)
    assert with_it.history == pytest.approx(without.history, abs=1e-8)


# The results


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("method", "format"),
    [
        (Lee2024Blast(sweeps=200), Blast(48, 48, 3, rank=4)),
        (Lee2024Blast.published(), Blast(48, 48, 3, rank=4)),
        (Lee2024Blast.published(), Blast(64, 96, (4, 3), rank=8)),
    ],
    ids=["default, square", "published, square", "published, I > J"],
)
def test_a_blast_matrix_is_recovered(method: Lee2024Blast, format: Blast, seed: int) -> None:
    weight = format.to_dense(format.init(generator=generator(seed)))
    assert method(weight, format).error < 1e-2


def low_rank_plus_noise(seed: int) -> Tensor:
    g = generator(seed)
    low_rank = torch.randn(64, 8, generator=g) @ torch.randn(8, 96, generator=g) / 8**0.5
    return low_rank + 0.5 * torch.randn(64, 96, generator=g)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_default_beats_as_many_published_sweeps(seed: int) -> None:
    weight, format = low_rank_plus_noise(seed), Blast.for_budget(64, 96, keep=0.5, blocks=(4, 6))
    default = Lee2024Blast()
    assert default(weight, format).error < 0.99 * Lee2024Blast.published(sweeps=default.sweeps)(weight, format).error


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_few_conjugate_gradients_do_as_well_as_cholesky(seed: int) -> None:
    weight, format = low_rank_plus_noise(seed), Blast.for_budget(64, 96, keep=0.5, blocks=(4, 6))
    direct, iterative = Lee2024Blast()(weight, format).error, Lee2024Blast(direct_rank=0)(weight, format).error
    assert iterative == pytest.approx(direct, rel=0.01)


def test_many_conjugate_gradients_are_cholesky() -> None:
    weight, format = low_rank_plus_noise(0).double(), Blast(64, 96, (4, 6), rank=6)
    direct = Lee2024Blast.published(sweeps=4)
    iterative = Lee2024Blast(**{**vars(direct), "direct_rank": 5, "cg_iterations": 40})
    same = Lee2024Blast(**{**vars(direct), "direct_rank": 6})
    dense = [format.to_dense(method(weight, format).factors) for method in (direct, iterative, same)]
    torch.testing.assert_close(dense[1], dense[0], rtol=0, atol=1e-8)
    assert torch.equal(dense[2], dense[0])  # up to this rank, the rank included
    assert not torch.equal(dense[1], dense[0])


def test_more_blocks_are_better_at_nearly_the_same_size() -> None:
    weight = low_rank_plus_noise(0)
    errors = [Lee2024Blast()(weight, Blast.for_budget(64, 96, keep=0.5, blocks=b)).error for b in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True)


def test_tolerance_stops_early_and_settles() -> None:
    weight, format = low_rank_plus_noise(0), Blast.for_budget(64, 96, keep=0.5, blocks=(4, 6))
    full, early = (Lee2024Blast(sweeps=200, tolerance=t)(weight, format) for t in (0.0, 1e-2))
    assert len(full.history) == 200
    assert 10 < len(early.history) < 150
    assert early.error < 1.03 * full.error


def test_tolerance_stops_each_weight_of_a_batch_by_itself() -> None:
    format = Blast.for_budget(64, 96, keep=0.5, blocks=(4, 6))
    weights, method = [low_rank_plus_noise(0), torch.ones(64, 96)], Lee2024Blast(sweeps=100, tolerance=1e-2)
    together, alone = method.fit_many(weights, format), [method(weight, format) for weight in weights]
    assert [len(fit.history) for fit in together] == [len(fit.history) for fit in alone]
    assert len(alone[0].history) != len(alone[1].history)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sweeps": 0}, "expected sweeps to be an integer of at least 1, got 0"),
        ({"cg_iterations": 0}, "expected cg_iterations to be an integer of at least 1, got 0"),
        ({"direct_rank": -1}, "expected direct_rank to be an integer of at least 0, got -1"),
        ({"step": 0.0}, "expected a step in (0, 2], beyond which the sweeps diverge, got 0.0"),
        ({"step": 2.01}, "expected a step in (0, 2], beyond which the sweeps diverge, got 2.01"),
        ({"step": float("nan")}, "expected a step in (0, 2], beyond which the sweeps diverge, got nan"),
        ({"settling": -0.1}, "expected settling in [0, 1] or None, got -0.1"),
        ({"settling": 1.1}, "expected settling in [0, 1] or None, got 1.1"),
        ({"damping": -1e-3}, "expected damping to be at least 0, got -0.001"),
        ({"damping": float("nan")}, "expected damping to be at least 0, got nan"),
        ({"tolerance": -1e-3}, "expected tolerance to be at least 0, got -0.001"),
        ({"start": 0.0}, "expected a positive start, got 0.0"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Lee2024Blast(**settings)
