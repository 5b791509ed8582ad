"""Compress a language model: plan, compress, report, save, load, compare, retrain, generate.

Run it from a shell, or cell by cell in an editor that knows ``# %%``. It needs no download, because it trains a small
Llama in seconds on sentences that it makes itself. If STRUCTMAT_DATA names a folder with ``stories260K-llama``, it
takes that trained model and its stories instead. For a model of your own, start at "The plan".

    pip install 'structmat[train]'
    python examples/compress_llm.py
"""

# %% A model, its tokenizer, and texts: yours come from from_pretrained and read_texts
import copy
import os
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import structmat as sm
from structmat.data import read_texts, token_batches
from structmat.evaluate import perplexity, relative_flops
from structmat.integrations.transformers.arguments import StructuredTrainingArguments
from structmat.integrations.transformers.retraining import retrain

torch.manual_seed(0)
LENGTH = 96
folder = Path(tempfile.mkdtemp(prefix="structmat-example-"))


def sentences(count: int, seed: int) -> list[str]:
    """Little stories with a rule in them: the thing that somebody has decides what they do in the end."""
    chance = random.Random(seed)
    things = {"boat": "sailed away", "kite": "let it fly", "drum": "played a song", "book": "read it aloud"}
    texts = []
    for _ in range(count):
        name, other = chance.sample(["Ada", "Ben", "Cleo", "Dan", "Eva", "Finn"], 2)
        thing = chance.choice(list(things))
        colour, place = chance.choice(["red", "blue", "old", "tiny"]), chance.choice(["park", "sea", "school", "hill"])
        texts.append(
            f"{name} had a {colour} {thing}. One day {name} met {other} at the {place}. "
            f'"Is that your {colour} {thing}?" asked {other}. "Yes," said {name}, and they {things[thing]}.'
        )
    return texts


def new_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of these texts."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def arguments(name: str, **options: Any) -> StructuredTrainingArguments:
    """The settings of a short training, whose result goes to a folder of this name."""
    return StructuredTrainingArguments(
        output_dir=str(folder / name),
        per_device_train_batch_size=16,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **options,
    )


if "STRUCTMAT_DATA" in os.environ:
    data = Path(os.environ["STRUCTMAT_DATA"])
    tokenizer = AutoTokenizer.from_pretrained(data / "stories260K-llama")
    dense = AutoModelForCausalLM.from_pretrained(data / "stories260K-llama")
    stories = str(data / "tinystories-sample" / "stories.txt.xz")
    known, unseen = read_texts(f"{stories}[:200]"), read_texts(f"{stories}[-20:]")
    prompt, keep = "Once upon a time", 0.7
else:
    known, unseen = sentences(800, seed=0), sentences(50, seed=1)
    tokenizer = new_tokenizer(known)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    dense = LlamaForCausalLM(config)
    retrain(dense, tokenizer, known, None, arguments("dense", max_steps=300, learning_rate=4e-3), length=LENGTH)
    dense.eval()
    prompt, keep = "Ada had a red kite. One day", 0.4

# %% The plan says which layer gets which format; print it, edit it, or save it with plan.save
plan = sm.make_plan(dense, {r".*\.(self_attn|mlp)\..*_proj": "blast"}, keep=keep, blocks=4)
print("\n".join(str(plan).splitlines()[:7]))

# %% Compression goes block by block on calibration data and refines each block, without labels or training
model = copy.deepcopy(dense)
batches = token_batches(tokenizer, sorted(known[:96], key=len), length=LENGTH, batch_size=16)
fits = sm.compress_(model, plan, batches=batches, refine=sm.Refinement(steps=20))

# %% The report says what every layer is, what it costs, and how far it is from the weight that it replaced
report = sm.report(model, fits=fits)
print("\n".join(str(report).splitlines()[:9]))
print(f"parameters: {report.dense_parameters:,} -> {report.parameters:,}")

# %% Save and load, as always with transformers
model.save_pretrained(folder / "small")
tokenizer.save_pretrained(folder / "small")
small = AutoModelForCausalLM.from_pretrained(folder / "small")

# %% Compare the dense and the compressed model
scores = {
    name: perplexity(network, tokenizer, unseen, length=LENGTH, progress=False)
    for name, network in (("dense", dense), ("compressed", small))
}
flops = relative_flops(small, {"input_ids": torch.zeros(1, LENGTH, dtype=torch.long)})
for name, score in scores.items():
    print(f"{name:>10}: {score}")
print(f"operations: {flops.relative:.3f} of the dense model's")

# %% Retrain for a few steps, with the dense model as teacher
args = arguments(
    "better", max_steps=30, learning_rate=3e-4, lr_scheduler_type="cosine", warmup_steps=5, distill_logits=1.0
)
retrain(small, tokenizer, known, unseen, args, teacher=dense, length=LENGTH)
better: Any = AutoModelForCausalLM.from_pretrained(folder / "better")
scores["retrained"] = perplexity(better, tokenizer, unseen, length=LENGTH, progress=False)
print(" -> ".join(f"{name} {score.token:.3f}" for name, score in scores.items()))

# %% Generate
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
written = better.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=0)
print(tokenizer.decode(written[0], skip_special_tokens=True))
