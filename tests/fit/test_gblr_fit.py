"""Fits of rank-1 blocks: contents, segments, the budget, and what the fit reaches."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import structmat as sm
from structmat.fit import Lee2024Gblr
from structmat.fit.metric import Metric
from structmat.fit.published_gblr import PublishedGblr, longest_runs
from structmat.fit.segments import Segments, best_segments, runs


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def best_run(values: list[float]) -> tuple[float, set[int]]:
    """By trying all of them."""
    n = len(values)
    best: tuple[float, set[int]] = (0.0, set())
    for start in range(n):
        for length in range(1, n + 1):
            places = {(start + k) % n for k in range(length)}
            total = sum(values[p] for p in places)
            if total > best[0] + 1e-12:
                best = (total, places)
    return best


@given(values=st.lists(st.integers(-5, 5), min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_the_best_cyclic_run(values: list[int]) -> None:
    mask = runs(torch.tensor([values], dtype=torch.float64))[0]
    total, _ = best_run([float(v) for v in values])
    places = set(mask.nonzero()[:, 0].tolist())
    assert sum(values[p] for p in places) == total
    begins = int((mask & ~mask.roll(1)).sum())
    assert begins <= 1  # a run


@given(above=st.lists(st.booleans(), min_size=1, max_size=10))
@settings(max_examples=100, deadline=None)
def test_the_longest_cyclic_run(above: list[bool]) -> None:
    begin, length = (int(t) for t in longest_runs(torch.tensor([above]).double() * 2 - 0.5))
    n = len(above)
    mean = sum(2 * a - 0.5 for a in above) / n
    high = [2 * a - 0.5 >= mean for a in above]
    longest = max(k for k in range(n + 1) if any(all(high[(s + i) % n] for i in range(k)) for s in range(n)))
    assert length == longest
    assert all(high[(begin + i) % n] for i in range(length))


@given(seed=st.integers(0, 999), budget=st.integers(2, 60), near=st.one_of(st.none(), st.floats(0.01, 3)))
@settings(max_examples=60, deadline=None)
def test_segments_keep_the_budget_and_use_it(seed: int, budget: int, near: float | None) -> None:
    gains = [torch.rand(2, 5, n, generator=seeded(seed + n)) ** 2 for n in (7, 9)]
    budgets = torch.tensor([budget, budget + 3])
    price = None if near is None else torch.full((2,), near)
    masks, found = best_segments(gains, budgets, price)
    spent = sum(mask.sum((1, 2)) for mask in masks)
    assert (spent <= budgets).all()
    lower, _ = best_segments(gains, torch.tensor([1000, 1000]))
    assert (spent <= sum(mask.sum((1, 2)) for mask in lower)).all()
    for mask, gain in zip(masks, gains, strict=True):
        expected = runs(gain - found[:, None, None])
        alive = mask.any(2, keepdim=True)
        assert torch.equal(mask, expected & alive)


def random_segments(sides: int, seed: int = 0) -> Segments:
    generator = seeded(seed)
    weights = torch.randn(2, 10, 12, generator=generator, dtype=torch.float64)
    samples = torch.randn(2, 12, 30, generator=generator, dtype=torch.float64)
    gradients = torch.randn(2, 10, 30, generator=generator, dtype=torch.float64)
    moments = [samples @ samples.mT / 30, gradients @ gradients.mT / 30 if sides == 2 else None]
    moment = Metric(*moments) if sides else None
    out, inn = (runs(torch.randn(2, 5, n, generator=generator)) for n in (10, 12))
    left = torch.randn(2, 10, 5, generator=generator, dtype=torch.float64) * out.mT
    right = torch.randn(2, 5, 12, generator=generator, dtype=torch.float64) * inn
    return Segments(weights, moment, left, right, out, inn)


def sides_of(segments: Segments) -> tuple[Tensor, Tensor]:
    """``G (2, 10, 10)`` and ``C (2, 12, 12)``."""
    metric = segments.metric
    G, C = (None, None) if metric is None else (metric.outputs, metric.inputs)
    eyes = [torch.eye(n, dtype=torch.float64).expand(2, n, n) for n in (10, 12)]
    return eyes[0] if G is None else G, eyes[1] if C is None else C


def least_squares(segments: Segments, b: int, axis: int) -> Tensor:
    """The best contents on one axis with the other fixed, by one dense system over the entries inside."""
    mask = segments.out[b].mT if axis == 0 else segments.inn[b]
    W = segments.weights[b]
    G, C = sides_of(segments)
    before, root = torch.linalg.cholesky(G[b]).mT, torch.linalg.cholesky(C[b])
    columns = []
    for i, j in mask.nonzero().tolist():
        if axis == 0:
            basis = torch.zeros_like(W)
            basis[i] = segments.right[b, j]
        else:
            basis = segments.left[b, :, i, None] * torch.eye(12, dtype=torch.float64)[j]
        columns.append((before @ basis @ root).flatten())
    solution = torch.linalg.lstsq(
        torch.stack(columns, 1), (before @ W @ root).flatten()[:, None], driver="gelsd"
    ).solution
    best = torch.zeros(mask.shape, dtype=torch.float64)
    best[mask] = solution[:, 0]
    return best


@pytest.mark.parametrize("sides", [0, 1, 2])
def test_a_sweep_goes_to_the_least_squares_contents(sides: int) -> None:
    segments = random_segments(sides)
    expected = least_squares(segments, 1, 0)
    before = segments.errors()
    once = dataclasses.replace(segments)
    once.sweep(1.0, 60)
    product = once.left[1] @ once.right[1]
    after_left = dataclasses.replace(segments, left=torch.stack([segments.left[0], expected]))
    right = least_squares(after_left, 1, 1)
    torch.testing.assert_close(product, expected @ right, rtol=1e-5, atol=1e-6)
    assert (once.errors() < before).all()
    assert (once.left[~segments.out.mT] == 0).all()
    assert (once.right[~segments.inn] == 0).all()


@pytest.mark.parametrize("sides", [0, 1, 2])
def test_errors_are_those_of_the_residual(sides: int) -> None:
    segments = random_segments(sides)
    rest = segments.weights - segments.left @ segments.right
    G, C = sides_of(segments)
    energies = [(G @ matrix @ C @ matrix.mT).diagonal(dim1=1, dim2=2).sum(1) for matrix in (rest, segments.weights)]
    torch.testing.assert_close(segments.errors(), (energies[0] / energies[1]).sqrt())


def test_births_lower_the_error_within_the_budget() -> None:
    segments = random_segments(0)
    segments.out[:, 2:], segments.inn[:, 2:] = False, False
    segments.left, segments.right = segments.left * segments.out.mT, segments.right * segments.inn
    segments.sweep(1.0, 40)
    budget = segments.costs() + torch.tensor([24, 3])
    before, first = segments.errors(), segments.left[:, :, :2].clone()
    segments.bear(budget, [seeded(0), seeded(1)])
    assert segments.errors()[0] < before[0]
    assert (segments.costs() <= budget).all()
    assert torch.equal(segments.left[:, :, :2], first)


WEIGHTS = {
    "square": (24, 24), "wide": (16, 40), "tall": (40, 16), "odd": (12, 28)
}  # fmt: skip


@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("aware", [False, True])
def test_the_fit_keeps_the_budget_and_beats_low_rank(shape: tuple[int, int], multiple: int, aware: bool) -> None:
    M, N = shape
    weight = torch.randn(M, N, generator=seeded(1))
    samples = torch.randn(N, 3 * N, generator=seeded(2)) * torch.logspace(-1, 1, N)[:, None]
    moment = samples @ samples.T if aware else None
    format = sm.GaudiGblr.for_budget(M, N, keep=0.6, multiple=multiple, components=min(M, N) // 2)
    fit = Lee2024Gblr()(weight, format, second_moment=moment)
    format.check_factors(fit.factors)
    assert format.num_parameters(fit.factors) <= format.num_parameters() <= 0.6 * M * N
    hard, hardened = sm.formats.harden(format, fit.factors)
    torch.testing.assert_close(hard.to_dense(hardened), format.to_dense(fit.factors), rtol=1e-3, atol=1e-4)
    starts, widths = format.segments(fit.factors)
    for n, start, width in zip(shape, starts, widths, strict=True):
        assert ((start % multiple == 0) & (width % multiple == 0) & (start < n)).all()
    rank = sm.LowRank(M, N, format.num_parameters() // (M + N))
    low_rank = sm.fit.TruncatedSvd()(weight, rank, second_moment=moment)
    ours, theirs = (f.error if moment is None else f.output_error for f in (fit, low_rank))
    assert ours is not None
    assert theirs is not None
    assert ours <= theirs * (1 + 1e-4)


def test_blocks_are_found() -> None:
    """Blocks on no grid, which fit the budget exactly, are found."""
    weight = torch.zeros(48, 48)
    for row, column, size in ((3, 30, 14), (25, 2, 12), (38, 38, 9)):
        weight[row : row + size, column : column + size] = torch.randn(size, 2, generator=seeded(row)) @ torch.randn(
            2, size, generator=seeded(column)
        )
    exact = 2 * 2 * (14 + 12 + 9)
    format = sm.GaudiGblr.for_budget(48, 48, keep=1.15 * exact / 48**2, components=12)
    error = Lee2024Gblr(rounds=60)(weight, format).error
    rank = format.num_parameters() // 96
    assert error < 0.3
    assert sm.fit.TruncatedSvd()(weight, sm.LowRank(48, 48, rank)).error > 0.7


def test_published_keeps_the_budget_and_learns() -> None:
    weight = torch.randn(20, 30, generator=seeded(0))
    format = sm.GaudiGblr.for_budget(20, 30, keep=0.6)
    progress: list[Any] = []
    fit = Lee2024Gblr.published(steps=150)(weight, format, progress=lambda *args: progress.append(args))
    assert isinstance(Lee2024Gblr.published(), PublishedGblr)
    assert format.num_parameters(fit.factors) <= format.num_parameters()
    assert fit.history[-1] < fit.history[0]
    assert len(progress) == 150
    samples = torch.randn(30, 90, generator=seeded(2)) * torch.logspace(-1, 1, 30)[:, None]
    aware = Lee2024Gblr.published(steps=150)(weight, format, second_moment=samples @ samples.T)
    assert aware.output_error is not None
    plain_output = Lee2024Gblr.published(steps=150)(
        weight, format, second_moment=samples @ samples.T * 0 + torch.eye(30)
    )
    assert plain_output.error == pytest.approx(fit.error, rel=0.1)  # Adam is chaotic


def test_a_batch_is_what_each_weight_alone_gives() -> None:
    weights = [torch.randn(18, 18, generator=seeded(k)) for k in range(3)]
    format = sm.GaudiGblr.for_budget(18, 18, keep=0.7, components=9)
    together = Lee2024Gblr(rounds=8).fit_many(weights, format)
    assert [f.error for f in together] == pytest.approx(
        [Lee2024Gblr(rounds=8)(w, format).error for w in weights], rel=1e-3
    )


def test_a_zero_weight_and_one_entry() -> None:
    format = sm.GaudiGblr.for_budget(12, 12, keep=0.5, components=6)
    assert Lee2024Gblr()(torch.zeros(12, 12), format).error == 0
    one = torch.zeros(12, 12)
    one[3, 4] = 5.0
    assert Lee2024Gblr()(one, format).error < 1e-3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Lee2024Gblr(rounds=0), "expected rounds to be an integer of at least 1, got 0"),
        (lambda: Lee2024Gblr(start=0.0), r"expected start to be in \(0, 1\], got 0\.0"),
        (lambda: Lee2024Gblr(free=1.0), r"expected free in \[0, 1\), got 1\.0"),
        (lambda: Lee2024Gblr(step=2.0), r"expected a step in \(0, 2\), beyond which the sweeps diverge, got 2\.0"),
        (lambda: PublishedGblr(steps=0), "expected steps to be an integer of at least 1, got 0"),
        (lambda: PublishedGblr(learning_rate=0), "expected a positive learning_rate, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_network_is_compressed_and_hardened() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.GELU(), torch.nn.Linear(24, 24))
    x = torch.randn(200, 24, generator=seeded(0))
    dense = model(x).detach()
    plan = sm.make_plan(model, {r".*": sm.GaudiGblr}, keep=0.7)
    fits = sm.compress_(model, plan, batches=[x[:100], x[100:]], progress=False)
    assert all(fit.output_error is not None for fit in fits.values())
    before = model(x).detach()
    sm.harden_(model)
    torch.testing.assert_close(model(x).detach(), before, rtol=1e-3, atol=1e-4)
    assert (before - dense).norm() < 0.8 * dense.norm()
    assert sum(layer.format.num_parameters() for layer in (model[0], model[2])) <= 0.7 * 2 * 24 * 24
