"""Networks and tokenizers of ``transformers`` that are small enough for a test, and texts that they can learn."""

from __future__ import annotations

import re
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import torchvision_ops

torchvision_ops.declare()

import transformers  # noqa: E402

from structmat import Blast, GaudiGblr, LowRank, apply_plan_, compress_, make_plan  # noqa: E402
from structmat.data.tokens import language_collator  # noqa: E402
from structmat.fit import Lee2024Blast  # noqa: E402
from structmat.integrations.transformers.arguments import StructuredTrainingArguments  # noqa: E402
from structmat.integrations.transformers.trainer import StructuredTrainer  # noqa: E402

VOCABULARY = 128


def llama(*, seed: int = 0, tied: bool = True, layers: int = 2) -> Any:
    """A Llama of width 32."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert(*, seed: int = 0) -> Any:
    """A BERT of width 32 that tells two classes, without dropout."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def vit(*, seed: int = 0) -> Any:
    """A ViT of width 32 that tells three classes in images of 16 x 16."""
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def structured(model: Any) -> Any:
    """The model with its MLPs as fitted BLAST and its attention as low-rank matrices."""
    quick = Lee2024Blast(sweeps=4)
    rules = {r".*(mlp|intermediate|output\.dense|fc\d).*": Blast, r".*(attn|attention).*": LowRank}
    plan = make_plan(model, rules, keep=0.6, blocks=2, exclude=[r"lm_head|classifier"])
    compress_(model, plan, method=lambda format: quick if isinstance(format, Blast) else None, progress=False)
    return model


def learning_llama(seed: int = 0) -> Any:
    """A Llama whose linear layers learn their structure, from random contents."""
    model = llama(seed=seed)
    plan = make_plan(model, {r".*_proj": GaudiGblr}, keep=0.9)
    return apply_plan_(model, plan, generator=torch.Generator().manual_seed(seed))


def tokenizer(**options: Any) -> Any:
    """One token per word of ``w3 … w127``, with ``<s>``, ``</s>`` and ``<pad>``; it adds none of them itself."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{k}": k for k in range(3, VOCABULARY)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **options}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def sentences(count: int, *, seed: int = 0, longest: int = 20) -> list[str]:
    """Texts in which a word follows from the one before."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(count):
        length, first = (int(torch.randint(3, longest, (), generator=generator)) for _ in range(2))
        texts.append(" ".join(f"w{3 + (first + 7 * k) % (VOCABULARY - 3)}" for k in range(length)))
    return texts


def rows(count: int, *, seed: int = 0) -> list[list[int]]:
    """The ids of such texts, with a BOS in front."""
    return [[1, *(int(word) for word in re.findall(r"\d+", text))] for text in sentences(count, seed=seed)]


def images(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Images whose class is their brightest channel, as the ViT takes them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator).tolist()
    pixels = torch.randn(count, 3, 16, 16, generator=generator)
    return [
        {"pixel_values": pixels[k] + torch.eye(3)[labels[k]][:, None, None], "labels": labels[k]} for k in range(count)
    ]


def labelled(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of ids and the class of their length, as the BERT takes them."""
    return [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": len(ids) % 2} for ids in rows(count, seed=seed)
    ]


TASKS: dict[str, tuple[Any, Any, Any]] = {
    "causal-lm": (llama, rows, language_collator),
    "sequence-classification": (bert, labelled, transformers.DataCollatorWithPadding),
    "image-classification": (vit, images, lambda tokenizer: transformers.default_data_collator),
}
"""Per task a network, its data, and what makes batches of it."""


def arguments(folder: Any, **options: Any) -> StructuredTrainingArguments:
    """Settings of a short run on the CPU, that keeps quiet and saves nothing."""
    usual = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 4,
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "lr_scheduler_type": "cosine",
    }  # fmt: skip
    return StructuredTrainingArguments(output_dir=str(folder), **{**usual, **options})


def trainer(task: str, args: StructuredTrainingArguments, *, model: Any = None, **options: Any) -> StructuredTrainer:
    """A trainer of a structured network of this task, on 64 examples."""
    make, data, collator = TASKS[task]
    model = structured(make()) if model is None else model
    return StructuredTrainer(model, args, train_dataset=data(64), data_collator=collator(tokenizer()), **options)
