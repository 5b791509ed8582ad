"""Gradients of the operators that keep intermediates, and of those that compute them again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from structmat import Blast, Format, Monarch
from structmat.ops import blast, blast_algorithms, monarch

FORMATS = {
    "blast": Blast(60, 84, blocks=(4, 6), rank=37),
    "blast, more columns": Blast(84, 60, blocks=(6, 4), rank=21),
    "monarch": Monarch(60, 84, blocks=(4, 6), rank=3),
    "monarch permuted": Monarch(60, 84, blocks=(6, 4), rank=5, permute_output=True),
}
each_format = pytest.mark.parametrize("name", FORMATS)
TOKENS = (1, 17, 50, 300)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch):
    """So that few tokens and components already go in several parts, the last of them shorter."""
    monkeypatch.setattr(blast_algorithms, "BUFFER", 6 * 8 * 9 * 24 / 2**20)
    monkeypatch.setattr(blast, "BACKWARD_BUFFER", 0.05)
    monkeypatch.setattr(monarch, "BUFFER", 0.001)


class Called(TorchDispatchMode):
    """The operators of ours that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "structmat":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def learning(format: Format, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {name: factor.requires_grad_() for name, factor in format.init(dtype=dtype).items()}


def given(format: Format, tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """An input that learns and an upstream gradient."""
    x = torch.randn(tokens, format.N, dtype=dtype, requires_grad=True)
    return x, torch.randn(tokens, format.M, dtype=dtype)


def recomputing(format: Any, x: Tensor, factors: dict[str, Tensor]) -> Tensor:
    """The product by the operator whose backward computes the intermediates again."""
    if isinstance(format, Blast):
        return torch.ops.structmat.blast_matmul(x, *format.views(factors), "")
    return torch.ops.structmat.monarch_matmul(x, *format.views(factors), format.permute_output, "")


def product(format: Format, x: Tensor, factors: dict[str, Tensor]) -> Tensor:
    return format.matmul(x, factors)


@pytest.mark.parametrize("multiply", [product, recomputing])
@pytest.mark.parametrize("tokens", TOKENS)
@each_format
def test_gradients_are_those_of_the_dense_matrix(name: str, tokens: int, multiply: Callable[..., Tensor]):
    format = FORMATS[name]
    factors, (x, upstream) = learning(format), given(format, tokens)
    got = torch.autograd.grad(multiply(format, x, factors), [x, *factors.values()], upstream)
    expected = torch.autograd.grad(x @ format.to_dense(factors).mT, [x, *factors.values()], upstream)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("multiply", [product, recomputing])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@each_format
def test_gradients_in_16_bits_lose_a_few_roundings(
    name: str, tokens: int, dtype: torch.dtype, multiply: Callable[..., Tensor]
):
    format = FORMATS[name]
    factors, (x, upstream) = learning(format, dtype), given(format, tokens, dtype)
    got = torch.autograd.grad(multiply(format, x, factors), [x, *factors.values()], upstream)
    exact = {n: f.detach().double().requires_grad_() for n, f in factors.items()}
    wide = x.detach().double().requires_grad_()
    expected = torch.autograd.grad(wide @ format.to_dense(exact).mT, [wide, *exact.values()], upstream.double())
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        error = ((one.double() - other).norm() / other.norm()).item()
        assert error < 6 * torch.finfo(dtype).eps, error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@each_format
def test_gradients_are_not_in_memory_that_is_used_again(name: str, tokens: int, dtype: torch.dtype):
    format = FORMATS[name]
    factors, (x, upstream) = learning(format, dtype), given(format, tokens, dtype)
    first = torch.autograd.grad(format.matmul(x, factors), [x, *factors.values()], upstream)
    before = [gradient.clone() for gradient in first]
    torch.autograd.grad(format.matmul(-2 * x, factors), [x, *factors.values()], 3 * upstream)
    assert all(torch.equal(one, other) for one, other in zip(first, before, strict=True))


@pytest.mark.parametrize("tokens", TOKENS)
def test_layers_that_follow_each_other(tokens: int):
    formats = FORMATS["blast"], FORMATS["blast, more columns"], FORMATS["monarch"]
    factors = [learning(format) for format in formats]
    x = y = torch.randn(tokens, 84, dtype=torch.float64, requires_grad=True)
    dense = x
    for format, own in zip(formats, factors, strict=True):
        y, dense = format.matmul(y, own), dense @ format.to_dense(own).mT
    leaves = [x, *(f for own in factors for f in own.values())]
    upstream = torch.randn_like(y)
    got, expected = torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(dense, leaves, upstream)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


@each_format
def test_only_what_learns_gets_a_gradient(name: str):
    format = FORMATS[name]
    x, upstream = given(format, 50)
    for learns in format.factor_specs():
        factors = format.init(dtype=torch.float64)
        factors[learns].requires_grad_()
        (got,) = torch.autograd.grad(format.matmul(x.detach(), factors), factors[learns], upstream)
        (expected,) = torch.autograd.grad(x.detach() @ format.to_dense(factors).mT, factors[learns], upstream)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@each_format
def test_operands_that_do_not_lie_side_by_side(name: str):
    format = FORMATS[name]
    factors = learning(format)
    x = torch.randn(format.N, 100, dtype=torch.float64).mT[::2].requires_grad_()
    upstream = torch.randn(1, 1, dtype=torch.float64).expand(50, format.M)
    for multiply in (product, recomputing):
        got = torch.autograd.grad(multiply(format, x, factors), [x, *factors.values()], upstream)
        expected = torch.autograd.grad(x @ format.to_dense(factors).mT, [x, *factors.values()], upstream)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


class Stopped(torch.autograd.Function):
    """Passes its input on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> None:
        return None


@each_format
def test_no_gradient_from_above_is_none_below(name: str):
    format = FORMATS[name]
    factors, (x, _) = learning(format), given(format, 50)
    y: Tensor = Stopped.apply(format.matmul(x, factors))  # pyright: ignore[reportAssignmentType]
    y.sum().backward()
    assert x.grad is None
    assert all(factor.grad is None for factor in factors.values())


@each_format
def test_intermediates_are_kept_where_factors_learn_from_many_tokens(name: str):
    format = FORMATS[name]
    plain = f"{format.name}_matmul"
    factors, (x, upstream) = learning(format), given(format, 50)
    with Called() as called:
        format.matmul(x, factors).backward(upstream)
        with torch.no_grad():
            format.matmul(x, factors)
        format.matmul(x[:32], factors)
        format.matmul(x, {n: f.detach() for n, f in factors.items()})
        format.matmul(x, factors, "whole")
    assert called.names == [f"{plain}_keeping", f"{plain}_backward", *[plain] * 4]


@each_format
def test_operations_of_both_ways(name: str):
    format = FORMATS[name]
    factors, (x, upstream) = learning(format), given(format, 50)
    forward = 2 * format.multiplications(50)
    first = 2 * 50 * factors["right"].numel()
    coupled = 2 * 50 * factors["diag"].numel() if "diag" in factors else 0
    for multiply, backward in ((product, 2 * forward + coupled), (recomputing, 2 * forward + coupled + first)):
        with FlopCounterMode(display=False) as counter:
            multiply(format, x, factors).backward(upstream)
        assert counter.get_total_flops() == forward + backward
