"""Derivatives of derivatives: gradient penalties, products with the Hessian, and the transforms of ``torch.func``."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from conformance import CASES, LARGE
from structmat import Format, Gblr, StructuredLinear
from structmat.formats import tile
from structmat.ops import gaudi_mask

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's own
each_case = pytest.mark.parametrize("format", CASES.values(), ids=CASES.keys())
Product = Callable[..., Tensor]


def split(format: Format) -> tuple[list[Tensor], Product, Product]:
    """The factors that learn, and the product and its definition as functions of the input and of them."""
    factors, specs = format.init(dtype=torch.float64), format.factor_specs()
    names = [name for name in factors if specs[name].trainable and factors[name].dtype == torch.float64]

    def product(x: Tensor, *learning: Tensor) -> Tensor:
        return format.matmul(x, {**factors, **dict(zip(names, learning, strict=True))})

    def definition(x: Tensor, *learning: Tensor) -> Tensor:
        return x @ format.to_dense({**factors, **dict(zip(names, learning, strict=True))}).mT

    return [factors[name].requires_grad_() for name in names], product, definition


def penalty(product: Product, x: Tensor, learning: list[Tensor], depth: int = 1) -> list[Tensor]:
    """The gradients of a penalty on gradients, on those of the input and of all factors, as deep as wanted."""
    value = torch.tanh(product(x, *learning)).square().sum()
    for _ in range(depth):
        gradients = torch.autograd.grad(value, [x, *learning], create_graph=True)
        value = sum((torch.sin(g).square().sum() for g in gradients), torch.zeros(()))
    return list(torch.autograd.grad(value, [x, *learning]))


@each_case
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_second_derivatives_are_those_of_the_dense_matrix(format: Format, tokens: int):
    learning, product, definition = split(format)
    x = torch.randn(tokens, format.N, dtype=torch.float64, requires_grad=True)
    expected = penalty(definition, x, learning)
    torch.testing.assert_close(penalty(product, x, learning), expected, rtol=1e-9, atol=1e-9)


@each_case
def test_third_derivatives_are_those_of_the_dense_matrix(format: Format):
    learning, product, definition = split(format)
    x = torch.randn(5, format.N, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        penalty(product, x, learning, 2), penalty(definition, x, learning, 2), rtol=1e-8, atol=1e-8
    )


@each_case
def test_differences_confirm_second_derivatives(format: Format):
    learning, product, _ = split(format)
    x = torch.randn(2, format.N, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(product, (x, *learning), fast_mode=True)


@each_case
def test_a_penalty_on_the_gradient_of_the_input_alone(format: Format):
    layer = StructuredLinear(format, dtype=torch.float64).requires_grad_(False)
    x = torch.randn(3, 5, format.N, dtype=torch.float64, requires_grad=True)
    got, expected = (
        torch.autograd.grad(torch.autograd.grad(torch.tanh(call(x)).sum(), x, create_graph=True)[0].square().sum(), x)
        for call in (layer, lambda x: x @ layer.to_dense().mT + layer.bias)
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["low-rank square", "monarch square", "blast square", "block-sparse, low rank"])
def test_one_tensor_as_input_and_factor(name: str):
    """Each of its places has a gradient of its own, also where the gradients are derived."""
    format = {**CASES, **LARGE}[name]
    learning, product, definition = split(format)
    right = learning[-1]
    x = right if right.shape[1] == format.N else right.repeat(1, format.N // right.shape[1])
    torch.testing.assert_close(penalty(product, x, learning), penalty(definition, x, learning), rtol=1e-9, atol=1e-9)


@each_case
def test_many_gradients_at_once(format: Format):
    """``is_grads_batched`` runs the backward under ``vmap``."""
    learning, product, definition = split(format)
    x = torch.randn(40, format.N, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 40, format.M, dtype=torch.float64)
    got, expected = (
        torch.autograd.grad(call(x, *learning), [x, *learning], upstream, is_grads_batched=True)
        for call in (product, definition)
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@each_case
def test_transforms_of_torch_func_see_the_product(format: Format):
    learning, product, definition = split(format)
    learning = [factor.detach() for factor in learning]
    tangents = [torch.randn_like(factor) for factor in learning]
    x, tangent = torch.randn(2, 5, format.N, dtype=torch.float64)

    def transformed(call: Product) -> list[Tensor]:
        def loss(x: Tensor, *factors: Tensor) -> Tensor:
            return torch.tanh(call(x, *factors)).square().sum()

        arguments = tuple(range(len(learning) + 1))
        return [
            *torch.func.jvp(call, (x, *learning), (tangent, *tangents)),
            *torch.func.grad(loss, arguments)(x, *learning),
            torch.func.vmap(call, (0, *[None] * len(learning)))(x, *learning),
            *torch.func.vmap(torch.func.grad(loss, arguments), (0, *[None] * len(learning)))(x[:, None], *learning),
            torch.func.jacrev(call)(x, *learning),
            torch.func.hessian(loss)(x[:1], *learning),
        ]

    torch.testing.assert_close(transformed(product), transformed(definition), rtol=1e-10, atol=1e-10)


@each_case
def test_one_matrix_for_each_of_a_batch(format: Format):
    """``vmap`` over the factors, as in an ensemble of layers."""
    members = [split(format)[0] for _ in range(3)]
    _, product, definition = split(format)
    stacked = [torch.stack(factors).detach() for factors in zip(*members, strict=True)]
    x = torch.randn(3, 5, format.N, dtype=torch.float64)
    got, expected = (torch.func.vmap(call)(x, *stacked) for call in (product, definition))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sigma", [torch.inf, 3.0])
@pytest.mark.parametrize("n", [7, 8])
def test_differences_confirm_second_derivatives_of_the_gaudi_mask(n: int, sigma: float):
    width, location = torch.rand(2, 3, dtype=torch.float64).unbind()
    given = width.requires_grad_(), location.requires_grad_()
    smoothing = torch.full((1,), sigma)
    assert torch.autograd.gradgradcheck(lambda w, at: gaudi_mask(w, at, smoothing, n), given)
    got = torch.func.jacfwd(gaudi_mask, argnums=(0, 1))(*given, smoothing, n)
    expected = torch.autograd.functional.jacobian(lambda w, at: gaudi_mask(w, at, smoothing, n), given)
    torch.testing.assert_close(got, expected)


def test_tiles_of_a_matrix_have_its_derivatives():
    format = Gblr(9, 21, 4, (17, 60))
    factors = format.init(dtype=torch.float64)
    tiled, tiles = tile(format, factors)
    x = torch.randn(3, 21, dtype=torch.float64, requires_grad=True)
    got, expected = (
        penalty(lambda x, kind=kind, own=own: kind.matmul(x, own), x, [])
        for kind, own in ((tiled, tiles), (format, factors))
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name, format in LARGE.items() if "triton" in format.algorithms])
def test_second_derivatives_where_kernels_multiply(name: str):
    pytest.importorskip("triton")
    format = LARGE[name]
    factors = format.init()
    learning = {n: factors[n].requires_grad_() for n, spec in format.factor_specs().items() if spec.trainable}
    x = torch.randn(5, format.N, requires_grad=True)
    got, expected = (
        penalty(lambda x, *_, way=way: format.matmul(x, factors, way), x, list(learning.values()))
        for way in ("triton", "")
    )
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() < 1e-5 * other.norm()
