"""The Gaudi mask, and the matrices that are learned and hardened under it."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import structmat as sm
from structmat.formats import Factors, Format
from structmat.ops import gaudi_mask, tiling

INFINITE = torch.full((1,), torch.inf, dtype=torch.float64)
real = st.floats(0, 1, allow_nan=False)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def boxcar(start: int, width: int, n: int) -> Tensor:
    mask = torch.zeros(n, dtype=torch.float64)
    mask[(start + torch.arange(width)) % n] = 1
    return mask


def plain_mask(width: float, location: float, sigma: float, n: int) -> Tensor:
    """The formula of Gaudi-GBLR, section 3, one frequency after the other."""
    t = torch.arange(n, dtype=torch.float64)
    mask = torch.full((n,), width, dtype=torch.float64)
    for k in range(1, n // 2 + 1):
        sinc = math.sin(math.pi * k * width) / (math.pi * k * width) if width else 1.0
        amplitude = width * sinc / (math.sin(math.pi * k / n) / (math.pi * k / n)) * math.exp(-(k**2) / (2 * sigma**2))
        angle = 2 * math.pi * k * t / n - math.pi * k * (width - 1 / n) - 2 * math.pi * k * location
        mask += (1 if 2 * k == n else 2) * amplitude * torch.cos(angle)
    return mask


@given(n=st.integers(1, 40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_on_the_grid_without_smoothing_the_mask_is_a_cyclic_boxcar(n: int, data: st.DataObject) -> None:
    start, width = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n))
    mask = gaudi_mask(doubles(width / n), doubles(start / n), INFINITE, n)
    torch.testing.assert_close(mask[0], boxcar(start, width, n), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [768, 3071])
def test_the_boxcar_is_exact_to_float_precision_in_float32(n: int) -> None:
    start, width = torch.arange(0, n, 37), torch.arange(0, n, 37).flip(0)
    masks = gaudi_mask((width / n).float(), (start / n).float(), INFINITE.float(), n)
    expected = torch.stack([boxcar(int(s), int(w), n) for s, w in zip(start, width, strict=True)])
    # a float32 width is off the grid by up to 2^-25, which every one of the n/2 frequencies sees
    torch.testing.assert_close(masks.double(), expected, rtol=0, atol=5e-4)


@given(n=st.integers(1, 33), width=real, location=st.floats(-2, 2), sigma=st.sampled_from([0.5, 3.0, 50.0, math.inf]))
@settings(max_examples=80, deadline=None)
def test_the_mask_is_the_papers_formula(n: int, width: float, location: float, sigma: float) -> None:
    mask = gaudi_mask(doubles(width), doubles(location), doubles(sigma), n)
    torch.testing.assert_close(mask[0], plain_mask(width, location, sigma, n), rtol=1e-9, atol=1e-9)


@given(n=st.integers(2, 24), width=real, location=real, sigma=st.sampled_from([2.0, 30.0, math.inf]))
@settings(max_examples=40, deadline=None)
def test_gradients_are_those_of_finite_differences(n: int, width: float, location: float, sigma: float) -> None:
    inputs = doubles(width, 0.3).requires_grad_(), doubles(location, 0.9).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, l: gaudi_mask(w, l, doubles(sigma), n), inputs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n", [7, 12])
def test_a_component_of_width_0_can_come_back(n: int) -> None:
    width = doubles(0.0).requires_grad_()
    mask = gaudi_mask(width, doubles(0.5), doubles(10.0), n)
    assert mask.abs().max() < 1e-12
    (gradient,) = torch.autograd.grad(mask[0, n // 2], width)
    assert gradient > 1


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    masks = gaudi_mask(torch.rand(shape), torch.rand(shape), torch.ones(1), 9)
    assert masks.shape == (*shape, 9)
    assert masks.dtype == torch.float32


def test_the_operators_obey_torch() -> None:
    inputs = (torch.rand(2, 3).requires_grad_(), torch.rand(2, 3).requires_grad_(), torch.full((1,), 5.0), 10)
    torch.library.opcheck(torch.ops.structmat.gaudi_mask, inputs)
    format = sm.Gblr(10, 12, 4, (20, 25))
    factors = format.init()
    learned = [torch.randn(5, 12), factors["left"], factors["right"]]
    buffers = [factors["start"], factors["width"], factors["order"]]
    torch.library.opcheck(torch.ops.structmat.gblr_matmul, (*(t.requires_grad_() for t in learned), *buffers, 10))


def random_gaudi(M: int, N: int, K: int, seed: int, **options: int) -> tuple[sm.GaudiGblr, dict[str, Tensor]]:
    format = sm.GaudiGblr(M, N, K, **options)
    generator = torch.Generator().manual_seed(seed)
    factors = format.init(generator=generator, dtype=torch.float64)
    return format, {**factors, "width": torch.rand(2, K, generator=generator)}


shapes = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 9), st.integers(0, 9999))


@given(shape=shapes)
@settings(max_examples=60, deadline=None)
def test_hardening_keeps_the_matrix_where_nothing_is_smoothed(shape: tuple[int, int, int, int]) -> None:
    format, factors = random_gaudi(*shape)
    hard, hardened = sm.formats.harden(format, factors)
    hard.check_factors(hardened)
    scale = format.to_dense(factors).abs().max().clamp_min(1)
    torch.testing.assert_close(hard.to_dense(hardened) / scale, format.to_dense(factors) / scale, rtol=0, atol=1e-5)
    assert hard.num_parameters() == format.num_parameters(factors) == format.multiplications(1, factors)
    assert sm.formats.hardening_gap(format, factors) < 1e-4


def test_a_smoothed_matrix_changes_when_hardened_and_the_gap_says_how_much() -> None:
    format, factors = random_gaudi(32, 32, 16, 0)
    gaps = [sm.formats.hardening_gap(format, {**factors, "sigma": torch.full((1,), s)}) for s in (2.0, 8.0, 32.0)]
    assert gaps[0] > gaps[1] > gaps[2] > 1e-3
    soft = {**factors, "sigma": torch.full((1,), 2.0)}
    hard, hardened = sm.formats.harden(format, soft)
    W = format.to_dense(soft)
    assert math.isclose(gaps[0], float((W - hard.to_dense(hardened)).norm() / W.norm()), rel_tol=1e-9)


@pytest.mark.parametrize("multiple", [2, 4, 8])
@pytest.mark.parametrize("n", [16, 24])
def test_segments_can_be_rounded_to_a_multiple(multiple: int, n: int) -> None:
    format, factors = random_gaudi(n, n, 64, 0, multiple=multiple)
    start, width = format.segments(factors)
    grid = {*range(0, n + 1, multiple), n}
    assert set(start.flatten().tolist()) <= grid - {n}
    assert set(width.flatten().tolist()) <= grid
    assert len(set(width.flatten().tolist())) > 2


def test_hardening_a_dead_matrix_leaves_nothing_and_multiplies_to_zero() -> None:
    format, factors = random_gaudi(6, 8, 3, 0)
    hard, hardened = sm.formats.harden(format, {**factors, "width": torch.zeros(2, 3)})
    assert hard == sm.Gblr(6, 8, 0, (0, 0))
    assert torch.equal(hard.matmul(torch.ones(2, 8, dtype=torch.float64), hardened), torch.zeros(2, 6).double())
    assert torch.equal(hard.to_dense(hardened), torch.zeros(6, 8).double())


CONVERTIBLE = {
    "low-rank": sm.LowRank(12, 8, rank=3),
    "monarch": sm.Monarch(12, 8, blocks=(3, 2), rank=2),
    "block-diagonal wide": sm.BlockDiagonal(6, 12, blocks=3),
    "block-diagonal tall": sm.BlockDiagonal(12, 6, blocks=3),
    "block-sparse": sm.BlockSparse(12, 8, ("10", "01", "11")),
    "block-sparse, low rank": sm.BlockSparse(12, 8, ("10", "01", "11"), rank=2),
    "gblr": sm.Gblr(12, 8, 3, (20, 11)),
    "gaudi": sm.GaudiGblr(12, 8, 5, 0.5),
}


@pytest.mark.parametrize("format", CONVERTIBLE.values(), ids=CONVERTIBLE.keys())
def test_theorem_1_what_gblr_contains(format: Format) -> None:
    factors = format.init(dtype=torch.float64)
    target, converted = sm.formats.to_gblr(format, factors)
    target.check_factors(converted)
    torch.testing.assert_close(target.to_dense(converted), format.to_dense(factors), rtol=1e-5, atol=1e-6)
    extra = 0
    if isinstance(format, sm.BlockDiagonal):
        extra = format.blocks * min(format.block_shape)
    if isinstance(format, sm.BlockSparse):
        extra = len(format.positions) * min(format.block_shape)
    assert target.num_parameters() == format.num_parameters(factors) + extra


def test_what_gblr_does_not_contain_is_refused() -> None:
    format = sm.Monarch(12, 8, blocks=2, rank=2, permute_output=True)
    with pytest.raises(ValueError, match="expected a LowRank, BlockDiagonal, BlockSparse, Gblr, GaudiGblr or unperm"):
        sm.formats.to_gblr(format, format.init())
    with pytest.raises(TypeError, match="expected a GaudiGblr format to harden, got LowRank"):
        sm.formats.harden(sm.LowRank(4, 4, 1), sm.LowRank(4, 4, 1).init())
    empty = sm.Gblr(4, 4, 0, (0, 0))
    with pytest.raises(ValueError, match="expected at least one component to learn on"):
        sm.formats.to_gaudi(empty, empty.init())


def test_back_to_gaudi_is_the_same_matrix() -> None:
    format = sm.Gblr(14, 9, 6, (40, 30))
    factors = format.init(dtype=torch.float64)
    factors["order"] = torch.randperm(6).to(torch.int32)
    soft, softened = sm.formats.to_gaudi(format, factors)
    torch.testing.assert_close(soft.to_dense(softened), format.to_dense(factors), rtol=1e-4, atol=1e-5)
    assert soft.num_parameters(softened) == format.num_parameters()


@given(first=shapes, second=shapes)
@settings(max_examples=30, deadline=None)
def test_gblr_is_closed_under_addition(first: tuple[int, int, int, int], second: tuple[int, int, int, int]) -> None:
    M, N = first[:2]
    (f, a), (g, b) = (sm.formats.harden(*random_gaudi(M, N, K, seed)) for _, _, K, seed in (first, second))
    total, factors = sm.formats.add_gblr((f, a), (g, b))
    total.check_factors(factors)
    torch.testing.assert_close(total.to_dense(factors), f.to_dense(a) + g.to_dense(b))
    assert total.num_parameters() == f.num_parameters() + g.num_parameters()


def test_matrices_of_two_shapes_have_no_sum() -> None:
    one, two = sm.Gblr(4, 4, 1, (2, 2)), sm.Gblr(4, 5, 1, (2, 2))
    with pytest.raises(ValueError, match=r"expected two matrices of one shape, got \(4, 4\) and \(4, 5\)"):
        sm.formats.add_gblr((one, one.init()), (two, two.init()))


@given(shape=shapes, seed=st.integers(0, 999), weight=real)
@settings(max_examples=40, deadline=None)
def test_theorem_2_interpolation_stays_in_the_format_and_the_budget(
    shape: tuple[int, int, int, int], seed: int, weight: float
) -> None:
    format, first = random_gaudi(*shape)
    second = random_gaudi(*shape[:3], seed)[1]
    between = sm.formats.interpolate_gaudi(format, first, second, weight)
    format.check_factors(between)
    sizes = torch.tensor(format.shape)[:, None]
    costs = [float((sizes * factors["width"]).sum()) for factors in (first, second, between)]
    assert min(costs[:2]) - 1e-4 <= costs[2] <= max(costs[:2]) + 1e-4
    hard, hardened = sm.formats.harden(format, between)
    hard.check_factors(hardened)
    assert abs(hard.num_parameters() - costs[2]) <= sum(format.shape) * format.components


def test_interpolation_refuses_a_weight_beyond_its_ends() -> None:
    format, factors = random_gaudi(4, 4, 2, 0)
    with pytest.raises(ValueError, match=r"expected a weight between 0 and 1, got 1\.5"):
        sm.formats.interpolate_gaudi(format, factors, factors, 1.5)


@given(shape=shapes, tokens=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_the_hardened_product_and_its_gradients(shape: tuple[int, int, int, int], tokens: int) -> None:
    format, factors = sm.formats.harden(*random_gaudi(*shape))
    generator = torch.Generator().manual_seed(shape[3])
    factors["order"] = torch.randperm(format.components, generator=generator).to(torch.int32)
    x = torch.randn(tokens, format.N, generator=generator, dtype=torch.float64, requires_grad=True)
    learned = [x, *(factors[name].requires_grad_() for name in ("left", "right"))]
    upstream = torch.randn(tokens, format.M, generator=generator, dtype=torch.float64)
    y, expected = format.matmul(x, factors), x @ format.to_dense(factors).mT
    torch.testing.assert_close(y, expected)
    gradients, wanted = (torch.autograd.grad(out, learned, upstream) for out in (y, expected))
    torch.testing.assert_close(gradients, wanted)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"width": torch.full((2, 3), 5, dtype=torch.int32)}, r"expected widths from 1 to 6 that sum to 12 on axis 0"),
        ({"start": torch.full((2, 3), 7, dtype=torch.int32)}, r"expected starts from 0 to 5 on axis 0"),
        ({"order": torch.zeros(3, dtype=torch.int32)}, r"expected order to hold each of 0 … 2 once"),
        ({"left": torch.zeros(3)}, r"left: expected shape \(12,\), got \(3,\)"),
    ],
)
def test_segments_that_do_not_fit_are_refused(changed: Factors, message: str) -> None:
    format = sm.Gblr(6, 8, 3, (12, 9))
    with pytest.raises(ValueError, match=message):
        format.check_factors({**format.init(), **changed})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sm.Gblr(6, 8, 3, (2, 9)), "expected between 1 and 6 entries of the output axis for each of 3"),
        (lambda: sm.Gblr(6, 8, 3, (9, 25)), "expected between 1 and 8 entries of the input axis for each of 3"),
        (lambda: sm.Gblr(6, 8, 3, (9, 9, 9)), "expected entries on the output and the input axis"),
        (
            lambda: sm.Gblr.for_budget(6, 8, keep=0.1, components=9),
            "expected a keep of at least 0.375 for 9 components",
        ),
        (lambda: sm.GaudiGblr(6, 8, 0), "expected components to be an integer of at least 1, got 0"),
        (lambda: sm.GaudiGblr(6, 8, 3, 1.5), r"expected initial_width to be in \(0, 1\], got 1.5"),
        (lambda: sm.GaudiGblr(6, 8, 3, multiple=7), "expected a multiple that divides 6 and 8, got 7; those are 1, 2"),
        (lambda: sm.GaudiGblr.for_budget(64, 64, keep=0.01), "expected a keep that gives each of 64 components"),
    ],
)
def test_formats_that_cannot_be_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@given(
    M=st.integers(4, 64),
    N=st.integers(4, 64),
    keep=st.floats(0.2, 1),
    components=st.one_of(st.none(), st.integers(1, 8)),
)
@settings(max_examples=80, deadline=None)
def test_a_budget_is_not_exceeded(M: int, N: int, keep: float, components: int | None) -> None:
    for kind in (sm.GaudiGblr, sm.Gblr):
        try:
            format = kind.for_budget(M, N, keep=keep, components=components)
        except ValueError:
            continue
        assert 0 < format.num_parameters() <= keep * M * N * (1 + 1e-9)


def test_the_size_of_a_learning_layer_is_that_of_its_segments() -> None:
    format, factors = random_gaudi(10, 12, 4, 0)
    layer = sm.StructuredLinear(format, factors=factors)
    expected = sm.formats.harden(format, factors)[0].num_parameters()
    assert format.num_parameters(layer.factors) == expected
    assert sm.report(torch.nn.Sequential(layer)).rows[0].parameters == expected


def test_positions_stay_float32_where_a_layer_changes_its_dtype() -> None:
    format, factors = random_gaudi(300, 300, 4, 0)
    layer = sm.StructuredLinear(format, factors=factors)
    for kind in (torch.bfloat16, torch.float64, torch.float32):
        layer.to(kind)
        assert layer.left.dtype == layer.right.dtype == kind
        assert layer.width.dtype == layer.location.dtype == layer.sigma.dtype == torch.float32
    assert torch.equal(layer.width, factors["width"])


def test_bfloat16_trains() -> None:
    torch.manual_seed(0)
    layer = sm.StructuredLinear(sm.GaudiGblr(24, 24, 24, 0.5), dtype=torch.bfloat16)
    target = torch.randn(24, 24, dtype=torch.bfloat16) / 5
    x = torch.randn(256, 24, dtype=torch.bfloat16)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - x @ target.T).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert layer.width.grad is not None
    assert layer.width.grad.abs().max() > 0


@given(shape=shapes, tokens=st.integers(0, 5), sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)))
@settings(max_examples=50, deadline=None)
def test_tiles_are_the_same_matrix(shape: tuple[int, int, int, int], tokens: int, sizes: tuple[int, int]) -> None:
    format, factors = sm.formats.harden(*random_gaudi(*shape))
    if format.components == 0:
        return
    generator = torch.Generator().manual_seed(shape[3])
    factors["order"] = torch.randperm(format.components, generator=generator).to(torch.int32)
    chosen = tuple(min(size, n) for size, n in zip(sizes, format.shape, strict=True))
    for blocks in (chosen, (None, None)):
        tiled, packed = sm.formats.tile(format, factors, block_sizes=blocks)
        tiled.check_factors(packed)
        torch.testing.assert_close(tiled.to_dense(packed), format.to_dense(factors))
        x = torch.randn(tokens, format.N, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(tiled.matmul(x, packed), x @ format.to_dense(factors).mT)
        assert tiled.num_parameters() >= format.num_parameters()


def test_equal_segments_on_the_grid_have_no_padding() -> None:
    format = sm.Monarch(64, 64, blocks=4, rank=4)
    tiled, _ = sm.formats.tile(*sm.formats.to_gblr(format, format.init()), block_sizes=(16, 16))
    assert tiled.num_parameters() == format.num_parameters()
    assert tiled.tiles == (4, 4)


def test_padding_is_bounded_by_a_block_for_each_segment() -> None:
    format, factors = sm.formats.harden(*random_gaudi(256, 256, 128, 0))
    tiled, _ = sm.formats.tile(format, factors, block_sizes=(16, 16))
    assert tiled.num_parameters() < 1.15 * (format.num_parameters() + 2 * 16 * format.components)


def grouped(counts: list[int]) -> tuple[list[int], Tensor, Tensor, tuple[int, ...]]:
    """The rows that blocks need at least, and how they are grouped: each once, each with rows enough."""
    blocks, heights, groups = tiling._grouped(torch.tensor(counts))
    held = [max(count, 1) for count in counts]
    assert sorted(blocks.tolist()) == list(range(len(counts)))
    assert all(height >= held[block] for block, height in zip(blocks.tolist(), heights.tolist(), strict=True))
    return held, blocks, heights, groups


@given(counts=st.lists(st.integers(0, 30), min_size=1, max_size=9))
@settings(max_examples=100, deadline=None)
def test_tiles_are_grouped_for_the_fewest_rows(counts: list[int]) -> None:
    held, blocks, heights, groups = grouped(counts)
    assert heights.tolist() == [H for S, H in zip(groups[::2], groups[1::2], strict=True) for _ in range(S)]
    if len(groups) == 2:
        assert blocks.tolist() == list(range(len(counts)))

    def cost(rows: int, count: int) -> float:
        return rows + count * tiling.GROUP_COST * sum(held)

    ordered, C = sorted(held, reverse=True), len(held)
    every = (
        cost(sum((end - begin) * ordered[begin] for begin, end in itertools.pairwise((0, *ends, C))), len(ends) + 1)
        for count in range(min(tiling.MOST_GROUPS, C))
        for ends in itertools.combinations(range(1, C), count)
    )
    assert cost(int(heights.sum()), len(groups) // 2) == pytest.approx(min(every))


@given(counts=st.lists(st.integers(0, 1000), min_size=17, max_size=60))
@settings(max_examples=50, deadline=None)
def test_many_tiles_are_grouped(counts: list[int]) -> None:
    held, _, heights, groups = grouped(counts)
    assert len(groups) <= 2 * tiling.MOST_GROUPS
    assert int(heights.sum()) <= max(held) * len(held)


def test_each_block_has_one_tile() -> None:
    format = sm.formats.TiledGblr(4, 4, 1, (1, 1, 1, 2), (2, 1), (2, 2))
    factors = format.init()
    factors["left_place"] = torch.tensor([1, 0], dtype=torch.int32)
    format.check_factors(factors)
    factors["right_place"] = torch.tensor([1, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"right_place to hold each of 0 … 1 once in order, got \[1, 0\]"):
        format.check_factors(factors)
    factors["left_place"] = torch.tensor([1, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"left_place to hold each of 0 … 1 once, got \[1, 1\]"):
        format.check_factors(factors)


def test_what_cannot_be_tiled_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a Gblr format to tile, got LowRank"):
        sm.formats.tile(sm.LowRank(4, 4, 1), {})
    empty = sm.Gblr(4, 4, 0, (0, 0))
    with pytest.raises(ValueError, match="expected at least one component to tile"):
        sm.formats.tile(empty, empty.init())
    with pytest.raises(ValueError, match=r"expected two block_sizes of at most \(4, 4\) entries, got \(5, 4\)"):
        sm.formats.TiledGblr(4, 4, 1, (1, 1), (1, 1), (5, 4))
    with pytest.raises(ValueError, match=r"expected two block_sizes of at most \(4, 4\) entries, got \(4, 4, 4\)"):
        sm.formats.TiledGblr(4, 4, 1, (1, 1), (1, 1), (4, 4, 4))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"1 tiles in all for blocks of 4 on an axis of 4, got \(1,\)"):
        sm.formats.TiledGblr(4, 4, 1, (1,), (1, 1), (4, 4))
    with pytest.raises(ValueError, match="expected components to be an integer of at least 1, got 0"):
        sm.formats.TiledGblr(4, 4, 0, (1, 1), (1, 1), (4, 4))
    with pytest.raises(ValueError, match="2 tiles in all for blocks of 3 on an axis of 4, got"):
        sm.formats.TiledGblr(4, 4, 1, (1, 1), (1, 1, 2), (4, 3))
    with pytest.raises(ValueError, match="expected a format that a budget can size, got TiledGblr"):
        sm.Rule(sm.formats.TiledGblr)
