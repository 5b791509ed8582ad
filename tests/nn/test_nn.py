"""The layers against ``nn.Linear`` and ``nn.Conv2d``, the modules they replace, and training from their init."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from conformance import LARGE
from structmat import Blast, BlockSparse, Dense, Format, LowRank, Monarch, StructuredConv2d, StructuredLinear
from structmat.formats import FORMATS
from structmat.network.sites import DENSE_KINDS, find_sites
from structmat.network.splitting import put_module


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)], ids=str)
def test_linear_is_nn_linear_with_the_dense_weight(bias: bool, leading: tuple[int, ...]):
    layer = StructuredLinear(Blast(8, 6, blocks=2, rank=3), bias, dtype=torch.float64)
    dense = nn.Linear(6, 8, bias, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(layer.to_dense())
        if bias:
            dense.bias.copy_(layer.bias)
    x = torch.randn(*leading, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-12, atol=1e-12)
    assert (layer.in_features, layer.out_features) == (dense.in_features, dense.out_features)
    assert (layer.bias is None) == (dense.bias is None)


def test_the_fresh_bias_is_uniform_as_that_of_nn_linear():
    bias = StructuredLinear(Dense(4000, 16), generator=torch.Generator().manual_seed(0)).bias.detach()
    assert bias.abs().max() <= 1 / 4
    deciles = torch.histc(bias, 10, -1 / 4, 1 / 4)
    assert (deciles - 400).abs().max() < 4 * (4000 * 0.1 * 0.9) ** 0.5  # four standard deviations of a count


def test_the_generator_fixes_factors_and_bias():
    layers = [StructuredLinear(LowRank(6, 4, 2), generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict(), rtol=0, atol=0)


def test_given_factors_are_copied():
    format = LowRank(6, 4, 2)
    factors = format.init()
    before = {name: factor.clone() for name, factor in factors.items()}
    layer = StructuredLinear(format, factors=factors)
    torch.testing.assert_close(layer.factors, before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    torch.testing.assert_close(factors, before, rtol=0, atol=0)


def test_layers_on_the_meta_device():
    layer = StructuredLinear(Blast(8, 6, 2, 3), device="meta")
    assert all(parameter.is_meta for parameter in layer.parameters())
    with torch.device("meta"):
        layer = StructuredLinear(Blast(8, 6, 2, 3))
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer(torch.empty(5, 6, device="meta")).shape == (5, 8)


def test_repr_names_the_format_and_the_geometry():
    assert repr(StructuredLinear(LowRank(6, 4, 2), bias=False)) == (
        "StructuredLinear(LowRank(M=6, N=4, rank=2), bias=False)"
    )
    assert repr(StructuredConv2d(LowRank(6, 12, 2), (2, 3), padding="same")) == (
        "StructuredConv2d(LowRank(M=6, N=12, rank=2), kernel_size=(2, 3), stride=(1, 1), padding='same', "
        "dilation=(1, 1), padding_mode='zeros', bias=True)"
    )


GEOMETRIES = {
    "plain": {"kernel_size": 3},
    "rectangular": {"kernel_size": (2, 3)},
    "1x1": {"kernel_size": 1},
    "1x1 stride": {"kernel_size": 1, "stride": (2, 3)},
    "1x1 padding": {"kernel_size": 1, "padding": (1, 2)},
    "stride": {"kernel_size": 3, "stride": 2},
    "stride that leaves a rest": {"kernel_size": (3, 2), "stride": (3, 2), "padding": 1},
    "padding": {"kernel_size": 3, "padding": (1, 2)},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even kernel": {"kernel_size": (4, 2), "padding": "same"},
    "same, even kernel, dilation": {"kernel_size": (2, 4), "padding": "same", "dilation": (3, 1)},
    "valid": {"kernel_size": (2, 3), "padding": "valid"},
    "dilation": {"kernel_size": (3, 2), "dilation": (2, 3), "padding": 2},
    "reflect": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "reflect"},
    "reflect, same, even kernel": {"kernel_size": (4, 2), "padding": "same", "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"},
    "replicate, same, even kernel": {"kernel_size": (2, 4), "padding": "same", "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "circular"},
    "circular, same, even kernel": {"kernel_size": (2, 2), "padding": "same", "padding_mode": "circular"},
    "everything": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 1), "dilation": (1, 2), "bias": False},
}


def twins(out: int = 6, in_channels: int = 4, **geometry) -> tuple[nn.Conv2d, StructuredConv2d]:
    """A convolution and its structured counterpart, of the same weight and bias."""
    conv = nn.Conv2d(in_channels, out, dtype=torch.float64, **geometry)
    weight = DENSE_KINDS[nn.Conv2d].matrix(conv)
    format = LowRank(out, weight.shape[1], rank=2)
    factors = format.init(dtype=torch.float64)
    layer = DENSE_KINDS[nn.Conv2d].structured(conv, format, factors, None)
    with torch.no_grad():
        weight.copy_(format.to_dense(factors))
        if conv.bias is not None:
            layer.bias.copy_(conv.bias)
    return conv, layer


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_conv_is_nn_conv2d_with_the_dense_weight(geometry: dict):
    conv, layer = twins(**geometry)
    assert isinstance(layer, StructuredConv2d)
    assert (layer.in_channels, layer.out_channels) == (conv.in_channels, conv.out_channels)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), conv(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, x, upstream), torch.autograd.grad(expected, x, upstream), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(layer(x[1]), expected[1], rtol=1e-12, atol=1e-12)  # without the batch dimension
    assert layer(x[:0]).shape == conv(x[:0]).shape == (0, *expected.shape[1:])


@pytest.mark.parametrize("geometry", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 1}], ids=["3x3", "1x1"])
def test_conv_takes_channels_last_images(geometry: dict):
    conv, layer = twins(**geometry)
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-12, atol=1e-12)


def test_conv_runs_with_every_format():
    for format in (Dense(6, 12), Monarch(6, 12, (3, 2), 1, True), BlockSparse(6, 12, ("10", "11"), rank=1)):
        layer = StructuredConv2d(format, (1, 3), dtype=torch.float64)
        x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
        expected = nn.functional.conv2d(x, layer.to_dense().view(6, 4, 1, 3), layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_conv_refuses_same_padding_with_a_stride_as_nn_conv2d_does():
    with pytest.raises(ValueError, match="same"):
        nn.Conv2d(4, 6, 3, stride=2, padding="same")
    with pytest.raises(ValueError, match="same"):
        StructuredConv2d(LowRank(6, 36, 2), (3, 3), stride=(2, 2), padding="same")


def test_the_counterpart_of_a_layer_has_its_dtype_and_bias():
    for dense, format in (
        (nn.Linear(6, 4, bias=False, dtype=torch.bfloat16), LowRank(4, 6, 2)),
        (nn.Conv2d(2, 4, 3, bias=False, dtype=torch.bfloat16), LowRank(4, 18, 2)),
        (nn.Linear(6, 4, device="meta"), LowRank(4, 6, 2)),
    ):
        layer = DENSE_KINDS[type(dense)].structured(dense, format, None, None)
        assert {(p.dtype, p.device) for p in layer.parameters()} == {(dense.weight.dtype, dense.weight.device)}
        assert (layer.bias is None) == (dense.bias is None)


def problem(model: nn.Module, name: str) -> str | None:
    return find_sites(model)[name].problem


def test_sites_come_in_the_order_of_the_network():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)))
    sites = find_sites(model)
    assert list(sites) == ["0", "2.0"]
    assert sites["2.0"].modules == (model[2][0],)
    assert sites["2.0"].names == ("2.0",)
    assert sites["2.0"].matrix is model[2][0].weight
    assert torch.equal(sites["0"].matrix, model[0].weight.flatten(1))
    assert all(site.problem is None for site in sites.values())


def test_a_module_used_twice_is_one_site():
    linear = nn.Linear(4, 4)
    site = find_sites(nn.Sequential(linear, nn.ReLU(), nn.Sequential(linear)))
    assert list(site) == ["0"]
    assert site["0"].names == ("0", "2.0")
    assert site["0"].modules == (linear,)
    assert site["0"].problem is None


def test_linears_that_share_a_weight_are_one_site():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    sites = find_sites(model)
    assert list(sites) == ["0", "2"]
    assert sites["0"].names == ("0", "1")
    assert sites["0"].modules == (model[0], model[1])
    assert sites["0"].problem is None


@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_linear_tied_to_an_embedding_has_a_problem(embedding_first: bool):
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7)
    head.weight = embedding.weight
    layers = {"embedding": embedding, "head": head} if embedding_first else {"head": head, "embedding": embedding}
    site = find_sites(nn.ModuleDict(layers))["head"]
    assert site.problem == (
        "its weight is shared with 'embedding' (Embedding), which would keep the dense one; untie them first"
    )
    assert site.module is head
    assert site.matrix is head.weight


def test_a_weight_that_another_module_holds_under_another_name_has_a_problem():
    class Scale(nn.Module):
        def __init__(self, table: nn.Parameter) -> None:
            super().__init__()
            self.table = table

    linear = nn.Linear(4, 4)
    assert "shared with '1' (Scale)" in problem(nn.Sequential(linear, Scale(linear.weight)), "0")


def test_a_convolution_with_groups_has_a_problem():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3))
    assert "0" not in find_sites(model)  # its groups are layers of their own
    assert {problem(model, name) for name in ("0.group_0", "0.group_1", "1")} == {None}


def test_the_whole_model_has_a_problem():
    assert "it is the whole model, which cannot be replaced in place; wrap it in" in problem(nn.Linear(4, 4), "")


def test_subclasses_are_found_with_their_problem():
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    sites = find_sites(nn.Sequential(Doubled(4, 4), nn.LazyLinear(4), nn.Sequential()))
    assert {name: site.problem for name, site in sites.items()} == {
        name: f"it is a {type_name}, a Linear that may use its weight in other ways"
        for name, type_name in (
            ("0", "Doubled"),
            ("1", "LazyLinear"),
        )
    }


def test_a_weight_that_is_computed_has_a_problem():
    pruned, normed = nn.Linear(4, 4), nn.utils.spectral_norm(nn.Linear(4, 4))
    prune.l1_unstructured(pruned, "weight", 0.5)
    sites = find_sites(nn.Sequential(pruned, normed, nn.Linear(4, 4)))
    assert sites["0"].problem is not None
    assert sites["1"].problem is not None
    assert sites["2"].problem is None


def test_put_module_hangs_a_module_under_a_dotted_name():
    model = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(4, 4)))
    layer = StructuredLinear(LowRank(4, 4, 1))
    put_module(model, "1.0", layer)
    assert model[1][0] is layer


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_encoder_with_structured_layers_runs_in_eval_mode(activation: str):
    """PyTorch's fused inference path reads the dense weights of an encoder layer's children."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2)
    for name in ("layers.0.linear1", "layers.1.linear1"):
        put_module(encoder, name, StructuredLinear(Monarch(16, 8, 2, 2)))
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    trained = encoder.train()(x, src_key_padding_mask=mask)
    with torch.no_grad():
        inferred = encoder.eval()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(inferred[~mask], trained[~mask], rtol=1e-5, atol=1e-5)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.3, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01),
}
REAL = {name: format for name, format in LARGE.items() if format.name in FORMATS}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("format", REAL.values(), ids=REAL.keys())
def test_a_structured_network_trains_from_its_init(format: Format, optimizer):
    """A network with no dense layer learns what another one of its kind does."""
    teacher, student = (
        nn.Sequential(StructuredLinear(format), nn.GELU(), StructuredLinear(Blast(32, format.M, blocks=4, rank=16)))
        for _ in range(2)
    )
    x = torch.randn(64, format.N)
    target = teacher(x).detach()
    steps = optimizer(student.parameters())
    losses = []
    for _ in range(200):
        loss = nn.functional.mse_loss(student(x), target)
        losses.append(loss.item())
        steps.zero_grad()
        loss.backward()
        steps.step()
    assert losses[-1] < 0.1 * losses[0]
