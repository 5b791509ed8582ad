"""The operators: every algorithm against the dense definition, beyond the sizes at which it works in parts."""

import re

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from conformance import CASES, LARGE
from structmat import Blast, BlockSparse, Format, LowRank, Monarch, StructuredLinear
from structmat.formats import FORMATS, TiledGblr
from structmat.ops import blast, blast_algorithms, common, monarch, tiling

WITH_ALGORITHMS = {
    "blast": Blast(60, 84, blocks=(4, 6), rank=37),
    "blast one block": Blast(40, 24, blocks=1, rank=9),
    "monarch": Monarch(60, 84, blocks=(4, 6), rank=3),
    "monarch permuted": Monarch(60, 84, blocks=(6, 4), rank=5, permute_output=True),
    "tiled gblr": TiledGblr(50, 70, 11, (5, 7, 2, 3), (9, 4), (8, 8)),
    "tiled gblr, whole blocks": TiledGblr(48, 72, 11, (6, 5), (1, 9, 7, 4, 1, 2), (8, 8)),
    "low-rank": LowRank(60, 84, rank=19),
    "low-rank, few rows": LowRank(7, 84, rank=3),
}
OPERATORS = {
    name: CASES[name]
    for name in (
        "low-rank square",
        "block-diagonal wide",
        "monarch 3x7 blocks, I > J",
        "monarch permuted, I < J",
        "blast 3x7 blocks, I > J",
        "block-sparse 3x7 blocks, unequal rows",
        "block-sparse empty first row",
        "gblr wide",
        "tiled gblr, several groups",
    )
}
KEEPING = ("monarch 3x7 blocks, I > J", "monarch permuted, I < J", "blast 3x7 blocks, I > J")
"""Those whose operators keep intermediates for many tokens."""


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch):
    """So that few tokens and components already go in several parts."""
    monkeypatch.setattr(blast_algorithms, "TOKENS", 24)
    monkeypatch.setattr(blast_algorithms, "HALF_TOKENS", 20)
    monkeypatch.setattr(blast_algorithms, "BUFFER", 6 * 8 * 9 * 24 / 2**20)
    monkeypatch.setattr(blast, "BACKWARD_BUFFER", 0.05)
    monkeypatch.setattr(monarch, "BUFFER", 0.001)
    monkeypatch.setattr(monarch, "MANY_TOKENS", 40)
    monkeypatch.setattr(tiling, "CHUNK", 16)
    monkeypatch.setattr(tiling, "PIECES", 0.001)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("tokens", [1, 2, 5, 17, 33, 50, 100])
@pytest.mark.parametrize("name", WITH_ALGORITHMS)
def test_every_algorithm_is_the_product_with_the_dense_matrix(name: str, tokens: int):
    format = WITH_ALGORITHMS[name]
    factors = format.init(dtype=torch.float64)
    x = torch.randn(tokens, format.N, dtype=torch.float64)
    expected = x @ format.to_dense(factors).mT
    assert format.algorithms
    for algorithm in ("", *(name for name in format.algorithms if name != "triton")):
        got = format.matmul(x, factors, algorithm)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=lambda text, a=algorithm: f"{a}: {text}")
        assert got.is_contiguous() or got.shape[0] == 1


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17, 50])
@pytest.mark.parametrize("name", WITH_ALGORITHMS)
def test_every_algorithm_loses_a_few_roundings_in_16_bits(name: str, tokens: int, dtype: torch.dtype):
    format = WITH_ALGORITHMS[name]
    factors = format.init(dtype=dtype)
    x = torch.randn(tokens, format.N, dtype=dtype)
    exact = x.double() @ format.to_dense({n: f.double() for n, f in factors.items()}).mT
    for algorithm in ("", *(name for name in format.algorithms if name != "triton")):
        got = format.matmul(x, factors, algorithm)
        assert got.dtype == dtype
        error = ((got.double() - exact).norm() / exact.norm()).item()
        assert error < 6 * torch.finfo(dtype).eps, (algorithm, error)


def test_the_automatic_choice_depends_on_tokens_and_dtype():
    few, some, many = (torch.empty(n, 8) for n in (1, 20, 200))
    assert [blast_algorithms.automatic(x, 16) for x in (few, some, many)] == ["vectors", "vectors_first", "components"]
    assert blast_algorithms.automatic(many.bfloat16(), 16) == "tokens"
    assert [blast_algorithms.automatic(many, side) for side in (32, 31)] == ["vectors", "components"]
    assert [blast_algorithms.automatic(many.bfloat16(), side) for side in (128, 127)] == ["vectors", "tokens"]
    assert blast_algorithms.automatic(torch.empty(200, 8, device="meta"), 200) == "whole"
    low, high = (torch.empty(4, 4, 4, t) for t in (64, 65))
    many = torch.empty(256, 8)
    assert [monarch._automatic(x, low) for x in (few, many, many.bfloat16())] == ["whole", "rows", "tokens"]
    assert monarch._automatic(many, high) == "tokens"
    many = torch.empty(200, 8)
    weight = torch.empty(64, 8)
    assert [common._automatic(x, weight) for x in (few, some, many)] == ["split", "transposed", "linear"]
    assert common._automatic(some.bfloat16(), weight) == "linear"


@pytest.mark.parametrize("name", FORMATS)
def test_algorithms_have_names_in_snake_case(name: str):
    assert [way for way in FORMATS[name].algorithms if not re.fullmatch("[a-z]+(_[a-z]+)*", way)] == []


def leaf(tensor: torch.Tensor, learns: bool) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(learns and tensor.requires_grad)


@pytest.mark.parametrize(("name", "tokens"), [*((name, 5) for name in OPERATORS), *((name, 50) for name in KEEPING)])
def test_opcheck(name: str, tokens: int):
    format = OPERATORS[name]
    specs = format.factor_specs()
    factors = {n: f.requires_grad_(specs[n].trainable) for n, f in format.init(dtype=torch.float64).items()}
    recorded: list[tuple[object, tuple[object, ...]]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "structmat":
                recorded.append((function, args))
            return function(*args, **(kwargs or {}))

    x = torch.randn(tokens, format.N, dtype=torch.float64, requires_grad=True)
    with Record():
        format.matmul(x, factors).sum().backward()
    names = [str(function) for function, _ in recorded]
    assert len(names) >= 2
    assert sum("backward" in name for name in names) * 2 == len(names)
    for function, args in recorded:
        learns = "backward" not in str(function)  # a backward that is derived is made of PyTorch's own
        leaves = tuple(leaf(a, learns) if isinstance(a, torch.Tensor) else a for a in args)
        opcheck(function, leaves, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("name", LARGE)
def test_gradients_of_many_tokens(name: str):
    format = LARGE[name]
    factors = format.init(dtype=torch.float64)
    trainable = [factors[n].requires_grad_() for n, spec in format.factor_specs().items() if spec.trainable]
    x = torch.randn(300, format.N, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(300, format.M, dtype=torch.float64)
    got = torch.autograd.grad(format.matmul(x, factors), [x, *trainable], upstream)
    expected = torch.autograd.grad(x @ format.to_dense(factors).mT, [x, *trainable], upstream)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_export_has_no_operator_of_ours(name: str):
    format: Format = CASES[name]

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for key, factor in format.init().items():
                self.register_buffer(key, factor)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return format.matmul(x, dict(self.named_buffers()))

    module, x = Module(), torch.randn(3, format.N)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: tokens},))
    other = torch.randn(9, format.N)
    torch.testing.assert_close(program.module()(other), module(other))
    assert [node for node in program.graph.nodes if "structmat" in str(node.target)] == []


def test_block_sparse_rows_of_every_count_go_through_one_operator():
    format = BlockSparse(15, 21, ("110", "001", "111", "000", "101"))
    factors = format.init(dtype=torch.float64)
    x = torch.randn(4, 21, dtype=torch.float64)
    torch.testing.assert_close(format.matmul(x, factors), x @ format.to_dense(factors).mT)


@pytest.mark.parametrize("tokens", [3, 40, 300])
@pytest.mark.parametrize("name", WITH_ALGORITHMS)
def test_frozen_factors_need_the_gradient_of_the_input_alone(name: str, tokens: int):
    format = WITH_ALGORITHMS[name]
    factors = format.init(dtype=torch.float64)
    x = torch.randn(tokens, format.N, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(tokens, format.M, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        (got,) = torch.autograd.grad(format.matmul(x, factors), x, upstream)
    torch.testing.assert_close(got, upstream @ format.to_dense(factors), rtol=1e-10, atol=1e-10)
    if format.name != "tiled_gblr":
        assert counter.get_total_flops() == 4 * format.multiplications(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WITH_ALGORITHMS)
def test_inference_mode_leaves_nothing_behind(name: str, dtype: torch.dtype):
    common._WORKSPACE.buffers.clear()
    format = WITH_ALGORITHMS[name]
    factors, x = format.init(dtype=dtype), torch.randn(300, format.N, dtype=dtype)
    with torch.inference_mode():
        inside = format.matmul(x, factors)
    outside = format.matmul(x, factors)
    assert torch.equal(inside, outside)
    again = format.matmul(-x, factors)
    assert torch.equal(again, -outside)  # and what came before was not overwritten


def test_float64_is_left_alone_under_autocast():
    format = CASES["blast square"]
    with torch.autocast("cpu", torch.bfloat16):
        y = format.matmul(torch.randn(3, format.N, dtype=torch.float64), format.init(dtype=torch.float64))
    assert y.dtype == torch.float64


def test_choices_do_not_fix_the_number_of_tokens_of_an_export():
    layer = StructuredLinear(Blast(64, 64, blocks=4, rank=8))
    layer.algorithms = {8: "whole", 16: "vectors"}
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(layer, (torch.randn(5, 64),), dynamic_shapes=({0: tokens},))
    x = torch.randn(100, 64)
    torch.testing.assert_close(program.module()(x), layer(x))
