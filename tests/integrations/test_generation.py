"""Whole language models with random weights: what is timed and in which order, and what is refused; never how fast."""

import functools
import json
from typing import Any

import pytest
import torch
from torch import nn

from structmat import Blast, Gblr, LowRank, Monarch, Rule, StructuredLinear, apply_plan_
from structmat.bench import IncorrectResultError
from structmat.integrations.transformers.generation import _Writer, bench_generation
from structmat.integrations.transformers.llamas import fill_, random_factors, random_llama

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}


def llamas(dtype: torch.dtype = torch.float32) -> dict[str, nn.Module]:
    return {
        "dense": random_llama("llama-tiny", dtype=dtype, **TINY),
        "blast": random_llama("llama-tiny", Rule(Blast, 0.5, 2), dtype=dtype, **TINY),
    }


def test_models_with_random_weights() -> None:
    models = llamas(torch.bfloat16)
    layers = [module for module in models["blast"].modules() if isinstance(module, StructuredLinear)]
    assert len(layers) == 7
    for model in models.values():
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
        logits = model(torch.tensor([[1, 2, 3]])).logits
        assert torch.isfinite(logits).all()
    with pytest.raises(ValueError, match="expected a shape to be one of 'llama-7b', 'llama-tiny', got 'llama-8b'"):
        random_llama("llama-8b")


def test_random_factors_keep_the_size_of_the_input() -> None:
    for format in (Blast(64, 96, blocks=(4, 4), rank=20), Monarch(64, 96, blocks=(4, 4), rank=5), LowRank(64, 96, 7)):
        like = format.init()
        y = format.matmul(torch.randn(50, 96), random_factors(format, like))
        assert 0.2 < y.std() < 1.5
    gblr = Gblr(12, 10, 3, (20, 20))
    assert set(random_factors(gblr, gblr.init())) == set(gblr.factor_specs())
    model = apply_plan_(nn.Sequential(nn.Linear(12, 12)), {"0": LowRank(12, 12, 2)})
    before = model[0].left.clone()
    assert fill_(model)[0].left.shape == before.shape
    assert not torch.equal(model[0].left, before)
    assert torch.equal(model[0].bias, torch.ones(12))


def test_models_are_timed_beside_the_first() -> None:
    options: dict[str, Any] = {"rounds": 2, "most_tokens": 3, "progress": False}
    found = bench_generation(llamas(), prefill=[4], generate=[2, 6], training=[5], **options)
    settings = [(t.step, t.tokens, t.model, t.extrapolated) for t in found.times]
    assert settings == [
        (step, tokens, model, longer)
        for step, tokens, longer in [
            ("prefill", 4, False), ("decode", 1, False), ("generate", 2, False), ("generate", 6, True),
            ("training", 5, False),
        ]
        for model in ("dense", "blast")
    ]  # fmt: skip
    assert all(t.speedup == 1 for t in found.times if t.model == "dense")
    assert found.sizes["blast"].parameters < found.sizes["dense"].parameters
    assert found.sizes["dense"].bytes >= 4 * found.sizes["dense"].parameters
    assert found.sizes["dense"].peak_bytes is None
    data = json.loads(found.to_json())
    assert data["settings"]["mode"] == "eager"
    assert data["models"][0]["tokens_per_second"] == found.times[0].tokens_per_second


def eager_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``torch.compile`` trace alone, which needs no compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def test_compiled_models(monkeypatch: pytest.MonkeyPatch) -> None:
    eager_compile(monkeypatch)
    found = bench_generation(
        llamas(), prefill=[4], generate=[3], training=[4], rounds=1, mode="compile", progress=False
    )
    assert [t.step for t in found.times[::2]] == ["prefill", "decode", "generate", "training"]


def test_static_and_growing_caches_give_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    eager_compile(monkeypatch)
    for model in llamas().values():
        texts = []
        for mode in ("eager", "compile"):
            torch.manual_seed(3)
            writer = _Writer(model, 6, mode)
            text = []
            for _ in range(2):
                writer._restart()
                for _ in range(6):
                    writer.step()
                    text.append(int(writer.ids))
            texts.append(text)
        assert texts[0] == texts[1]
        assert texts[0][:6] == texts[0][6:]


def test_no_model_is_timed_when_a_layer_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    models = llamas()
    right = Blast.matmul
    monkeypatch.setattr(Blast, "matmul", lambda *arguments, **options: right(*arguments, **options) + 0.5)
    with pytest.raises(IncorrectResultError, match="the product of Blast"):
        bench_generation(models, prefill=[4], generate=[2], progress=False)


def test_wrong_options_of_models() -> None:
    models = llamas()
    with pytest.raises(ValueError, match="expected at least one model, got none"):
        bench_generation({})
    with pytest.raises(ValueError, match="expected generate to be an integer of at least 1, got 0"):
        bench_generation(models, generate=[0])
    with pytest.raises(ValueError, match="expected most_tokens to be an integer of at least 1, got 0"):
        bench_generation(models, most_tokens=0)
    with pytest.raises(ValueError, match="expected a CUDA device for the mode 'graphs'"):
        bench_generation(models, mode="graphs")
    with pytest.raises(
        ValueError, match=r"on one device and of one dtype, got dense: cpu, torch\.float32, blast: cpu, torch\.bf"
    ):
        bench_generation({**models, "blast": models["blast"].bfloat16()})
