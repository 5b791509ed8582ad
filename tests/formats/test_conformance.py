"""One suite, every format: the dense matrix is the definition, and everything else is tested against it."""

import copy
import io
import json
import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conformance import CASES, LARGE
from structmat import Format, GaudiGblr, StructuredLinear
from structmat.formats import FORMATS, Merged, format_from_json, harden
from structmat.formats.quantized import Quantized
from structmat.ops import common

each_case = pytest.mark.parametrize("format", CASES.values(), ids=CASES.keys())
each_large = pytest.mark.parametrize("format", LARGE.values(), ids=LARGE.keys())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def test_every_registered_format_has_cases():
    others = set(FORMATS.values()) - {Quantized}  # which has no factors before quantize_ makes them from others
    assert others <= {type(format) for format in CASES.values()}
    assert others - {Merged} <= {type(format) for format in LARGE.values()}  # it is as fast as what it is made of


@each_case
@pytest.mark.parametrize("leading", [(), (1,), (3,), (7,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)], ids=str)
def test_matmul_is_the_product_with_the_dense_matrix(format: Format, leading: tuple[int, ...]):
    factors = format.init(dtype=torch.float64)
    x = torch.randn(*leading, format.N, dtype=torch.float64)
    y = format.matmul(x, factors)
    assert y.shape == (*leading, format.M)
    torch.testing.assert_close(y, x @ format.to_dense(factors).T, rtol=1e-12, atol=1e-12)


@each_case
@pytest.mark.parametrize("tokens", [3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matmul_loses_a_few_roundings_at_most(format: Format, tokens: int, dtype: torch.dtype):
    factors = format.init(dtype=dtype)
    x = torch.randn(tokens, format.N, dtype=dtype)
    y = format.matmul(x, factors)
    assert y.dtype == dtype
    exact = x.double() @ format.to_dense({name: factor.double() for name, factor in factors.items()}).T
    assert relative_error(y.double(), exact) < 4 * torch.finfo(dtype).eps


@each_case
def test_matmul_takes_strided_inputs_and_factors(format: Format):
    factors = format.init(dtype=torch.float64)
    W = format.to_dense(factors)
    strided = {name: factor.repeat_interleave(2, -1)[..., ::2] for name, factor in factors.items()}
    transposed = torch.randn(format.N, 7, dtype=torch.float64).T
    sliced = torch.randn(7, 2 * format.N, dtype=torch.float64)[:, ::2]
    expanded = torch.randn(1, format.N, dtype=torch.float64).expand(7, -1)
    for x in (transposed, sliced, expanded):
        torch.testing.assert_close(format.matmul(x, factors), x @ W.T, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(format.matmul(x, strided), x @ W.T, rtol=1e-12, atol=1e-12)


@each_case
@pytest.mark.parametrize("tokens", [0, 3, 7])
def test_gradients_are_those_of_the_dense_product(format: Format, tokens: int):
    factors = format.init(dtype=torch.float64)
    trainable = [factors[name].requires_grad_() for name, spec in format.factor_specs().items() if spec.trainable]
    x = torch.randn(tokens, format.N, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(tokens, format.M, dtype=torch.float64)
    got = torch.autograd.grad(format.matmul(x, factors), [x, *trainable], upstream)
    expected = torch.autograd.grad(x @ format.to_dense(factors).T, [x, *trainable], upstream)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def fill_kept_memory(value: float | None) -> None:
    for buffer in common._WORKSPACE.buffers.values() if value is not None else ():
        buffer.fill_(value)


@each_case
@pytest.mark.parametrize("tokens", [7, 50])
def test_uninitialised_memory_is_never_read(format: Format, tokens: int):
    factors = format.init()
    for name, spec in format.factor_specs().items():
        factors[name].requires_grad_(spec.trainable)
    x = torch.randn(tokens, format.N)

    def product_and_gradients(fill: float | None = None) -> list[torch.Tensor]:
        fill_kept_memory(fill)
        y = format.matmul(x, factors)
        fill_kept_memory(fill)
        return [y, *torch.autograd.grad(y.sum(), [f for n, f in factors.items() if format.factor_specs()[n].trainable])]

    clean = product_and_gradients()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        assert torch.empty(1).isnan()
        poisoned = product_and_gradients(torch.nan)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(poisoned, clean, rtol=0, atol=0)


@each_case
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", [None, "meta"])
def test_init_gives_what_the_specs_say(format: Format, dtype: torch.dtype | None, device: str | None):
    factors = format.init(dtype=dtype, device=device)
    specs = format.factor_specs()
    assert list(factors) == list(specs)
    for name, factor in factors.items():
        assert tuple(factor.shape) == specs[name].shape
        assert factor.dtype == (specs[name].dtype or dtype or torch.float32)
        assert factor.device.type == (device or "cpu")
        assert not factor.requires_grad


@each_case
def test_matmul_runs_on_the_meta_device(format: Format):
    y = format.matmul(torch.empty(2, 5, format.N, device="meta"), format.init(device="meta"))
    assert y.is_meta
    assert y.shape == (2, 5, format.M)


@each_case
def test_init_draws_from_the_generator_alone(format: Format):
    before = torch.get_rng_state()
    first, again, other = (format.init(generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for name in first:
        assert torch.equal(first[name], again[name])
        if name in format.scale_exponents:
            assert not torch.equal(first[name], other[name])
    torch.manual_seed(5)
    global_first = format.init()
    torch.manual_seed(5)
    torch.testing.assert_close(format.init(), global_first, rtol=0, atol=0)


@each_large
def test_a_fresh_layer_has_the_output_variance_of_a_fresh_linear(format: Format):
    """1/3 for every output feature, at inputs of unit variance; compared with four standard errors of the estimate."""
    norms = torch.stack([format.to_dense(format.init(generator=seeded(s))).square().sum(1) for s in range(24)])
    for group in norms.view(24, 4, -1).unbind(1):  # quarters of the rows: a quarter is at least a block row
        estimates = group.mean(1)
        standard_error = (estimates.std() / 24**0.5).item()
        assert abs(estimates.mean().item() - 1 / 3) < max(4 * standard_error, 1e-6)


@each_case
def test_the_number_of_parameters_is_that_of_the_trainable_factors(format: Format):
    layer = StructuredLinear(format, bias=False)
    count = sum(parameter.numel() for parameter in layer.parameters())
    if isinstance(format, GaudiGblr):  # those that harden leaves
        count = harden(format, layer.factors)[0].num_parameters()
    assert format.num_parameters() == format.num_parameters(layer.factors) == count
    assert format.keep == count / (format.M * format.N)
    assert format.shape == (format.M, format.N) == tuple(layer.to_dense().shape)


@each_case
@pytest.mark.parametrize("tokens", [7, 32])
def test_the_multiplications_are_those_that_run(format: Format, tokens: int):
    if type(format).matmul is Format.matmul:
        pytest.skip("the default product goes through the dense matrix")
    if isinstance(format, GaudiGblr):
        pytest.skip("counted as hardened, but multiplies on full axes while it learns")
    x, factors = torch.randn(tokens, format.N), format.init()
    with FlopCounterMode(display=False) as counter:
        format.matmul(x, factors)
    assert counter.get_total_flops() == 2 * format.multiplications(tokens)


@each_case
@pytest.mark.parametrize("scale", [0.3, 1, 7.0])
def test_scaled_scales_the_matrix(format: Format, scale: float):
    factors = format.init(dtype=torch.float64)
    before = copy.deepcopy(factors)
    scaled = format.scaled(factors, scale)
    torch.testing.assert_close(format.to_dense(scaled), scale * format.to_dense(factors), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(factors, before, rtol=0, atol=0)


@each_case
def test_scaled_takes_one_scale_for_each_of_a_batch(format: Format):
    members = [format.init(dtype=torch.float64) for _ in range(6)]
    batch = {name: torch.stack([m[name] for m in members]).unflatten(0, (2, 3)) for name in members[0]}
    scales = torch.tensor([[0.1, 1.0, 2.0], [3.0, 0.0, 5.0]], dtype=torch.float64)
    scaled = {name: factor.flatten(0, 1) for name, factor in format.scaled(batch, scales).items()}
    for k, (member, scale) in enumerate(zip(members, scales.flatten(), strict=True)):
        got = format.to_dense({name: factor[k] for name, factor in scaled.items()})
        torch.testing.assert_close(got, scale * format.to_dense(member), rtol=1e-12, atol=1e-12)


@each_case
def test_json_round_trip(format: Format, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(FORMATS, format.name, type(format))
    rebuilt = format_from_json(json.loads(json.dumps(format.to_json())))
    assert rebuilt == format
    assert hash(rebuilt) == hash(format)
    assert rebuilt.factor_specs() == format.factor_specs()


@each_case
def test_check_factors_lists_what_is_wrong(format: Format):
    factors = format.init()
    format.check_factors(factors)
    name = next(iter(factors))
    with pytest.raises(ValueError, match=rf"factors of {type(format).__name__}.* does not fit: missing {name} "):
        format.check_factors({n: factor for n, factor in factors.items() if n != name})
    with pytest.raises(ValueError, match=r"unexpected extra \(1,\)"):
        format.check_factors({**factors, "extra": torch.ones(1)})
    with pytest.raises(ValueError, match=rf"{name}: expected shape .*, got \(1, 2, 3\)"):
        format.check_factors({**factors, name: torch.ones(1, 2, 3)})


@each_case
def test_state_dict_round_trip(format: Format):
    source, target = StructuredLinear(format), StructuredLinear(format)
    state = source.state_dict()
    assert set(state) == {*format.factor_specs(), "bias"}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True), strict=True)
    x = torch.randn(5, format.N)
    assert torch.equal(target(x), source(x))


@each_case
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(format: Format, copied):
    layer = StructuredLinear(format)
    twin = copied(layer)
    x = torch.randn(5, format.N)
    before = layer(x)
    assert twin.format == format
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert not torch.equal(twin(x), before)
    assert torch.equal(layer(x), before)


@each_case
def test_compiles_into_one_graph(format: Format):
    torch._dynamo.reset()
    layer = StructuredLinear(format, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, format.N, dtype=torch.float64)
    y = compiled(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-12, atol=1e-12)
    parameters = list(layer.parameters())
    got, expected = (torch.autograd.grad(out.square().sum(), parameters) for out in (y, layer(x)))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@each_case
@pytest.mark.parametrize("tokens", [3, 7])
def test_autocast_emits_the_low_precision(format: Format, tokens: int):
    layer = StructuredLinear(format)
    x = torch.randn(tokens, format.N)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y.float(), layer(x)) < 4 * torch.finfo(torch.bfloat16).eps
    y.float().sum().backward()
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}


@each_case
def test_a_layer_can_change_its_dtype(format: Format):
    layer = StructuredLinear(format)
    x = torch.randn(5, format.N)
    y = layer(x)
    doubled = layer.double()(x.double())
    assert doubled.dtype == torch.float64
    assert relative_error(y.double(), doubled) < 4 * torch.finfo(torch.float32).eps
