"""``Format.unrolled``: every product as ordinary linear layers."""

import pytest
import torch
from torch import nn

from conformance import CASES, LARGE
from structmat import Format

WITHOUT = {"merged", "minimal", "gblr", "tiled_gblr", "gaudi_gblr", "btt"}
UNROLLED = {name: format for name, format in (CASES | LARGE).items() if format.name not in WITHOUT}


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("format", UNROLLED.values(), ids=UNROLLED.keys())
def test_linear_layers_compute_the_product(format: Format, sums: bool) -> None:
    factors = format.init()
    product = format.unrolled(factors, sums)
    assert product is not None
    assert sum(layer.weight.numel() for layer in product.modules() if isinstance(layer, nn.Linear)) <= sum(
        factor.numel() for factor in factors.values()
    )
    for shape in ((), (3,), (2, 5)):
        x = torch.randn(*shape, format.N)
        torch.testing.assert_close(product(x), x @ format.to_dense(factors).mT, rtol=1e-4, atol=1e-5)


def test_others_have_no_such_form() -> None:
    assert {format.name for format in CASES.values() if format.unrolled(format.init()) is None} == WITHOUT
