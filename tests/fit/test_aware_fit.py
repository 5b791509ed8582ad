"""Activation-aware fits: what they report, what they reach, and moments that are hard."""

import dataclasses
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from structmat import Blast, BlockDiagonal, BlockSparse, Fit, Format, GaudiGblr, LowRank, Monarch
from structmat.fit import Dao2022Monarch, GradientFit, Lee2024Blast, Lee2024Gblr, Magnitude, Method, TruncatedSvd
from structmat.fit.blast_metric import BlastDescent
from structmat.fit.dao2022monarch import MonarchDescent
from structmat.fit.descent import Descent, descend
from structmat.fit.metric import Metric, Whitened, prepared, roots, times_blocks
from structmat.formats import flat_butterfly


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(N: int, tokens: int = 400, seed: int = 0) -> Tensor:
    """Inputs ``(T, N)`` as networks have them: correlated, a spectrum that decays, one loud channel, float64."""
    mixing = torch.linalg.qr(randn(N, N, seed=seed + 1).double()).Q * torch.arange(1, N + 1).pow(-1.0)
    x = randn(tokens, N, seed=seed).double() @ (mixing @ torch.linalg.qr(randn(N, N, seed=seed + 2).double()).Q)
    x[:, N // 2] *= 10
    return x


def moment_of(x: Tensor) -> Tensor:
    return x.mT @ x / len(x)


def cases(M: int, N: int, blocks: tuple[int, int]) -> dict[str, tuple[Method, Format]]:
    """Every method, as it is by default or quick, with every format that it fits."""
    butterfly = flat_butterfly((3, 3), 1)
    return {
        "low-rank": (TruncatedSvd(), LowRank(M, N, 5)),
        "low-rank randomised": (TruncatedSvd(randomized=True), LowRank(M, N, 5)),
        "low-rank by gradient": (GradientFit(steps=80, learning_rate=0.2), LowRank(M, N, 5)),
        "block-diagonal": (Magnitude(), BlockDiagonal(M, N, 3)),
        "block-sparse": (Magnitude(), BlockSparse(M, N, butterfly)),
        "block-sparse, empty row": (Magnitude(), BlockSparse(M, N, ("011", "000", "110"))),
        "block-sparse low-rank": (Magnitude(), BlockSparse(M, N, butterfly, 2)),
        "monarch": (Dao2022Monarch(iterations=15), Monarch(M, N, blocks, 2)),
        "monarch permuted": (Dao2022Monarch(iterations=15), Monarch(M, N, blocks, 2, permute_output=True)),
        "blast": (Lee2024Blast(sweeps=25, metric_iterations=20), Blast(M, N, blocks, 4)),
    }


WIDE, TALL = cases(12, 18, (2, 3)), cases(18, 12, (3, 2))
CASES = {f"{name}, wide": case for name, case in WIDE.items()}
CASES |= {f"{name}, tall": case for name, case in TALL.items() if "gradient" not in name}
CLOSED = ("low-rank", "block-diagonal", "block-sparse", "block-sparse, empty row")


def every(cases: dict[str, tuple[Method, Format]]):
    return pytest.mark.parametrize(("method", "format"), list(cases.values()), ids=list(cases))


def dense(fit: Fit) -> Tensor:
    return fit.format.to_dense({name: factor.double() for name, factor in fit.factors.items()})


def output_error(approximation: Tensor, weight: Tensor, moment: Tensor) -> float:
    """``sqrt(tr(E C E^T) / tr(W C W^T))``, as the definition says."""
    W, C = weight.double(), moment.double()
    E = W - approximation.double()
    return float((torch.trace(E @ C @ E.mT) / torch.trace(W @ C @ W.mT)).sqrt())


# What every method reports


@every(CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_both_errors_are_those_of_the_factors(method: Method, format: Format, dtype: torch.dtype) -> None:
    weight, moment = randn(*format.shape).to(dtype), moment_of(inputs(format.N))
    fit = method(weight, format, second_moment=moment)
    assert {factor.dtype for factor in fit.factors.values()} == {dtype}
    assert fit.bias is None
    assert fit.error == pytest.approx(float((weight.double() - dense(fit)).norm() / weight.double().norm()), rel=1e-4)
    assert fit.output_error == pytest.approx(output_error(dense(fit), weight, moment), rel=1e-3, abs=1e-4)


@every(WIDE)
def test_without_a_gram_there_is_no_output_error(method: Method, format: Format) -> None:
    assert method(randn(*format.shape), format).output_error is None


@every(CASES)
def test_it_lowers_the_output_error_and_pays_in_the_other(method: Method, format: Format) -> None:
    weight, moment = randn(*format.shape), moment_of(inputs(format.N))
    aware, plain = method(weight, format, second_moment=moment), method(weight, format)
    assert aware.output_error is not None
    assert aware.output_error < 0.98 * output_error(dense(plain), weight, moment)
    assert aware.error > plain.error


@every(CASES)
def test_the_identity_gives_the_plain_fit(method: Method, format: Format) -> None:
    weight = randn(*format.shape)
    aware, plain = method(weight, format, second_moment=torch.eye(format.N)), method(weight, format)
    assert aware.output_error == pytest.approx(aware.error, rel=1e-5)
    if isinstance(method, Lee2024Blast):  # whose sweeps go on
        assert 0.9 * plain.error < aware.error < plain.error * (1 + 1e-5)
    else:
        assert aware.error == pytest.approx(plain.error, rel=1e-4)


@every(WIDE)
@pytest.mark.parametrize("scale", [2.0**-80, 2.0**80])
def test_the_scale_of_the_gram_does_not_matter(method: Method, format: Format, scale: float) -> None:
    weight, moment = randn(*format.shape), moment_of(inputs(format.N))
    one, other = method(weight, format, second_moment=moment), method(weight, format, second_moment=scale * moment)
    assert one.output_error == other.output_error
    assert all(torch.equal(factor, other.factors[name]) for name, factor in one.factors.items())


@every(WIDE)
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_the_scale_of_the_weight_does_not_matter(method: Method, format: Format, scale: float) -> None:
    weight, moment = randn(*format.shape), moment_of(inputs(format.N))
    one, other = method(weight, format, second_moment=moment), method(scale * weight, format, second_moment=moment)
    assert other.output_error == pytest.approx(one.output_error, rel=1e-3)


@every(WIDE)
def test_many_together_are_as_each_alone(method: Method, format: Format) -> None:
    weights = [randn(12, 18), 1e3 * randn(12, 18, seed=1), torch.ones(12, 18), torch.zeros(12, 18)]
    moments = [moment_of(inputs(18, seed=k)) for k in range(2)] + [
        torch.eye(18).double(),
        moment_of(inputs(18, tokens=4)),
    ]
    together = method.fit_many(weights, format, second_moments=moments)
    for weight, moment, one in zip(weights, moments, together, strict=True):
        alone = method(weight, format, second_moment=moment)
        assert one.output_error == pytest.approx(alone.output_error, rel=1e-3, abs=1e-5)
        assert one.error == pytest.approx(alone.error, rel=1e-2, abs=1e-5)
    assert together[3].output_error == together[3].error == 0


@every(WIDE)
def test_the_gram_is_left_alone_and_a_second_fit_is_the_same(method: Method, format: Format) -> None:
    weight, moment = randn(12, 18), moment_of(inputs(18))
    before = moment.clone()
    first, second = (method(weight, format, second_moment=moment) for _ in range(2))
    assert torch.equal(moment, before)
    assert all(torch.equal(factor, second.factors[name]) for name, factor in first.factors.items())


# What each method promises


@pytest.mark.parametrize("shape", [(12, 18), (18, 12)])
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_svd_reaches_the_closed_form_optimum(shape: tuple[int, int], rank: int) -> None:
    weight, moment = randn(*shape).double(), moment_of(inputs(shape[1]))
    energy = torch.linalg.svdvals(weight @ torch.linalg.cholesky(moment)).square()  # any root will do
    expected = float((energy[rank:].sum() / energy.sum()).sqrt())
    fit = TruncatedSvd(randomized=False)(weight, LowRank(*shape, rank), second_moment=moment)
    assert output_error(dense(fit), weight, moment) == pytest.approx(expected, rel=1e-4)


def moved(fit: Fit, size: float, seed: int) -> Tensor:
    """The dense matrix of factors near those of the fit."""
    step = {n: f * (1 + size * randn(*f.shape, seed=seed).to(f.dtype)) for n, f in fit.factors.items()}
    return fit.format.to_dense(step)


@pytest.mark.parametrize("name", [*CLOSED, "monarch", "blast"])
@pytest.mark.parametrize("size", [1e-3, 1e-1])
def test_nothing_near_is_better(name: str, size: float) -> None:
    method, format = WIDE[name]
    weight, moment = randn(12, 18).double(), moment_of(inputs(18))
    fit = method(weight, format, second_moment=moment)
    slack = 1e-9 if name in CLOSED else 1e-4
    for seed in range(10):
        assert output_error(moved(fit, size, seed), weight, moment) > output_error(dense(fit), weight, moment) - slack


@pytest.mark.parametrize("shape", [(12, 18), (18, 12)])
@pytest.mark.parametrize("rank", [1, 5])
def test_svd_factors_are_balanced(shape: tuple[int, int], rank: int) -> None:
    factors = TruncatedSvd()(randn(*shape), LowRank(*shape, rank), second_moment=moment_of(inputs(shape[1]))).factors
    torch.testing.assert_close(factors["left"].square().mean(0), factors["right"].square().mean(1))


@pytest.mark.parametrize("shape", [(12, 18), (18, 12)])
@pytest.mark.parametrize("mask", [("100", "010", "001"), ("101", "010", "110"), ("111", "000", "011")])
def test_blocks_are_the_regression_on_sampled_inputs(shape: tuple[int, int], mask: tuple[str, ...]) -> None:
    weight, x = randn(*shape).double(), inputs(shape[1])
    y = x @ weight.mT
    P, Q = shape[0] // 3, shape[1] // 3
    expected = torch.zeros_like(weight)
    for i, row in enumerate(mask):
        read = [j * Q + q for j, on in enumerate(row) if on == "1" for q in range(Q)]
        if read:
            solved = torch.linalg.lstsq(x[:, read], y[:, i * P : (i + 1) * P]).solution
            expected[i * P : (i + 1) * P, read] = solved.mT
    fit = Magnitude()(weight, BlockSparse(*shape, mask), second_moment=moment_of(x))
    torch.testing.assert_close(dense(fit), expected, rtol=0, atol=2e-3)
    assert output_error(dense(fit), weight, moment_of(x)) == pytest.approx(
        output_error(expected, weight, moment_of(x)), rel=1e-5
    )
    if mask == ("100", "010", "001"):
        same = Magnitude()(weight, BlockDiagonal(*shape, 3), second_moment=moment_of(x))
        torch.testing.assert_close(dense(same), dense(fit))


def test_magnitude_with_low_rank_term_falls_monotonically_and_beats_either_part() -> None:
    weight, moment = randn(32, 48), moment_of(inputs(48))
    mask = flat_butterfly((8, 8), 2)
    fit = Magnitude()(weight, BlockSparse(32, 48, mask, rank=4), second_moment=moment)
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(fit.history))
    assert fit.output_error == pytest.approx(fit.history[-1], rel=1e-2)
    for other, format in ((Magnitude(), BlockSparse(32, 48, mask)), (TruncatedSvd(), LowRank(32, 48, 4))):
        worse = other(weight, format, second_moment=moment).output_error
        assert worse is not None
        assert fit.output_error < 0.95 * worse


LARGER = {
    "monarch": (Dao2022Monarch(iterations=0), Dao2022Monarch(), Monarch(48, 64, (3, 4), 4)),
    "monarch permuted": (
        Dao2022Monarch(iterations=0),
        Dao2022Monarch(),
        Monarch(48, 64, (3, 4), 4, permute_output=True),
    ),
    "blast": (Lee2024Blast(metric_iterations=0), Lee2024Blast(), Blast(48, 64, (3, 4), 12)),
    "blast, I > J": (Lee2024Blast(metric_iterations=0), Lee2024Blast(), Blast(48, 64, (6, 4), 12)),
}


@pytest.mark.parametrize(("start", "method", "format"), list(LARGER.values()), ids=list(LARGER))
@pytest.mark.parametrize("seed", [0, 10])
def test_all_of_the_moment_beats_its_diagonal_blocks_and_those_beat_none(
    start: Method, method: Method, format: Format, seed: int
) -> None:
    weight, moment = randn(48, 64, seed=seed), moment_of(inputs(64, seed=seed))
    full, blocks = (one(weight, format, second_moment=moment).output_error for one in (method, start))
    assert full is not None
    assert blocks is not None
    assert full < 0.95 * blocks
    assert blocks < 0.95 * output_error(dense(method(weight, format)), weight, moment)


@pytest.mark.parametrize("name", ["monarch", "monarch permuted", "blast"])
def test_gradient_descent_is_hardly_better(name: str) -> None:
    method, format = WIDE[name]
    weight, moment = randn(12, 18), moment_of(inputs(18))
    errors = [one(weight, format, second_moment=moment).output_error for one in (method, GradientFit(1000, 0.1))]
    assert None not in errors
    assert errors[0] < 1.05 * errors[1]  # pyright: ignore[reportOptionalOperand]


@pytest.mark.parametrize("name", ["monarch", "monarch permuted", "blast"])
def test_more_iterations_are_never_worse_and_take_the_gradient_down(name: str) -> None:
    _, format = WIDE[name]
    weight, moment = randn(12, 18).double(), moment_of(inputs(18))
    errors, slopes = [], []
    for iterations in (0, 1, 5, 60):
        method = Lee2024Blast(metric_iterations=iterations) if name == "blast" else Dao2022Monarch(iterations)
        fit = method(weight, format, second_moment=moment)
        factors = {n: f.clone().requires_grad_() for n, f in fit.factors.items()}
        E = weight - format.to_dense(factors)
        loss = torch.trace(E @ moment @ E.mT) / torch.trace(weight @ moment @ weight.mT)
        grads = torch.autograd.grad(loss, list(factors.values()))
        slopes.append(float(sum((g * f.detach().norm()).norm() for g, f in zip(grads, factors.values(), strict=True))))
        errors.append(fit.output_error)
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert slopes[-1] < 0.4 * slopes[0]  # how far depends on the rounding of the processor


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_blast_matrix_is_all_but_recovered(seed: int) -> None:
    format, moment = Blast(48, 48, 3, rank=4), moment_of(inputs(48))
    weight = format.to_dense(format.init(generator=torch.Generator().manual_seed(seed)))
    fit = Lee2024Blast(sweeps=100)(weight, format, second_moment=moment)
    assert fit.output_error is not None
    assert fit.output_error < 0.04
    best_low_rank = TruncatedSvd()(weight, LowRank(48, 48, 4), second_moment=moment).output_error
    assert best_low_rank is not None
    assert fit.output_error < 0.2 * best_low_rank


@pytest.mark.parametrize("permute", [False, True])
def test_a_monarch_matrix_is_recovered(permute: bool) -> None:
    format = Monarch(24, 36, (3, 4), 2, permute_output=permute)
    weight = format.to_dense(format.init(generator=torch.Generator().manual_seed(0)))
    fit = Dao2022Monarch()(weight, format, second_moment=moment_of(inputs(36)))
    assert fit.output_error is not None
    assert fit.output_error < 1e-4
    torch.testing.assert_close(dense(fit).float(), weight, rtol=0, atol=1e-3 * float(weight.abs().max()))


# The descent under a full metric


def problem(kind: str, two_sided: bool, seed: int = 0) -> Descent:
    """Two weights in whitened coordinates, with ``I, J, P, Q = 2, 3, 5, 4`` and a rank of 3."""
    I, J, P, Q, R = 2, 3, 5, 4, 3
    inputs_moments = prepared(torch.stack([moment_of(inputs(J * Q, seed=k)) for k in range(2)]))
    outputs_moments = prepared(torch.stack([moment_of(inputs(I * P, seed=k + 7)) for k in range(2)]))
    metric = Metric(inputs_moments, outputs_moments if two_sided else None)
    whitened = Whitened.of(randn(2, I * P, J * Q, seed=seed).double(), metric, (I, J))
    if kind == "blast":
        shapes = (2, I, P, R), (2, I, J, R), (2, J, R, Q)
        return BlastDescent(whitened, *(randn(*shape, seed=seed + k).double() for k, shape in enumerate(shapes)))
    left, right = (randn(*shape, seed=seed).double() for shape in ((2, I, J, P, R), (2, I, J, R, Q)))
    return MonarchDescent(whitened, left, right)


def approximation(s: Any, vectors: Tensor) -> Tensor:
    """``W_hat (2, M, N)``, block by block as the definitions of the formats say."""
    factors = s.factors(vectors)
    if len(factors) == 3:
        left, diag, right = factors
        I, J = diag.shape[1:3]
        blocks = [[(left[:, i] * diag[:, None, i, j]) @ right[:, j] for j in range(J)] for i in range(I)]
    else:
        left, right = factors
        I, J = left.shape[1:3]
        blocks = [[left[:, i, j] @ right[:, i, j] for j in range(J)] for i in range(I)]
    return torch.cat([torch.cat(row, -1) for row in blocks], -2)


def loss_of(s: Any, vectors: Tensor) -> Tensor:
    """``tr(G E C E^T)`` of each weight."""
    E, metric = s.whitened.weights - approximation(s, vectors), s.whitened.metric
    G = torch.eye(E.shape[1], dtype=E.dtype) if metric.outputs is None else metric.outputs
    return (G @ E @ metric.inputs @ E.mT).diagonal(dim1=1, dim2=2).sum(1)


KINDS = [
    pytest.param(kind, two, id=f"{kind}, {'two' if two else 'one'}-sided")
    for kind in ("blast", "monarch")
    for two in (False, True)
]


@pytest.mark.parametrize(("kind", "two_sided"), KINDS)
def test_loss_and_gradient_by_their_definitions(kind: str, two_sided: bool) -> None:
    s: Any = problem(kind, two_sided)
    vectors = s.start.clone().requires_grad_()
    expected = loss_of(s, vectors)
    (gradient,) = torch.autograd.grad(expected.sum(), vectors)
    with torch.no_grad():
        torch.testing.assert_close(s.loss(s.start), expected.detach())
        torch.testing.assert_close(2 * s.gradient(s.start), gradient)
    energy = loss_of(s, torch.zeros_like(s.start))
    torch.testing.assert_close(s.relative(expected.detach()), (expected / energy).sqrt().detach())


@torch.no_grad()
@pytest.mark.parametrize(("kind", "two_sided"), KINDS)
def test_the_preconditioner_is_symmetric_and_positive_definite(kind: str, two_sided: bool) -> None:
    s = problem(kind, two_sided)
    s.refresh(s.start)
    a, b = randn(*s.start.shape, seed=1).double(), randn(*s.start.shape, seed=2).double()
    inner = ((a * s.precondition(b)).sum(1), (b * s.precondition(a)).sum(1))
    torch.testing.assert_close(*inner)
    assert ((a * s.precondition(a)).sum(1) > 0).all()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "two_sided"), KINDS)
def test_no_step_raises_a_loss_and_the_end_is_flat(kind: str, two_sided: bool) -> None:
    s = problem(kind, two_sided)
    told: list[int] = []
    s.loss(s.start)
    before = s.gradient(s.start).norm(dim=1)
    found, history = descend(s, s.start, 300, lambda step, loss: told.append(step))
    assert told == list(range(1, len(history) + 1))
    assert (history.diff(dim=0) <= 0).all()
    torch.testing.assert_close(history[-1], s.loss(found))
    assert (s.gradient(found).norm(dim=1) < 1e-2 * before).all()


@torch.no_grad()
@pytest.mark.parametrize(("kind", "two_sided"), KINDS)
def test_the_descent_finds_an_exact_fit_that_is_near(kind: str, two_sided: bool) -> None:
    s: Any = problem(kind, two_sided)
    s.whitened = dataclasses.replace(s.whitened, weights=approximation(s, s.start))
    start = s.start + 0.05 * randn(*s.start.shape, seed=50).double()
    least = descend(s, start, 100, lambda step, loss: None)[1][-1]
    assert (least < 1e-4 * s.loss(start)).all()


@torch.no_grad()
def test_a_weight_whose_loss_cannot_fall_does_not_hold_up_the_others() -> None:
    s: Any = problem("blast", False)
    weights = s.whitened.weights.clone()
    weights[0] = approximation(s, s.start)[0]
    s.whitened = dataclasses.replace(s.whitened, weights=weights)
    history = descend(s, s.start, 30, lambda step, loss: None)[1]
    assert float(history[-1, 0]) == pytest.approx(0, abs=1e-12)
    assert float(history[-1, 1]) < 0.5 * float(history[0, 1])


# Gradients at the output


GRADIENT_METHODS = {
    name: WIDE[name] for name in ("low-rank", "low-rank by gradient", "monarch", "monarch permuted", "blast")
}
GRADIENT_METHODS["gblr"] = (Lee2024Gblr(rounds=8), GaudiGblr.for_budget(12, 18, keep=0.7))


def weighed_error(approximation: Tensor, weight: Tensor, moment: Tensor, gradient: Tensor) -> float:
    E, W = (weight - approximation).double(), weight.double()
    energies = [float(torch.trace(gradient @ A @ moment @ A.mT)) for A in (E, W)]
    return (energies[0] / energies[1]) ** 0.5


@pytest.mark.parametrize(("method", "format"), list(GRADIENT_METHODS.values()), ids=list(GRADIENT_METHODS))
def test_what_matters_to_the_loss_is_fitted_better(method: Method, format: Format) -> None:
    weight, moment = randn(12, 18), moment_of(inputs(18))
    gradient = moment_of(inputs(12, seed=3))
    one, two = (method(weight, format, second_moment=moment, gradient_moment=g) for g in (None, gradient))
    errors = [weighed_error(format.to_dense(fit.factors), weight, moment, gradient) for fit in (one, two)]
    assert errors[1] < 0.97 * errors[0]
    assert one.output_error is not None
    assert two.output_error is not None
    assert one.output_error < two.output_error
    same = method(weight, format, second_moment=moment, gradient_moment=3 * torch.eye(12))
    assert same.output_error == pytest.approx(one.output_error, rel=0.1)


def test_the_two_sided_low_rank_fit_is_the_closed_form() -> None:
    weight, moment, gradient = randn(12, 18), moment_of(inputs(18)), moment_of(inputs(12, seed=3))
    fit = TruncatedSvd()(weight, LowRank(12, 18, 5), second_moment=moment, gradient_moment=gradient)
    left, right = (torch.linalg.cholesky(one + 1e-9 * torch.eye(len(one))) for one in (gradient, moment))
    S = torch.linalg.svdvals(left.mT @ weight.double() @ right)
    expected = (S[5:].square().sum() / S.square().sum()).sqrt()
    found = weighed_error(LowRank(12, 18, 5).to_dense(fit.factors), weight, moment, gradient)
    assert found == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    ("gradient", "message"),
    [
        (torch.eye(18), "expected the moment of the gradients of shape (12, 12), got (18, 18)"),
        (-torch.eye(12), "expected the moment of the gradients to have no negative eigenvalue"),
    ],
)
def test_wrong_moments_of_gradients_are_refused(gradient: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TruncatedSvd()(randn(12, 18), LowRank(12, 18, 2), second_moment=torch.eye(18), gradient_moment=gradient)


def test_moments_of_gradients_need_those_of_inputs() -> None:
    with pytest.raises(ValueError, match="expected second_moments of the inputs beside gradient_moments"):
        TruncatedSvd()(randn(12, 18), LowRank(12, 18, 2), gradient_moment=torch.eye(12))


# Progress


def test_progress_counts_the_sweeps_under_the_metric_too() -> None:
    calls: list[tuple[int, int, tuple[float, ...]]] = []
    method = Lee2024Blast(sweeps=4, metric_iterations=3)
    weight, moment = randn(12, 18), moment_of(inputs(18))
    fit = method(weight, Blast(12, 18, (2, 3), 4), second_moment=moment, progress=lambda *call: calls.append(call))
    assert calls == [(k + 1, 7, (error,)) for k, error in enumerate(fit.history)]
    assert len(fit.history) == 7
    assert fit.output_error == pytest.approx(min(fit.history[4:]), rel=1e-4)

    calls.clear()
    monarch = Dao2022Monarch(iterations=5)(
        weight, Monarch(12, 18, (2, 3), 2), second_moment=moment, progress=lambda *call: calls.append(call)
    )
    assert calls == [(k + 1, 5, (error,)) for k, error in enumerate(monarch.history)]
    assert monarch.output_error == pytest.approx(min(monarch.history), rel=1e-4)


def test_an_aware_fit_costs_more() -> None:
    for method, format in WIDE.values():
        assert method.cost(format, aware=True) > method.cost(format) > 0


# Hard moments


def hard(kind: str, N: int = 18) -> Tensor:
    x = inputs(N)
    if kind == "fewer tokens than dimensions":
        x = x[:5]
    elif kind == "one token":
        x = x[:1]
    elif kind == "dead inputs":
        x[:, [1, 4, 11]] = 0
    elif kind == "a dead block":
        x[:, 6:12] = 0
    elif kind == "enormous channel":
        x[:, 4] *= 1e6
    elif kind == "twins":
        x[:, 5] = x[:, 4]
        x[:, 13] = x[:, 4]
    elif kind == "nothing":
        x = torch.zeros_like(x)
    return moment_of(x)


HARD = (
    "fewer tokens than dimensions", "one token", "dead inputs", "a dead block", "enormous channel", "twins", "nothing",
)  # fmt: skip


@every(WIDE)
@pytest.mark.parametrize("kind", HARD)
def test_hard_moments(method: Method, format: Format, kind: str) -> None:
    weight, moment = randn(12, 18).to(torch.bfloat16 if kind in ("twins", "dead inputs") else torch.float32), hard(kind)
    fit = method(weight, format, second_moment=moment)
    assert all(torch.isfinite(factor).all() for factor in fit.factors.values())
    assert fit.output_error is not None
    assert 0 <= fit.output_error <= 1.01  # the zero matrix has 1
    if kind != "nothing":
        plain = output_error(dense(method(weight, format)), weight, moment)
        assert output_error(dense(fit), weight, moment) < 1.05 * plain + 0.01
    dead = moment.diagonal() == 0
    if dead.any():
        assert float(dense(fit)[:, dead].norm()) < 4 * float(weight[:, dead].float().norm())


@pytest.mark.parametrize("name", [name for name in WIDE if "block" not in name])
def test_few_tokens_are_fitted_almost_exactly(name: str) -> None:
    method, format = WIDE[name]
    fit = method(randn(12, 18), format, second_moment=hard("one token"))
    assert fit.output_error is not None
    assert fit.output_error < 0.05


@every(WIDE)
def test_a_zero_weight(method: Method, format: Format) -> None:
    fit = method(torch.zeros(12, 18), format, second_moment=moment_of(inputs(18)))
    assert fit.output_error == fit.error == 0
    assert not dense(fit).any()


# What is refused


def nan_moment() -> Tensor:
    moment = torch.eye(18)
    moment[2, 3] = torch.nan
    return moment


@pytest.mark.parametrize(
    ("moment", "error", "message"),
    [
        (torch.eye(12), ValueError, "expected the second moment of shape (18, 18), got (12, 12)"),
        (torch.ones(18), ValueError, "expected the second moment of shape (18, 18), got (18,)"),
        (nan_moment(), ValueError, "expected the second moment to be finite, got 1 NaN or infinite of 324 entries"),
        (
            torch.eye(18, dtype=torch.int64),
            TypeError,
            "expected the second moment to be a floating-point tensor, got torch.int64",
        ),
    ],
)
@every(WIDE)
def test_bad_second_moments_are_refused(
    method: Method, format: Format, moment: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        method(randn(12, 18), format, second_moment=moment)


def test_the_refusal_names_the_gram() -> None:
    weights, moments = [randn(12, 18)] * 2, [torch.eye(18), nan_moment()]
    with pytest.raises(ValueError, match="the second moment of 'b' to be finite"):
        TruncatedSvd().fit_many(weights, LowRank(12, 18, 1), second_moments=moments, names=["a", "b"])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_grams_as_weights(count: int) -> None:
    with pytest.raises(ValueError, match=f"expected one second moment for each of 2 weights, got {count}"):
        TruncatedSvd().fit_many([randn(12, 18)] * 2, LowRank(12, 18, 1), second_moments=[torch.eye(18)] * count)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Lee2024Blast(metric_iterations=-1),
            "expected metric_iterations to be an integer of at least 0, got -1",
        ),
        (lambda: Dao2022Monarch(iterations=-1), "expected iterations to be an integer of at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# How the weights enter the whitened coordinates


def test_whitened_coordinates_are_undone() -> None:
    metric = prepared(moment_of(inputs(18))[None])
    root, inverse = roots(metric, 3)
    weight = randn(1, 12, 18).double()
    torch.testing.assert_close(times_blocks(times_blocks(weight, root), inverse), weight, rtol=0, atol=1e-8)
