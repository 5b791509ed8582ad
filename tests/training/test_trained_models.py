"""Trained networks: the figures that are known of them, and what retraining brings back."""

from pathlib import Path
from typing import Any

import pytest

from structmat import Blast, compress_, make_plan
from structmat.data import read_texts
from structmat.evaluate import perplexity
from structmat.integrations.transformers.retraining import retrain
from training.tiny import arguments, transformers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def texts(data_folder: Path) -> list[str]:
    return read_texts(f"{data_folder / 'tinystories-sample' / 'stories.txt.xz'}[-300:]")


def load(folder: Path) -> tuple[Any, Any]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


def test_the_known_perplexity(data_folder: Path, texts: list[str]) -> None:
    model, tokenizer = load(data_folder / "stories3M-llama")
    found = perplexity(model, tokenizer, texts, length=512, truncate=True, batch_size=16, progress=False)
    assert round(found.token, 2) == 3.87


def test_less_context_is_worse(data_folder: Path, texts: list[str]) -> None:
    model, tokenizer = load(data_folder / "stories260K-llama")
    found = [
        perplexity(model, tokenizer, texts[:40], length=length, stride=length // 4, progress=False)
        for length in (512, 64, 16)
    ]
    assert len({one.tokens for one in found}) == 1
    assert sorted(found, key=lambda one: one.nll) == found


def test_retraining_brings_back_most_of_what_compression_took(
    data_folder: Path, texts: list[str], tmp_path: Path
) -> None:
    teacher, tokenizer = load(data_folder / "stories260K-llama")
    model, _ = load(data_folder / "stories260K-llama")
    plan = make_plan(model, {r".*(mlp|self_attn).*": Blast}, keep=0.5, blocks=4, misfits="skip")
    compress_(model, plan, progress=False)
    options = {"length": 256, "truncate": True, "batch_size": 16, "progress": False}
    dense, before = (perplexity(m, tokenizer, texts[-100:], **options).token for m in (teacher, model))
    args = arguments(
        tmp_path, max_steps=150, per_device_train_batch_size=8, learning_rate=3e-3, distill_logits=1.0,
        warmup_steps=10, task_weight=0.5, logging_steps=50,
    )  # fmt: skip
    source = f"{data_folder / 'tinystories-sample' / 'stories.txt.xz'}[:1500]"
    found = retrain(model, tokenizer, source, texts[-100:], args, teacher=teacher, length=256)
    print(f"dense {dense:.3f}, compressed {before:.3f}, retrained {found['eval_perplexity']:.3f}")
    assert found["eval_perplexity"] < dense + 0.2 * (before - dense)
