"""Layers in graphs that leave PyTorch's eager mode: exported, traced, recorded; for batches that were not seen then."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from conformance import CASES
from structmat import Blast, Format, GaudiGblr, Gblr, LowRank, StructuredLinear, apply_plan_, harden_, make_plan, tile_
from structmat.nn import StructuredConv2d

EMPTY = {"gblr without components": Gblr(7, 5, 0, (0, 0))}
each_case = pytest.mark.parametrize("format", [*CASES.values(), *EMPTY.values()], ids=[*CASES, *EMPTY])
FORMATS = {format.name: format for format in CASES.values()}
each_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
BATCHES = (1, 2, 3, 40, 300)
pytestmark = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"
)  # torch's
CONVOLUTIONS = {
    "3 x 3": StructuredConv2d(Blast(8, 36, (2, 2), 3), 3),
    "strided": StructuredConv2d(LowRank(8, 36, 3), 3, stride=2, padding=1),
    "same, dilated": StructuredConv2d(Gblr(8, 36, 4, (17, 30)), 3, padding="same", dilation=2, padding_mode="reflect"),
    "1 x 1": StructuredConv2d(GaudiGblr(8, 4, 4, 0.5), 1),
}
each_convolution = pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def exported(
    layer: nn.Module, given: Tensor, sizes: dict[int, Any], strict: bool = False
) -> Callable[[Tensor], Tensor]:
    """The exported layer, which has no operator of ours."""
    program = torch.export.export(layer, (given,), dynamic_shapes=(sizes,), strict=strict)
    for graph in (program.graph, program.run_decompositions().graph):
        assert [node for node in graph.nodes if "structmat" in str(node.target)] == []
    return program.module()


@each_case
def test_export_holds_for_every_batch(format: Format):
    layer = StructuredLinear(format)
    layer.algorithms = dict.fromkeys((4, 64), next(iter(format.algorithms), ""))
    found = exported(layer, torch.randn(3, format.N), {0: Dim("batch", min=1, max=2048)})
    for batch in BATCHES:
        x = torch.randn(batch, format.N)
        close(found(x), layer(x))


@pytest.mark.slow
@each_format
def test_strict_export_holds_for_every_batch(format: Format):
    layer = StructuredLinear(format).eval()
    found = exported(layer, torch.randn(3, format.N), {0: Dim("batch", min=1, max=2048)}, strict=True)
    for batch in BATCHES:
        x = torch.randn(batch, format.N)
        close(found(x), layer(x))


@pytest.mark.slow
@each_format
def test_export_holds_for_every_length(format: Format):
    layer = StructuredLinear(format)
    found = exported(layer, torch.randn(2, 5, format.N), {0: Dim("batch", min=1), 1: Dim("length", min=1)})
    for shape in ((2, 5), (1, 1), (3, 70)):
        x = torch.randn(*shape, format.N)
        close(found(x), layer(x))


@each_case
@pytest.mark.parametrize("learning", [False, True])
def test_trace_holds_for_every_batch(format: Format, learning: bool):
    layer = StructuredLinear(format)
    layer.algorithms = dict.fromkeys((4, 64), next(iter(format.algorithms), ""))
    with torch.set_grad_enabled(learning), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        found = torch.jit.trace(layer, torch.randn(3, format.N))
    assert "structmat::" not in str(found.inlined_graph)
    for batch in BATCHES:
        x = torch.randn(batch, format.N, requires_grad=learning)
        close(found(x), layer(x))
        if learning:
            got, expected = (torch.autograd.grad(torch.tanh(one(x)).sum(), x)[0] for one in (found, layer))
            close(got, expected)


@pytest.mark.slow
@each_convolution
def test_convolutions_export_and_trace(layer: StructuredConv2d):
    sizes = {0: Dim("batch", min=1), 2: Dim("height", min=5, max=99), 3: Dim("width", min=5, max=99)}
    found = exported(layer, torch.randn(2, 4, 9, 11), sizes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        traced = torch.jit.trace(layer, torch.randn(2, 4, 9, 11))
    for shape in ((1, 9, 11), (2, 9, 11), (5, 13, 8)):
        x = torch.randn(shape[0], 4, *shape[1:])
        close(found(x), layer(x))
        close(traced(x), layer(x))


def network(kind: str) -> nn.Module:
    """A network that is hardened and laid out in tiles, or not yet."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48)).eval()
    apply_plan_(model, make_plan(model, {nn.Linear: GaudiGblr}, keep=0.5))
    if kind != "gaudi":
        harden_(model)
    if kind == "tiled":
        tile_(model)
    return model


@pytest.mark.parametrize("kind", ["gaudi", "hardened", "tiled"])
def test_a_network_that_learned_its_structure_exports(kind: str):
    model = network(kind)
    found = exported(model, torch.randn(3, 64), {0: Dim("batch", min=1, max=2048)})
    for batch in BATCHES:
        x = torch.randn(batch, 64)
        close(found(x), model(x))


def test_torch_fx_records_calls_of_the_layers():
    model = nn.Sequential(StructuredLinear(Blast(12, 12, 3, 4)), nn.ReLU(), StructuredLinear(Gblr(8, 12, 3, (14, 20))))
    convolutional = nn.Sequential(CONVOLUTIONS["3 x 3"], nn.ReLU(), nn.Flatten())
    for whole, shape in ((model, (12,)), (convolutional, (4, 6, 5))):
        graph = torch.fx.symbolic_trace(whole)
        assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == [
            name for name, _ in whole.named_children()
        ]
        for batch in BATCHES:
            x = torch.randn(batch, *shape)
            close(graph(x), whole(x))
    with pytest.raises(TypeError, match="expected a network that holds structured layers, to record it with torch"):
        torch.fx.symbolic_trace(StructuredLinear(LowRank(8, 8, 2)))
