"""Products whose operators are called without PyTorch's dispatcher, where nobody watches."""

import pytest
import torch
from torch.nn import Parameter
from torch.utils.flop_counter import FlopCounterMode

from structmat import Blast, BlockDiagonal, Format, LowRank, Monarch
from structmat.ops.common import unwatched

FORMATS = [LowRank(12, 8, 3), BlockDiagonal(12, 8, 2), Monarch(12, 8, (2, 2), 2), Blast(12, 8, (2, 2), 5)]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_both_ways_compute_the_same(format: Format, tokens: int) -> None:
    factors, x = format.init(), torch.randn(tokens, 8)
    watched = format.matmul(x, factors)
    with torch.no_grad():
        assert torch.equal(format.matmul(x, factors), watched)
    with torch.inference_mode():
        assert torch.equal(format.matmul(x, {name: Parameter(factor) for name, factor in factors.items()}), watched)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_who_watches_sees_the_operator(format: Format) -> None:
    factors, x = format.init(), torch.randn(3, 8)
    with torch.no_grad():
        with torch.profiler.profile() as profile:
            format.matmul(x, factors)
        assert f"structmat::{format.name}_matmul" in {event.name for event in profile.events()}
        with FlopCounterMode(display=False) as counter:
            format.matmul(x, factors)
        assert counter.get_total_flops() == 2 * format.multiplications(3)


def test_when_nobody_watches() -> None:
    x = torch.randn(3)
    assert not unwatched(x)
    with torch.no_grad():
        assert unwatched(x, Parameter(x))
        assert not unwatched(x, x.to("meta"))
        assert not unwatched(torch.nn.Buffer(x), x.as_subclass(torch.nn.UninitializedParameter))
