"""Networks that keep state, draw at random, route tokens, return several tensors, or run in an unusual mode."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from chains import transformer
from structmat import LowRank, Refinement, compress_, make_plan
from structmat.compress import sequential as sequential_module
from structmat.fit import Fit
from structmat.network.calls import same_draws

RULES = {r".*_proj": LowRank}


def ids(count: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(5, 60, (2, 9), generator=g) for _ in range(count)]


def errors(fits: dict[str, Fit]) -> dict[str, tuple[float, float | None]]:
    return {name: (fit.error, fit.output_error) for name, fit in fits.items()}


def compressed(
    model: nn.Module, plan: Any, batches: list[Any], **options: Any
) -> dict[str, tuple[float, float | None]]:
    return errors(compress_(copy.deepcopy(model), plan, batches=batches, progress=False, **options))


def make_exact_(model: nn.Module, rank: int) -> None:
    """Give every weight this rank, so that a fit can be exact."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            U, S, Vh = torch.linalg.svd(layer.weight.data, full_matrices=False)
            layer.weight.data = (U[:, :rank] * S[:rank]) @ Vh[:rank]


# State that one call leaves to the next


def test_a_cache_that_the_batch_asks_for_changes_nothing() -> None:
    model = transformer("LlamaForCausalLM")
    plan = make_plan(model, RULES, keep=0.5)
    plain = compressed(model, plan, [{"input_ids": x} for x in ids()])
    assert compressed(model, plan, [{"input_ids": x, "use_cache": True} for x in ids()]) == plain
    settings = Refinement(steps=2)
    refined = [
        compressed(model, plan, [{"input_ids": x, "use_cache": cached} for x in ids()], refine=settings)
        for cached in (False, True)
    ]
    assert refined[0] == refined[1]


def test_a_cache_in_the_batch_is_left_alone() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformer("LlamaForCausalLM")
    plan = make_plan(model, RULES, keep=0.5)
    caches = [transformers.DynamicCache(config=model.config) for _ in ids()]
    batches = [{"input_ids": x, "past_key_values": cache} for x, cache in zip(ids(), caches, strict=True)]
    assert compressed(model, plan, batches) == compressed(model, plan, [{"input_ids": x} for x in ids()])
    assert [cache.get_seq_length() for cache in caches] == [0] * len(caches)


def test_a_cache_with_a_prefix_that_was_computed_with_gradients_is_read_and_left_alone() -> None:
    model = transformer("LlamaForCausalLM")
    plan = make_plan(model, RULES, keep=0.5)
    batches = []
    for x in ids():
        cache = model(input_ids=x, use_cache=True).past_key_values
        batches.append({"input_ids": x, "past_key_values": cache})
    first = compressed(model, plan, batches)
    assert [batch["past_key_values"].get_seq_length() for batch in batches] == [9] * len(batches)
    assert compressed(model, plan, batches) == first


def test_the_cache_of_a_part_with_its_own_configuration_is_off() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = transformers.LlamaConfig(vocab_size=64, **sizes)
    vision = transformers.CLIPVisionConfig(image_size=32, patch_size=8, **sizes)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=4)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    plan = make_plan(model, {r"model\.language_model\..*": LowRank}, keep=0.5)
    off = copy.deepcopy(model)
    off.config.text_config.use_cache = False
    batches = [{"input_ids": x} for x in ids()]
    assert compressed(model, plan, batches) == compressed(off, plan, batches)
    assert model.config.text_config.use_cache is True


# Chains, and what only looks like one


class Remembers(nn.Module):
    """A block that passes something on beside the hidden state."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.a, self.b, self.first = nn.Linear(16, 16), nn.Linear(16, 16), first

    def forward(self, x: Tensor, memo: dict[str, Tensor]) -> Tensor:
        h = torch.tanh(self.a(x))
        if self.first:
            memo["h"] = h
        return x + self.b(h if self.first else h + memo["h"])


class SideChannel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Remembers(k == 0) for k in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        memo: dict[str, Tensor] = {}
        for layer in self.layers:
            x = layer(x, memo=memo)
        return x


def test_blocks_that_are_coupled_otherwise_are_one_block_and_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SideChannel()
    plan = make_plan(model, {nn.Linear: LowRank}, keep=0.5)
    data = [torch.randn(20, 16) for _ in range(3)]
    with pytest.warns(
        UserWarning, match=r"'layers.0' to 'layers.2' cannot be called one by one \(that raises KeyError"
    ):
        found = compressed(model, plan, data)
    monkeypatch.setattr(sequential_module, "find_chain", lambda *_: None)
    assert found == compressed(model, plan, data)


class Tuples(nn.Module):
    """A block that returns three things, the last of which the network unpacks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, None, str]:
        return x + self.b(torch.relu(self.a(x))), None, "note"


class Unpacks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(8, 16), nn.ModuleList([Tuples(), Tuples()]), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x, _, _ = block(x)
        return self.head(x)


class Stage(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.a(x)) + self.b(torch.relu(self.a(x)))


class Widens(nn.Module):
    """Stages that change the width, with layers before and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(8, 16), nn.LayerNorm(32), nn.Linear(32, 8)
        self.stages = nn.Sequential(Stage(16, 16), Stage(16, 24), Stage(24, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stages(self.stem(x))))


@pytest.mark.parametrize("kind", [Unpacks, Widens])
def test_a_chain_gives_what_the_network_as_one_block_does(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    plan = make_plan(model, {nn.Linear: LowRank}, keep=0.6)
    data = [torch.randn(40, 8) for _ in range(3)]
    found = compressed(model, plan, data)
    monkeypatch.setattr(sequential_module, "find_chain", lambda *_: None)
    for name, expected in compressed(model, plan, data).items():
        assert found[name] == pytest.approx(expected, rel=1e-5)


# Random draws


class Draws(nn.Module):
    """A network that drops a random half of its inputs, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.rand(len(x), device=x.device).argsort()[: len(x) // 2]
        return self.b(torch.tanh(self.a(x[kept])))


def test_the_dense_and_the_compressed_network_draw_the_same() -> None:
    torch.manual_seed(0)
    model = Draws()
    make_exact_(model, 6)
    data = [torch.randn(80, 24, generator=torch.Generator().manual_seed(k)) for k in range(5)]
    fits = compress_(model, {"a": LowRank(24, 24, 6), "b": LowRank(24, 24, 6)}, batches=data, progress=False)
    assert max(fit.error for fit in fits.values()) < 1e-4


def test_draws_are_the_same_for_a_seed_and_disturb_no_generator() -> None:
    state, drawn = torch.get_rng_state(), []
    for seed in (3, 3, 4):
        with same_draws(seed, torch.device("cpu")):
            drawn.append(torch.rand(5))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), state)


# Tokens that are routed


class Experts(nn.Module):
    """Two experts, each for the vectors on one side of a plane."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16) if first else nn.Identity()
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y, chosen = torch.zeros_like(h), (h[:, 0] > 0).long()
        for k, expert in enumerate(self.experts):
            if (chosen == k).any():
                y[chosen == k] = expert(h[chosen == k])
        return y


def test_the_order_of_batches_that_reach_other_experts_does_not_matter() -> None:
    torch.manual_seed(0)
    model = Experts(first=False)
    plan = {f"experts.{k}": LowRank(16, 16, 4) for k in range(2)}
    both = [torch.randn(40, 16) for _ in range(2)]
    one = torch.cat([-torch.rand(40, 1), torch.randn(40, 15)], 1)
    first, last = (compressed(model, plan, data) for data in ([one, *both], [*both, one]))
    for name, expected in first.items():
        assert last[name] == pytest.approx(expected, rel=1e-5)


def test_an_expert_that_no_batch_reaches_is_named() -> None:
    one = torch.cat([-torch.rand(40, 1), torch.randn(40, 15)], 1)
    with pytest.raises(ValueError, match=re.escape("the calibration data never reaches ['experts.1']")):
        compressed(Experts(first=False), {"experts.1": LowRank(16, 16, 4)}, [one, one])


def test_routing_that_changes_once_compressed_pairs_no_wrong_vectors() -> None:
    torch.manual_seed(0)
    model = Experts(first=True)
    plan = make_plan(model, {nn.Linear: LowRank}, keep=0.5)
    data = [torch.randn(200, 16) for _ in range(4)]
    fits = compressed(model, plan, data)
    alone = compressed(model, {name: format for name, format in plan.items() if name != "first"}, data)
    for name, (error, _) in alone.items():
        assert fits[name][0] < 1.3 * error


# Several outputs


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.boxes, self.classes = nn.Linear(16, 24), nn.Linear(24, 8), nn.Linear(24, 10)
        self.unused = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = torch.relu(self.body(x))
        self.unused(h)
        return {"loss": h.sum(), "boxes": self.boxes(h), "more": [self.classes(h)]}


def test_all_outputs_of_a_network_are_refined() -> None:
    torch.manual_seed(0)
    model = Heads()
    plan = make_plan(model, {nn.Linear: LowRank}, keep=0.6)
    data = [torch.randn(64, 16) for _ in range(8)]

    def error(settings: Refinement | None) -> dict[str, float]:
        small = copy.deepcopy(model)
        compress_(small, plan, batches=data, refine=settings, progress=False)
        with torch.no_grad():
            dense, got = model(data[0]), small(data[0])
        return {
            "boxes": float((got["boxes"] - dense["boxes"]).norm()),
            "classes": float((got["more"][0] - dense["more"][0]).norm()),
        }

    before, after = error(None), error(Refinement(steps=60, learning_rate=1e-2))
    assert after["boxes"] < 0.95 * before["boxes"]
    assert after["classes"] < 0.95 * before["classes"]


# Modes around the call


def test_nothing_around_the_call_changes_the_result() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    plan = make_plan(model, {nn.Linear: LowRank}, keep=0.5)
    data = [torch.randn(16, 24) for _ in range(3)]
    expected = compressed(model, plan, data, refine=Refinement(steps=3))
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.no_grad()):
        with mode:
            assert compressed(model, plan, data, refine=Refinement(steps=3)) == expected
    torch.set_default_dtype(torch.float64)
    try:
        assert compressed(model, plan, data, refine=Refinement(steps=3)) == expected
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_network_compressed_in_inference_mode_can_be_trained() -> None:
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24))
    with torch.inference_mode():
        data = [torch.randn(16, 24) for _ in range(3)]
        plan = make_plan(model, {nn.Linear: LowRank}, keep=0.5)
        compress_(model, plan, batches=data, refine=Refinement(steps=3), progress=False)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model(torch.randn(2, 24)).sum().backward()


def test_compiled_blocks_are_calibrated() -> None:
    model = transformer("LlamaForCausalLM")
    plan = make_plan(model, RULES, keep=0.5)
    batches = [{"input_ids": x} for x in ids()]
    expected = compressed(model, plan, batches)
    for k in range(2):
        model.model.layers[k] = torch.compile(model.model.layers[k], backend="eager")
    compiled = {name.replace(".self_attn", "._orig_mod.self_attn").replace(".mlp", "._orig_mod.mlp"): format
                for name, format in plan.items()}  # fmt: skip
    with torch.no_grad():
        model(**batches[0])
    found = errors(compress_(model, compiled, batches=batches, progress=False))
    assert list(found.values()) == list(expected.values())


# Plans and copies


def test_an_empty_plan_changes_nothing_with_data_or_without() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    plan = make_plan(model, {nn.Linear: LowRank}, keep=0.5, misfits="skip")
    assert not plan
    assert compress_(model, plan, progress=False) == {}
    assert compress_(model, plan, batches=[torch.randn(2, 3, 3, 3)], progress=False) == {}


def test_a_layer_outside_the_plan_may_compute_its_weight() -> None:
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(24, 24))
    pruned = nn.Linear(24, 24)
    prune.random_unstructured(pruned, "weight", 0.5)
    model = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), normed, nn.ReLU(), pruned)
    model(torch.randn(2, 24)).sum().backward()
    plan = make_plan(model, {nn.Linear: LowRank}, keep=0.5, misfits="skip")
    assert list(plan) == ["0"]
    compress_(model, plan, batches=[torch.randn(8, 24)] * 3, progress=False)
    assert isinstance(pruned.weight_orig, nn.Parameter)
