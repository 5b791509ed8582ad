"""Fits of single weights: optimality, error, batches, hard inputs, and what is refused."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from structmat import Blast, BlockDiagonal, BlockSparse, Dense, Fit, Format, LowRank, Monarch, default_method
from structmat.fit import DEFAULT_METHODS, Dao2022Monarch, GradientFit, Lee2024Blast, Magnitude, Method, TruncatedSvd
from structmat.formats import FORMATS, Factors, FactorSpec, flat_butterfly, register_format

FAST_GRADIENT = GradientFit(steps=250, learning_rate=0.1)
BUTTERFLY = flat_butterfly((3, 3), 1)


@dataclass(frozen=True)
class Scaling(Format):
    """A format that the library does not know: one number times the matrix of ones."""

    name: ClassVar[str] = "scaling"
    scale_exponents: ClassVar[dict[str, float]] = {"number": 1.0}

    def factor_specs(self) -> dict[str, FactorSpec]:
        return {"number": FactorSpec((1,))}

    def to_dense(self, factors: Factors) -> Tensor:
        return factors["number"].expand(self.M, self.N)

    @classmethod
    def for_budget(cls, M: int, N: int, *, keep: float, **options: Any) -> Format:
        return cls(M, N)


def pairs(M: int, N: int, blocks: tuple[int, int]) -> dict[str, tuple[Method, Format]]:
    """Every method with every format that it fits, for one shape."""
    formats = {
        "low-rank": LowRank(M, N, 5),
        "block-diagonal": BlockDiagonal(M, N, 3),
        "block-sparse": BlockSparse(M, N, BUTTERFLY),
        "block-sparse low-rank": BlockSparse(M, N, BUTTERFLY, 2),
        "monarch": Monarch(M, N, blocks, 2),
        "monarch permuted": Monarch(M, N, blocks, 2, permute_output=True),
        "blast": Blast(M, N, blocks, 4),
    }
    found: dict[str, tuple[Method, Format]] = {n: (default_method(f), f) for n, f in formats.items()}
    found["low-rank randomised"] = (TruncatedSvd(randomized=True), formats["low-rank"])
    found["blast by conjugate gradients"] = (Lee2024Blast(direct_rank=0), formats["blast"])
    found["blast published"] = (Lee2024Blast.published(sweeps=50), formats["blast"])
    found |= {f"{n} by gradient": (FAST_GRADIENT, f) for n, f in {**formats, "dense": Dense(M, N)}.items()}
    return found


WIDE, TALL = pairs(12, 18, (2, 3)), pairs(18, 12, (3, 2))
PAIRS = {f"{name}, wide": pair for name, pair in WIDE.items()}
PAIRS |= {f"{name}, tall": pair for name, pair in TALL.items() if "gradient" not in name}


def every_pair(cases: dict[str, tuple[Method, Format]]):
    return pytest.mark.parametrize(("method", "format"), list(cases.values()), ids=list(cases))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(fit: Fit) -> Tensor:
    return fit.format.to_dense({name: factor.double() for name, factor in fit.factors.items()})


def relative_error(fit: Fit, weight: Tensor) -> float:
    return float((weight.double() - dense(fit)).norm() / weight.double().norm())


# What each method promises


@pytest.mark.parametrize("shape", [(12, 18), (18, 12), (15, 15)])
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_svd_error_is_the_tail_of_the_spectrum(shape: tuple[int, int], rank: int) -> None:
    weight = randn(*shape).double()
    energy = torch.linalg.svdvals(weight).square()
    expected = float((energy[rank:].sum() / energy.sum()).sqrt())
    assert TruncatedSvd(randomized=False)(weight, LowRank(*shape, rank)).error == pytest.approx(expected, rel=1e-10)


def test_randomized_svd_is_within_a_percent_of_the_exact_one() -> None:
    U, _, V = torch.linalg.svd(randn(200, 240), full_matrices=False)
    weight = U * torch.arange(1, 201).pow(-0.5) @ V
    exact, sketched = (TruncatedSvd(randomized=r)(weight, LowRank(200, 240, 12)).error for r in (False, True))
    assert exact <= sketched * (1 + 1e-6)
    assert sketched < 1.01 * exact


def test_more_power_iterations_come_closer() -> None:
    weight, format = randn(100, 120), LowRank(100, 120, 4)
    rough, fine = (TruncatedSvd(True, oversample=0, power_iterations=k)(weight, format).error for k in (0, 8))
    assert fine < rough


@pytest.mark.parametrize(
    ("format", "expected"),
    [
        (LowRank(512, 512, 32), True),
        (LowRank(512, 512, 33), False),
        (LowRank(4096, 511, 1), False),
        (LowRank(4096, 1024, 64), True),
        (LowRank(4096, 1024, 65), False),
    ],
)
def test_is_randomized_rule(format: LowRank, expected: bool) -> None:
    assert TruncatedSvd().is_randomized(format) is expected
    assert TruncatedSvd(randomized=True).is_randomized(format) is True
    assert TruncatedSvd(randomized=False).is_randomized(format) is False


def test_svd_splits_the_scale_evenly() -> None:
    fit = TruncatedSvd()(randn(12, 18), LowRank(12, 18, 5))
    torch.testing.assert_close(fit.factors["left"].norm(dim=0), fit.factors["right"].norm(dim=1))


@pytest.mark.parametrize("shape", [(12, 18), (18, 12)])
def test_magnitude_copies_the_blocks(shape: tuple[int, int]) -> None:
    weight = randn(*shape)
    for format in (BlockDiagonal(*shape, 3), BlockSparse(*shape, ("101", "010", "110"))):
        ones = format.to_dense({"blocks": torch.ones(format.factor_specs()["blocks"].shape)})
        fit = Magnitude()(weight, format)
        torch.testing.assert_close(format.to_dense(fit.factors), weight * ones)
        assert fit.error == pytest.approx(float((weight * (1 - ones)).norm() / weight.norm()), rel=1e-5)


def test_magnitude_with_low_rank_term_falls_monotonically_and_beats_either_part() -> None:
    weight = randn(32, 4) @ randn(4, 48, seed=1) + randn(32, 48, seed=2)
    mask = flat_butterfly((8, 8), 2)
    fit = Magnitude()(weight, BlockSparse(32, 48, mask, rank=6))
    assert len(fit.history) > 2
    assert all(after <= before * (1 + 1e-6) for before, after in zip(fit.history, fit.history[1:], strict=False))
    assert fit.error == pytest.approx(fit.history[-1], rel=1e-5)
    assert fit.error < 0.95 * Magnitude()(weight, BlockSparse(32, 48, mask)).error
    assert fit.error < 0.95 * TruncatedSvd()(weight, LowRank(32, 48, 6)).error


@pytest.mark.parametrize("mask", [("10", "01"), flat_butterfly((4, 4), 1), flat_butterfly((8, 8), 2)], ids=str)
def test_magnitude_with_low_rank_term_does_not_stop_at_a_saddle(mask: tuple[str, ...]) -> None:
    weight, format = randn(32, 48), BlockSparse(32, 48, mask, rank=4)
    assert Magnitude()(weight, format).error < 1.01 * GradientFit(steps=600, learning_rate=0.1)(weight, format).error


def test_magnitude_stops_early_where_nothing_is_left_to_gain() -> None:
    weight, format = randn(12, 18), BlockSparse(12, 18, ("111", "111"), rank=2)
    assert len(Magnitude(rounds=30)(weight, format).history) < 30
    assert len(Magnitude(rounds=1)(weight, format).history) == 1


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("blocks", [(3, 3), (3, 4), (6, 2)])
def test_monarch_recovers_a_monarch_matrix(blocks: tuple[int, int], permute: bool) -> None:
    format = Monarch(24, 36, blocks, 2, permute_output=permute)
    weight = format.to_dense(format.init(generator=torch.Generator().manual_seed(0)))
    assert Dao2022Monarch()(weight, format).error < 1e-5
    if blocks != (3, 3):  # the other row order is not Monarch
        assert Dao2022Monarch()(weight, Monarch(24, 36, blocks, 2, permute_output=not permute)).error > 0.1


@pytest.mark.parametrize("permute", [False, True])
def test_monarch_error_is_that_of_the_best_blocks(permute: bool) -> None:
    (I, J), (P, Q), t = (2, 3), (6, 6), 2
    weight = randn(I * P, J * Q).double()
    tail = 0.0
    for i in range(I):
        for j in range(J):
            rows = weight[i::I] if permute else weight[i * P : (i + 1) * P]
            tail += float(torch.linalg.svdvals(rows[:, j * Q : (j + 1) * Q])[t:].square().sum())
    fit = Dao2022Monarch()(weight, Monarch(12, 18, (I, J), t, permute_output=permute))
    assert fit.error == pytest.approx((tail / float(weight.square().sum())) ** 0.5, rel=1e-10)


@pytest.mark.parametrize("permute", [False, True])
def test_nothing_near_beats_the_monarch_fit_nor_does_gradient_descent(permute: bool) -> None:
    weight, format = randn(12, 18), Monarch(12, 18, (2, 3), 2, permute_output=permute)
    best = Dao2022Monarch()(weight, format)
    for seed in range(5):
        for size in (1e-2, 1e-1):
            moved = {n: f + size * randn(*f.shape, seed=seed) for n, f in best.factors.items()}
            assert relative_error(Fit(format, moved, 0.0), weight) > best.error
    assert FAST_GRADIENT(weight, format).error > best.error - 1e-3


GRADIENT_CASES = {name: pair for name, pair in WIDE.items() if "gradient" not in name and "blast " not in name}


@every_pair(GRADIENT_CASES)
def test_gradient_fit_comes_close_to_the_other_methods(method: Method, format: Format) -> None:
    weight = randn(12, 18)
    assert GradientFit(steps=600, learning_rate=0.1)(weight, format).error < 1.05 * method(weight, format).error


def test_gradient_fit_fits_a_format_without_a_method() -> None:
    weight = 3 + 0.1 * randn(12, 18)
    fit = FAST_GRADIENT(weight, Scaling(12, 18))
    assert float(fit.factors["number"]) == pytest.approx(float(weight.mean()), rel=1e-3)


def test_gradient_fit_keeps_the_best_it_met() -> None:
    fit = GradientFit(steps=6, learning_rate=2)(randn(12, 18), LowRank(12, 18, 5))  # so fast that it gets worse
    assert fit.history[-1] > min(fit.history)
    assert fit.error == pytest.approx(min(fit.history), rel=1e-5)


# What every fit promises


@every_pair(PAIRS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_error_is_that_of_the_factors(method: Method, format: Format, dtype: torch.dtype) -> None:
    weight = randn(*format.shape).to(dtype)
    fit = method(weight, format)
    format.check_factors(fit.factors)
    assert {factor.dtype for factor in fit.factors.values()} == {dtype}
    assert not any(factor.requires_grad for factor in fit.factors.values())
    assert fit.format == format
    assert fit.error == pytest.approx(relative_error(fit, weight), rel=1e-5, abs=1e-6)


@every_pair(PAIRS)
def test_weight_is_left_alone_and_a_second_fit_is_the_same(method: Method, format: Format) -> None:
    weight = torch.nn.Parameter(randn(*format.shape))
    before = weight.detach().clone()
    first, second = method(weight, format), method(weight, format)
    assert torch.equal(weight.detach(), before)
    assert all(torch.equal(first.factors[name], second.factors[name]) for name in first.factors)
    assert (first.error, first.history) == (second.error, second.history)
    for factor in first.factors.values():
        factor.zero_()
    assert torch.equal(weight.detach(), before)


@every_pair({n: p for n, p in WIDE.items() if "randomised" in n or "gradient" in n or "blast" in n})
def test_another_seed_is_another_start(method: Method, format: Format) -> None:
    weight = randn(12, 18)
    other = dataclasses.replace(method, seed=1)
    assert not all(torch.equal(f, other(weight, format).factors[n]) for n, f in method(weight, format).factors.items())


@every_pair(WIDE)
def test_many_together_are_as_each_alone(method: Method, format: Format) -> None:
    # the first is fitted exactly by most formats, so that a batch must not stop or go on with it
    weights = [torch.ones(12, 18), randn(12, 18), 1e3 * randn(12, 18, seed=1), torch.zeros(12, 18)]
    for weight, together in zip(weights, method.fit_many(weights, format), strict=True):
        alone = method(weight, format)
        assert together.error == pytest.approx(alone.error, rel=1e-3, abs=1e-5)
        size = float(weight.norm())
        torch.testing.assert_close(dense(together), dense(alone), rtol=0, atol=2e-3 * max(size, 1e-12))


@pytest.mark.parametrize("name", ["block-sparse low-rank", "blast", "blast published", "low-rank by gradient"])
def test_history_of_one_weight_does_not_depend_on_the_others(name: str) -> None:
    method, format = WIDE[name]
    weights = [torch.ones(12, 18), randn(12, 18)]
    for weight, together in zip(weights, method.fit_many(weights, format), strict=True):
        assert together.history == pytest.approx(method(weight, format).history, rel=1e-2, abs=1e-3)


def test_a_batch_stops_each_weight_by_itself() -> None:
    method, format = Magnitude(tolerance=1e-3), BlockSparse(32, 48, flat_butterfly((8, 8), 2), rank=6)
    weights = [torch.ones(32, 48), randn(32, 48)]
    together, alone = method.fit_many(weights, format), [method(weight, format) for weight in weights]
    assert [len(fit.history) for fit in together] == [len(fit.history) for fit in alone]
    assert len(alone[0].history) != len(alone[1].history)
    assert together[1].error == pytest.approx(alone[1].error, rel=1e-5)


def test_no_weights_give_no_fits() -> None:
    assert TruncatedSvd().fit_many([], LowRank(4, 4, 1)) == []


ITERATIVE = {
    "low-rank by gradient": (GradientFit(steps=7), 7),
    "blast": (Lee2024Blast(sweeps=7), 7),
    "blast published": (Lee2024Blast.published(sweeps=7), 7),
}


@pytest.mark.parametrize("name", ITERATIVE)
def test_progress_sees_every_iteration(name: str) -> None:
    method, count = ITERATIVE[name]
    calls: list[tuple[int, int, tuple[float, ...]]] = []
    fit = method(randn(12, 18), WIDE[name][1], progress=lambda *call: calls.append(call))
    assert len(fit.history) == count
    assert calls == [(k + 1, count, (error,)) for k, error in enumerate(fit.history)]


def test_progress_of_magnitude_ends_with_its_history() -> None:
    calls: list[tuple[int, int, tuple[float, ...]]] = []
    method, format = WIDE["block-sparse low-rank"]
    fit = method(randn(12, 18), format, progress=lambda *call: calls.append(call))
    assert calls == [(k + 1, method.rounds, (error,)) for k, error in enumerate(fit.history)]


def test_progress_names_the_error_of_each_weight() -> None:
    calls: list[tuple[float, ...]] = []
    weights = [randn(12, 18), randn(12, 18, seed=1)]
    fits = Lee2024Blast(sweeps=3).fit_many(
        weights, WIDE["blast"][1], progress=lambda _, __, errors: calls.append(errors)
    )
    assert calls == list(zip(fits[0].history, fits[1].history, strict=True))


@pytest.mark.parametrize("name", [*ITERATIVE, "block-sparse low-rank"])
def test_an_exception_from_progress_ends_the_fit(name: str) -> None:
    calls: list[int] = []

    def stop(step: int, steps: int, errors: tuple[float, ...]) -> None:
        calls.append(step)
        raise KeyboardInterrupt

    method, format = WIDE[name]
    with pytest.raises(KeyboardInterrupt):
        method(randn(12, 18), format, progress=stop)
    assert calls == [1]


def test_closed_forms_have_no_history() -> None:
    for name in ("low-rank", "block-diagonal", "block-sparse", "monarch"):
        method, format = WIDE[name]
        assert method(randn(12, 18), format).history == ()


# Hard weights


@every_pair(PAIRS)
def test_zero_matrix(method: Method, format: Format) -> None:
    fit = method(torch.zeros(format.shape), format)
    assert fit.error == 0
    assert all(torch.isfinite(factor).all() for factor in fit.factors.values())
    assert not dense(fit).any()


EXACT = {name: pair for name, pair in PAIRS.items() if "gradient" not in name}
PATTERN_ONLY = ("block-diagonal", "block-sparse,")


@every_pair(EXACT)
@pytest.mark.parametrize("kind", ["rank one", "constant"])
def test_rank_one_and_constant_matrices(method: Method, format: Format, kind: str) -> None:
    M, N = format.shape
    weight = randn(M, 1) @ randn(1, N, seed=1) if kind == "rank one" else torch.full((M, N), -2.5)
    fit = method(weight, format)
    assert fit.error == pytest.approx(relative_error(fit, weight), rel=1e-3, abs=1e-6)
    if isinstance(format, BlockDiagonal) or (isinstance(format, BlockSparse) and not format.rank):
        pattern = format.to_dense({n: torch.ones(s.shape) for n, s in format.factor_specs().items()})
        assert fit.error == pytest.approx(float((weight * (1 - pattern)).norm() / weight.norm()), rel=1e-5)
    elif isinstance(method, Lee2024Blast):
        assert fit.error < 1e-2
    else:
        assert fit.error < 1e-5


@every_pair({name: pair for name, pair in PAIRS.items() if "gradient" in name and "dense" not in name})
def test_gradient_fit_of_a_rank_one_matrix(method: Method, format: Format) -> None:
    M, N = format.shape
    weight = randn(M, 1) @ randn(1, N, seed=1)
    fit = method(weight, format)
    assert fit.error == pytest.approx(relative_error(fit, weight), rel=1e-3, abs=1e-6)
    assert fit.error < default_method(format)(weight, format).error + 0.02


FULL = {
    "low-rank": (TruncatedSvd(), LowRank(12, 18, 12), 1e-5),
    "low-rank randomised": (TruncatedSvd(randomized=True), LowRank(12, 18, 12), 1e-5),
    "block-diagonal": (Magnitude(), BlockDiagonal(12, 18, 1), 1e-6),
    "block-sparse": (Magnitude(), BlockSparse(12, 18, ("111", "111")), 1e-6),
    "block-sparse low-rank": (Magnitude(), BlockSparse(12, 18, ("110", "011"), 12), 1e-5),
    "monarch": (Dao2022Monarch(), Monarch(12, 18, (2, 3), 6), 1e-5),
    "monarch permuted": (Dao2022Monarch(), Monarch(12, 18, (2, 3), 6, permute_output=True), 1e-5),
    "blast": (Lee2024Blast(), Blast(12, 18, (2, 3), 18), 1e-3),
    "low-rank by gradient": (FAST_GRADIENT, LowRank(12, 18, 12), 1e-2),
    "dense by gradient": (FAST_GRADIENT, Dense(12, 18), 1e-3),
}


@pytest.mark.parametrize(("method", "format", "tolerance"), list(FULL.values()), ids=list(FULL))
def test_a_format_that_holds_any_matrix_recovers_the_weight(method: Method, format: Format, tolerance: float) -> None:
    weight = randn(12, 18)
    fit = method(weight, format)
    assert fit.error < tolerance
    assert relative_error(fit, weight) < tolerance


@every_pair(PAIRS)
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])  # about 1e-30 and 1e+30; powers of two round nothing
def test_error_does_not_depend_on_the_scale(method: Method, format: Format, scale: float) -> None:
    weight = randn(*format.shape)
    fit = method(weight * scale, format)
    assert all(torch.isfinite(factor).all() for factor in fit.factors.values())
    assert fit.error == pytest.approx(relative_error(fit, weight * scale), rel=1e-4, abs=1e-6)
    assert fit.error == pytest.approx(method(weight, format).error, rel=1e-3, abs=1e-5)


@every_pair(PAIRS)
def test_small_bfloat16_weight(method: Method, format: Format) -> None:
    weight = (1e-6 * randn(*format.shape)).bfloat16()
    fit = method(weight, format)
    assert all(torch.isfinite(factor).all() for factor in fit.factors.values())
    assert fit.error == pytest.approx(relative_error(fit, weight), rel=1e-4, abs=1e-6)
    assert fit.error == pytest.approx(method(weight.float(), format).error, abs=0.02)


# What is refused


@every_pair(WIDE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused(method: Method, format: Format, value: float) -> None:
    weight = randn(12, 18)
    weight[3, 4] = value
    with pytest.raises(
        ValueError, match="expected the weight to be finite, got 1 NaN or infinite of 216 entries; repair"
    ):
        method(weight, format)


def test_the_refusal_names_the_weight() -> None:
    bad = torch.full((12, 18), torch.nan)
    with pytest.raises(ValueError, match="the weight 'b' to be finite"):
        TruncatedSvd().fit_many([randn(12, 18), bad], LowRank(12, 18, 1), names=["a", "b"])


def test_other_shapes_are_refused() -> None:
    message = re.escape("expected the weight of shape (12, 18), got (18, 12)")
    with pytest.raises(ValueError, match=message):
        TruncatedSvd()(randn(18, 12), LowRank(12, 18, 1))


@pytest.mark.parametrize(
    ("weight", "got"), [(torch.ones(12, 18, dtype=torch.int64), "torch.int64"), ([[1.0] * 18] * 12, "list")]
)
def test_other_types_are_refused(weight: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"the weight to be a floating-point tensor, got {got}"):
        TruncatedSvd()(weight, LowRank(12, 18, 1))


@pytest.mark.parametrize(
    ("method", "format", "known"),
    [
        (TruncatedSvd(), BlockDiagonal(12, 18, 3), r"TruncatedSvd can fit \(LowRank\), got BlockDiagonal"),
        (Magnitude(), LowRank(12, 18, 3), r"Magnitude can fit \(BlockDiagonal, BlockSparse\), got LowRank"),
        (Dao2022Monarch(), Blast(12, 18, 2, 3), r"Dao2022Monarch can fit \(Monarch\), got Blast"),
        (Lee2024Blast(), Monarch(12, 18, 2, 3), r"Lee2024Blast can fit \(Blast\), got Monarch"),
        (GradientFit(), LowRank, r"GradientFit can fit \(Format\), got <class"),
    ],
)
def test_other_formats_are_refused(method: Method, format: Any, known: str) -> None:
    with pytest.raises(TypeError, match=f"expected a format that {known}"):
        method(randn(12, 18), format)


def test_mixed_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected weights of one dtype on one device, got several"):
        TruncatedSvd().fit_many([randn(12, 18), randn(12, 18).double()], LowRank(12, 18, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TruncatedSvd(oversample=-1), "expected oversample to be an integer of at least 0, got -1"),
        (lambda: TruncatedSvd(power_iterations=-1), "expected power_iterations to be an integer of at least 0"),
        (lambda: Magnitude(rounds=0), "expected rounds to be an integer of at least 1, got 0"),
        (lambda: GradientFit(steps=0), "expected steps to be an integer of at least 1, got 0"),
        (lambda: GradientFit(learning_rate=0), "expected a positive learning_rate, got 0"),
        (lambda: GradientFit(learning_rate=float("nan")), "expected a positive learning_rate, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_default_methods() -> None:
    assert {format.__name__: type(method).__name__ for format, method in DEFAULT_METHODS.items()} == {
        "LowRank": "TruncatedSvd",
        "BlockDiagonal": "Magnitude",
        "BlockSparse": "Magnitude",
        "Monarch": "Dao2022Monarch",
        "Blast": "Lee2024Blast",
        "GaudiGblr": "Lee2024Gblr",
    }
    assert default_method(LowRank(4, 4, 1)) == TruncatedSvd()
    assert all(issubclass(format, method.formats) for format, method in DEFAULT_METHODS.items())


@pytest.mark.parametrize("format", [Dense(4, 4), Scaling(4, 4)])
def test_a_format_without_an_entry_in_the_table_is_fitted_by_gradient_descent(format: Format) -> None:
    assert default_method(format) == GradientFit()


def test_a_format_is_registered_with_its_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FORMATS, "scaling", raising=False)
    monkeypatch.setitem(DEFAULT_METHODS, Scaling, GradientFit())  # undone in the end
    monkeypatch.setitem(FORMATS, "scaling", Scaling)
    register_format(Scaling, method=GradientFit(steps=7))
    assert default_method(Scaling(4, 4)) == GradientFit(steps=7)


def test_the_published_algorithm_is_the_default_where_the_paper_says_no_more() -> None:
    assert TruncatedSvd.published() == TruncatedSvd()
    assert default_method(Blast(4, 4, 2, 1)).published() == Lee2024Blast.published()


def test_magnitude_refuses_a_negative_tolerance() -> None:
    with pytest.raises(ValueError, match="tolerance to be at least 0, got -1"):
        Magnitude(tolerance=-1)


def test_a_computation_that_is_not_finite_names_its_batch() -> None:
    exploding = Lee2024Blast(start=1e30, sweeps=1)
    with pytest.raises(
        FloatingPointError, match=r"not finite, for weights \[0\] of its batch; .* the batch is \['a'\]"
    ):
        exploding.fit_many([randn(8, 8)], Blast(8, 8, (2, 2), 2), names=["a"])
