"""Which vectors of a layer are tokens that count, whatever their shape, and which are padding."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structmat as sm
from small_networks import generator, padding, sequences
from structmat.network.masks import SHAPE_RULE, BatchMasks, find_masks

WIDTH = 12
MASK = padding()
"""The tokens that count in each of 4 sequences of 9."""
REAL = int(MASK.sum())


def tokens_seen(model: nn.Module, batch: dict[str, Any]) -> dict[str, int]:
    """How many vectors of each linear layer count."""
    plan = {n: sm.LowRank(*m.weight.shape, 2) for n, m in model.named_modules() if type(m) is nn.Linear}
    found = sm.calibrate(model, [batch], plan, progress=False)
    return {name: moments.tokens for name, moments in found.items()}


class Shaped(nn.Module):
    """Embeds tokens, and applies a layer to them in a shape of its own."""

    def __init__(self, shaped: Callable[[Tensor], Tensor], width: int = WIDTH) -> None:
        super().__init__()
        self.shaped = shaped
        self.embed = nn.Embedding(50, WIDTH)
        self.layer = nn.Linear(width, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(self.shaped(self.embed(input_ids)))


def ids(seed: int = 0) -> Tensor:
    drawn = torch.randint(1, 50, (4, 9), generator=generator(seed))
    return drawn * MASK  # padding is 0


def prefixed(x: Tensor) -> Tensor:
    return torch.cat([torch.ones(len(x), 2, WIDTH), x], 1)


def partly_constant(x: Tensor) -> Tensor:
    """All padding but the first of each sequence is the same whatever it says, as where a sliding window is empty."""
    speaking = torch.arange(MASK.shape[1]) <= MASK.sum(1, keepdim=True)
    return x.where(speaking[..., None], 1)


def attending(x: Tensor) -> Tensor:
    """Padding reads the tokens, each with the weight of its place, and nothing of the padding."""
    mask = MASK[:, : x.shape[1], None]
    read = (x * mask * torch.arange(1, x.shape[1] + 1)[:, None]).sum(1, keepdim=True)
    return x.where(mask.bool(), read)


FORMS = (
    *("rows", "flat", "one", "columns", "flat columns", "heads", "heads first", "prefix", "reversed", "unpadded"),
    *("silent", "pooled", "partly constant", "attending"),
)


@pytest.mark.parametrize(
    ("shaped", "width", "expected"),
    [
        (lambda x: x, WIDTH, REAL),
        (lambda x: x.reshape(-1, WIDTH), WIDTH, REAL),
        (lambda x: x.reshape(1, -1, WIDTH), WIDTH, REAL),
        (lambda x: x.transpose(0, 1), WIDTH, REAL),
        (lambda x: x.transpose(0, 1).reshape(-1, WIDTH), WIDTH, REAL),
        (lambda x: x.reshape(4, 9, 3, 4), 4, 3 * REAL),
        (lambda x: x.reshape(4, 9, 3, 4).transpose(1, 2), 4, 3 * REAL),
        (prefixed, WIDTH, REAL + 4 * 2),
        (lambda x: prefixed(x).flip(1), WIDTH, 4 * 11),  # no layout: told by a warning
        (lambda x: x[MASK.bool()], WIDTH, REAL),  # no padding is left
        (lambda x: x * MASK[..., None], WIDTH, REAL),  # the padding is silent
        (lambda x: x[:, 0], WIDTH, 4),
        (partly_constant, WIDTH, REAL),
        (attending, WIDTH, REAL),
    ],
    ids=FORMS,
)
def test_padding_is_told_apart_in_every_shape(
    shaped: Callable[[Tensor], Tensor], width: int, expected: int, request: pytest.FixtureRequest
) -> None:
    batch = {"input_ids": ids(), "attention_mask": MASK}
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "the vectors of")
        assert tokens_seen(Shaped(shaped, width), batch) == {"layer": expected}
    assert [str(one.message).startswith("the vectors of ['layer'] depend on padding") for one in caught] == (
        [True] if "reversed" in request.node.name else []
    )


class TwoSides(nn.Module):
    """An encoder, a decoder that reads it, and an image's patches, all with as many tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDTH)
        self.encode, self.decode, self.key = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.patches, self.late = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)

    def forward(
        self,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        pixels: Tensor,
        attention_mask: Tensor,
        decoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        encoded = self.encode(self.embed(input_ids))
        weights = attention_mask / attention_mask.sum(1, keepdim=True)
        seen = (self.key(encoded) * weights[..., None]).sum(1, keepdim=True)
        return self.late(self.decode(self.embed(decoder_input_ids)) + seen + self.patches(pixels))


def test_each_side_of_a_network_has_its_own_mask() -> None:
    decoder = MASK.flip(0).clone()
    decoder[0, 2:] = 0
    batch = {
        "input_ids": ids(),
        "decoder_input_ids": torch.randint(1, 50, (4, 9), generator=generator(3)),
        "pixels": sequences(1)[0],
        "attention_mask": MASK,
    }
    everything = {"encode": REAL, "key": REAL, "decode": 36, "patches": 36, "late": 36}
    assert tokens_seen(TwoSides(), batch) == everything
    shown = int(decoder.sum())
    found = tokens_seen(TwoSides(), batch | {"decoder_attention_mask": decoder})
    assert found == everything | {"decode": shown, "late": shown}
    full = torch.ones_like(MASK)
    found = tokens_seen(TwoSides(), batch | {"attention_mask": full, "decoder_attention_mask": decoder})
    assert found == {"encode": 36, "key": 36, "decode": shown, "patches": 36, "late": shown}


def test_a_mask_of_padding_is_the_other_way_round() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 8)

        def forward(self, src: Tensor, src_key_padding_mask: Tensor) -> Tensor:
            return self.layer(src)

    batch = {"src": sequences(1)[0], "src_key_padding_mask": ~MASK.bool()}
    assert tokens_seen(Encoder(), batch) == {"layer": REAL}


def test_a_network_that_takes_no_other_content_is_judged_by_shape() -> None:
    class Picky(Shaped):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            if (input_ids[~MASK.bool()] != 0).any():
                raise ValueError("padding must be 0")
            return super().forward(input_ids, attention_mask)

    batch = {"input_ids": ids(), "attention_mask": MASK}
    assert tokens_seen(Picky(lambda x: x.reshape(-1, WIDTH)), batch) == {"layer": REAL}
    assert tokens_seen(Picky(lambda x: x[:, 0]), batch) == {"layer": 4}


def test_the_masks_of_each_batch_follow_the_rule_of_the_first_padded_one() -> None:
    model = Shaped(lambda x: x.reshape(-1, WIDTH))
    other = MASK.roll(1, 0)
    masks = [torch.ones_like(MASK), MASK, other]
    batches = [{"input_ids": ids(k), "attention_mask": mask} for k, mask in enumerate(masks)]
    found = find_masks(model, batches, {"layer": model.layer}, {"": model})
    for one, mask in zip(found, masks, strict=True):
        for name in ("layer", ">0"):
            counted = one.counted(name, torch.zeros(36, WIDTH))
            assert counted is not None
            assert torch.equal(counted, mask.flatten().bool())
    assert found[0].counted("another layer", torch.zeros(36, WIDTH)) is None


def test_no_call_is_made_where_nothing_is_padded() -> None:
    model = Shaped(lambda x: x)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    batches = [{"input_ids": ids(), "attention_mask": torch.ones_like(MASK)}, sequences(1)[0]]
    assert find_masks(model, batches, {"layer": model.layer}, {}) == [BatchMasks(), BatchMasks()]


def test_a_network_without_values_is_judged_by_shape() -> None:
    model = Shaped(lambda x: x).to("meta")
    (found,) = find_masks(model, [{"input_ids": ids(), "attention_mask": MASK}], {"layer": model.layer}, {})
    assert found.default is SHAPE_RULE
    counted = found.counted("layer", torch.zeros(36, WIDTH))
    assert counted is not None
    assert int(counted.sum()) == REAL


@pytest.mark.parametrize("refine", [False, True])
def test_padding_of_flat_vectors_decides_nothing_in_a_fit(refine: bool) -> None:
    """What padding says must not change the fit at all, with refinement and without."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(50, WIDTH)
            self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.second(self.first(self.embed(input_ids).reshape(-1, WIDTH)).relu())

    def fitted(pad: int) -> list[Tensor]:
        model = Flat()
        batches = [
            {"input_ids": ids(k).where(MASK.bool(), torch.tensor(pad)), "attention_mask": MASK} for k in range(6)
        ]
        settings = sm.Refinement(steps=8) if refine else None
        plan = sm.make_plan(model, {nn.Linear: sm.LowRank}, keep=0.5)
        sm.compress_(model, plan, batches=batches, refine=settings, progress=False)
        return [factor.detach() for layer in (model.first, model.second) for factor in layer.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(fitted(0), fitted(7), strict=True))


def test_the_families_that_were_reported() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "num_attention_heads": 4, "max_position_embeddings": 64}
    opt = transformers.OPTConfig(hidden_size=64, ffn_dim=96, num_hidden_layers=2, word_embed_proj_dim=64, **sizes)
    batch = {"input_ids": torch.randint(5, 128, (4, 9)), "attention_mask": MASK}
    counted = tokens_seen(transformers.OPTForCausalLM(opt).eval(), batch)
    counted.pop("lm_head", None)
    assert set(counted.values()) == {REAL}

    t5 = transformers.T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    decoder = MASK.flip(0)
    decoder[0, 2:] = 0
    both = {"decoder_input_ids": torch.randint(5, 128, (4, 9)), "decoder_attention_mask": decoder}
    counted = tokens_seen(transformers.T5ForConditionalGeneration(t5).eval(), batch | both)
    for name, count in counted.items():
        reads_encoder = name.startswith("encoder") or ".EncDecAttention.k" in name or ".EncDecAttention.v" in name
        assert count == (REAL if reads_encoder else int(decoder.sum())), name


def test_where_padding_changes_everything_the_mask_is_believed() -> None:
    class Leaks(Shaped):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.embed(input_ids)
            return self.layer(x + x.mean((0, 1)))

    batch = {"input_ids": ids(), "attention_mask": MASK}
    assert tokens_seen(Leaks(lambda x: x), batch) == {"layer": REAL}
