"""Compress a language model: plan, calibrate, refine, report, save, load, compare, retrain, generate.

Run it as it is, or cell by cell in an editor that knows ``# %%``. It needs no download: a small Llama is built and
trained on sentences made here, in seconds. With the folder ``stories260K-llama`` under STRUCTMAT_DATA it takes that
trained model and its stories instead. For a model of your own, start at "The plan".

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


def sentences(count: int, seed: int) -> list[str]:
    """Little stories with a rule in them: what somebody has is what they use in the end."""
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


def new_model(tokenizer: PreTrainedTokenizerFast, texts: list[str], steps: int) -> LlamaForCausalLM:
    """A small Llama, trained for some seconds."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    batches = token_batches(tokenizer, texts, length=96, batch_size=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(steps):
        batch = batches[step % len(batches)]
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


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
    dense = new_model(tokenizer, known, steps=300)
    prompt, keep = "Ada had a red kite. One day", 0.4

# %% The plan: which layers get which format. Edit it, print it, store it as JSON
plan = sm.make_plan(dense, {r".*\.(self_attn|mlp)\..*_proj": sm.Blast}, keep=keep, blocks=4)
print("\n".join(str(plan).splitlines()[:7]))

# %% Compression, block by block on calibration data, each block refined: no labels, no training
model = copy.deepcopy(dense)
batches = token_batches(tokenizer, sorted(known[:96], key=len), length=96, batch_size=16)
fits = sm.compress_(model, plan, batches=batches, refine=sm.Refinement(steps=20))

# %% The report: what every layer is, costs, and how far it is from the weight it replaced
report = sm.report(model, fits=fits)
print("\n".join(str(report).splitlines()[:9]))
print(f"parameters: {report.dense_parameters:,} -> {report.parameters:,}")

# %% Save and load, as always with transformers
folder = Path(tempfile.mkdtemp(prefix="structmat-example-"))
model.save_pretrained(folder / "small")
tokenizer.save_pretrained(folder / "small")
small = AutoModelForCausalLM.from_pretrained(folder / "small")

# %% Dense and compressed side by side
LENGTH = 96
scores = {
    name: perplexity(network, tokenizer, unseen, length=LENGTH, progress=False)
    for name, network in (("dense", dense), ("compressed", small))
}
flops = relative_flops(small, {"input_ids": torch.zeros(1, LENGTH, dtype=torch.long)})
for name, score in scores.items():
    print(f"{name:>10}: {score}")
print(f"operations: {flops.relative:.3f} of the dense model's")

# %% Retraining for a few steps, with the dense model as teacher
args = StructuredTrainingArguments(
    output_dir=str(folder / "better"), max_steps=30, per_device_train_batch_size=16, learning_rate=3e-4,
    lr_scheduler_type="cosine", warmup_steps=5, distill_logits=1.0, logging_steps=10, save_strategy="no",
    report_to="none", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
)  # fmt: skip
figures = retrain(small, tokenizer, known, unseen, args, teacher=dense, length=LENGTH)
better: Any = AutoModelForCausalLM.from_pretrained(folder / "better")
scores["retrained"] = perplexity(better, tokenizer, unseen, length=LENGTH, progress=False)
print(" -> ".join(f"{name} {score.token:.3f}" for name, score in scores.items()))

# %% And it writes
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
written = better.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=0)
print(tokenizer.decode(written[0], skip_special_tokens=True))
