"""Attention, recurrent layers and convolutions with a layer for each matrix are those of PyTorch, number by number."""

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from structmat import Dense
from structmat.nn import (
    SplitAttention,
    SplitGroups,
    SplitModule,
    SplitRecurrent,
    StructuredConv,
    StructuredConv1d,
    StructuredConv2d,
    StructuredConvTranspose1d,
    StructuredConvTranspose2d,
    unfolded_results,
)

BATCH, QUERIES, KEYS = 3, 5, 7
TOLERANCE = 1e-6


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data.detach()]
    return (
        [value.detach()]
        if isinstance(value, Tensor)
        else [one for part in value if part is not None for one in flat(part)]
    )


def same(ours: Any, theirs: Any) -> None:
    mine, own = flat(ours), flat(theirs)
    assert [one.shape for one in mine] == [one.shape for one in own]
    for one, other in zip(mine, own, strict=True):
        assert (one - other).abs().max() <= TOLERANCE * max(1.0, float(other.abs().max()))


def same_gradients(theirs: nn.Module, split: type[SplitModule], run: Any) -> None:
    """A backward pass of both has the same gradients, once the parts are put together."""
    ours = split(copy.deepcopy(theirs))  # type: ignore[call-arg]
    for module in (ours, theirs):
        y = run(module)
        (y * torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    for parameter in ours.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, got in ours.joined().named_parameters():
        torch.testing.assert_close(got.detach(), wanted[name], rtol=1e-5, atol=1e-5)


def attention(batch_first: bool, same_sizes: bool, added: bool, zero: bool, bias: bool) -> nn.MultiheadAttention:
    sizes = {} if same_sizes else {"kdim": 6, "vdim": 10}
    return nn.MultiheadAttention(8, 4, 0.0, bias, added, zero, batch_first=batch_first, **sizes)  # type: ignore


def reads(module: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((QUERIES, module.embed_dim), (KEYS, module.kdim), (KEYS, module.vdim))
    found = [torch.randn(BATCH, *shape) for shape in shapes]
    q, k, v = found if module.batch_first else [one.transpose(0, 1) for one in found]
    return q, k, v


def masks() -> list[dict[str, Tensor]]:
    padding = torch.arange(KEYS) >= torch.tensor([7, 4, 5])[:, None]
    seen = torch.rand(QUERIES, KEYS) > 0.7
    seen[:, 0] = False
    added = torch.randn(BATCH * 4, QUERIES, KEYS)
    numbers = torch.zeros(BATCH, KEYS).masked_fill(padding, -1e4)
    return [{}, {"key_padding_mask": padding}, {"attn_mask": seen}, {"attn_mask": added, "key_padding_mask": numbers}]


@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=5)))
def test_attention_is_pytorchs(options: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    theirs = attention(*options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours, inputs = SplitAttention(theirs), reads(theirs)
    for mask in masks():
        for weights, average in ((True, True), (True, False), (False, True)):
            asked: dict[str, Any] = {"need_weights": weights, "average_attn_weights": average, **mask}
            same(ours(*inputs, **asked), theirs(*inputs, **asked))
    alone = [one[0] if theirs.batch_first else one[:, 0] for one in inputs]
    same(
        ours(*alone, key_padding_mask=masks()[1]["key_padding_mask"][1]),
        theirs(*alone, key_padding_mask=masks()[1]["key_padding_mask"][1]),
    )
    joined = ours.joined()
    assert list(joined.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(joined.state_dict()[name], one) for name, one in theirs.state_dict().items())


def test_attention_on_itself_and_on_the_past() -> None:
    theirs = attention(True, True, False, False, True)
    ours, x = SplitAttention(theirs), torch.randn(BATCH, QUERIES, 8)
    causal = nn.Transformer.generate_square_subsequent_mask(QUERIES)
    for weights in (True, False):
        asked: dict[str, Any] = {"attn_mask": causal, "is_causal": True, "need_weights": weights}
        same(ours(x, x, x, **asked), theirs(x, x, x, **asked))
        with torch.no_grad():
            same(ours.eval()(x, x, x, **asked), theirs.eval()(x, x, x, **asked))
        ours.train(), theirs.train()
    same_gradients(theirs, SplitAttention, lambda module: module(x, x, x)[0])


def test_dropout_of_attention_draws_the_same() -> None:
    theirs = nn.MultiheadAttention(8, 2, dropout=0.5)
    ours, x = SplitAttention(theirs), torch.randn(QUERIES, BATCH, 8)
    found = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        found.append(module(x, x, x))
    same(*found)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_what_attention_refuses() -> None:
    ours, x = SplitAttention(nn.MultiheadAttention(8, 2, batch_first=True)), torch.randn(BATCH, QUERIES, 8)
    with pytest.raises(ValueError, match=r"expected query, key and value with 3 axes each"):
        ours(x, x[0], x)
    with pytest.raises(ValueError, match=r"expected an attn_mask with is_causal=True"):
        ours(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match=r"expected attn_mask of shape \(5, 5\) or \(6, 5, 5\), got \(5, 4\)"):
        ours(x, x, x, attn_mask=torch.zeros(5, 4))
    with pytest.raises(ValueError, match=r"expected key_padding_mask of shape \(3, 5\), got \(3, 4\)"):
        ours(x, x, x, key_padding_mask=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="expected a mask of booleans or of floating-point numbers"):
        ours(x, x, x, attn_mask=torch.zeros(5, 5, dtype=torch.int64))
    nested = torch.nested.nested_tensor([torch.randn(2, 8), torch.randn(3, 8)])
    with pytest.raises(ValueError, match="expected plain tensors, got a nested one"):
        ours(nested, nested, nested)


kinds = st.sampled_from([nn.LSTM, nn.GRU, nn.RNN])


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
@settings(max_examples=25, deadline=None)
@given(kinds, st.integers(1, 3), st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99))
def test_recurrent_layers_are_pytorchs(
    kind: Any, layers: int, both: bool, bias: bool, batch_first: bool, odd: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    special = {nn.LSTM: {"proj_size": 3}, nn.RNN: {"nonlinearity": "relu"}}.get(kind, {}) if odd else {}
    dropout = 0.3 if layers > 1 else 0.0
    theirs = kind(6, 8, layers, bias=bias, batch_first=batch_first, dropout=dropout, bidirectional=both, **special)
    ours, x = SplitRecurrent(theirs), torch.randn(4, 5, 6)
    found = []
    for module in (ours, theirs):
        torch.manual_seed(seed)
        found.append(module(x))
    same(*found)
    ours.eval(), theirs.eval()
    first = theirs(x)[1]
    same(ours(x, first), theirs(x, first))
    alone = theirs(x[0])[1]
    same(ours(x[0], alone), theirs(x[0], alone))
    lengths = torch.randint(1, (5 if batch_first else 4) + 1, (4 if batch_first else 5,))
    for ordered in (False, True):
        given_lengths = lengths.sort(descending=True).values if ordered else lengths
        packed = pack_padded_sequence(x, given_lengths, batch_first=batch_first, enforce_sorted=ordered)
        same(ours(packed, first), theirs(packed, first))
        same(ours(packed), theirs(packed))
    assert list(ours.joined().state_dict()) == list(theirs.state_dict())
    same(ours.joined()(x), theirs(x))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_gradients_through_time_are_pytorchs(kind: Any) -> None:
    theirs, x = kind(4, 5, 2, bidirectional=True), torch.randn(6, 3, 4)
    same_gradients(theirs, SplitRecurrent, lambda module: module(x)[0])


def test_what_recurrent_layers_refuse() -> None:
    ours = SplitRecurrent(nn.GRU(4, 5))
    with pytest.raises(ValueError, match=r"expected an input with 3 axes, or 2 without a batch, and 4 features"):
        ours(torch.randn(3, 2, 5))
    with pytest.raises(ValueError, match=r"expected a first state of shape \[\(1, 2, 5\)\], got \[\(1, 3, 5\)\]"):
        ours(torch.randn(3, 2, 4), torch.zeros(1, 3, 5))
    ours.flatten_parameters()
    with pytest.raises(NotImplementedError, match="SplitModule does not say what it stands in for"):
        SplitModule().joined()


def dense_conv(layer: Any) -> StructuredConv:
    kind = StructuredConv1d if isinstance(layer, nn.Conv1d) else StructuredConv2d
    weight = layer.weight.flatten(1)
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.padding_mode)
    new = kind(Dense(*weight.shape), *geometry, factors={"weight": weight})
    new.bias = layer.bias
    return new


def convolutions() -> list[Any]:
    found = []
    modes = ("zeros", "reflect", "replicate", "circular")
    for kind, k, (stride, padding), d, mode in itertools.product(
        (nn.Conv1d, nn.Conv2d), (1, 3), ((1, 0), (2, 1), (1, "same")), (1, 2), modes
    ):
        options = {"kernel_size": k, "stride": stride, "padding": padding, "dilation": d}
        found.append((kind, {**options, "padding_mode": mode}))
    return found


def test_convolutions_are_pytorchs() -> None:
    for kind, options in convolutions():
        x = torch.randn(2, 4, *(7, 8)[: 1 if kind is nn.Conv1d else 2])
        theirs, grouped = kind(4, 6, **options), kind(4, 6, groups=2, **options)
        ours, split = dense_conv(theirs), SplitGroups(grouped)
        same(ours(x), theirs(x))
        same(ours(x[0]), theirs(x[0]))
        same(split(x), grouped(x))
        same(split(x[0]), grouped(x[0]))
        assert torch.equal(ours.out_of_dense_layout(theirs.weight), ours.to_dense())
    same_gradients(grouped, SplitGroups, lambda module: module(x))


def transposed() -> list[Any]:
    found = []
    for kind, k, stride, padding, more, d in itertools.product(
        (nn.ConvTranspose1d, nn.ConvTranspose2d), (1, 3), (1, 2), (0, 1), (0, 1), (1, 2)
    ):
        if more < max(stride, d):
            found.append(
                (kind, {"kernel_size": k, "stride": stride, "padding": padding, "output_padding": more, "dilation": d})
            )
    return found


def test_transposed_convolutions_are_pytorchs() -> None:
    torch.manual_seed(0)
    for kind, options in transposed():
        one = kind is nn.ConvTranspose1d
        x = torch.randn(2, 4, *(5, 6)[: 1 if one else 2])
        theirs, grouped = kind(4, 6, **options), kind(4, 6, groups=2, **options)
        matrix = theirs.weight.flatten(1).mT
        ours = (StructuredConvTranspose1d if one else StructuredConvTranspose2d)(
            Dense(*matrix.shape), **options, factors={"weight": matrix}
        )
        ours.bias = theirs.bias
        same(ours(x), theirs(x))
        same(ours(x[0]), theirs(x[0]))
        same(SplitGroups(grouped)(x), grouped(x))
        same(SplitGroups(grouped).joined()(x), grouped(x))
        assert torch.equal(ours.in_dense_layout(ours.to_dense()), theirs.weight)
        assert torch.equal(ours.out_of_dense_layout(theirs.weight), ours.to_dense())
        products = torch.randn(2, x[0, 0].numel(), len(matrix), requires_grad=True)
        y = ours.through(x, lambda _, made=products: made)
        gradient = torch.randn_like(y)
        y.backward(gradient)
        same(unfolded_results(theirs, gradient), products.grad)


def test_a_transposed_convolution_takes_the_size_of_its_output() -> None:
    theirs = nn.ConvTranspose2d(4, 6, 3, 2, 1, groups=2)
    x = torch.randn(2, 4, 5, 5)
    ours = SplitGroups(theirs)
    matrix = ours.get_submodule("group_0").get_parameter("weight").flatten(1).mT
    part = StructuredConvTranspose2d(Dense(*matrix.shape), 3, 2, 1, factors={"weight": matrix})
    part.bias = ours.get_submodule("group_0").get_parameter("bias")
    ours.add_module("group_0", part)
    for size in ((9, 9), (10, 9), (10, 10)):
        same(ours(x, output_size=size), theirs(x, output_size=size))
    with pytest.raises(ValueError, match=r"expected an output size from \[9, 9\] to \[10, 10\], got \[12, 9\]"):
        part(x[:, :2], output_size=[12, 9])
    with pytest.raises(ValueError, match="expected M to be a multiple of the kernel's 9 positions, got 10"):
        StructuredConvTranspose2d(Dense(10, 4), 3)
    with pytest.raises(ValueError, match=r"expected an input \(batch, 2, height, width\)"):
        part(x)
    with pytest.raises(ValueError, match="expected an input with 4 channels before 2 axes"):
        ours(x[:, :2])
