"""Compress a Vision Transformer: plan, compress, report, save, load, compare, retrain.

Run it from a shell, or cell by cell in an editor that knows ``# %%``. It needs no download, because it trains a small
ViT in seconds on the digits of scikit-learn. For a model of your own, start at "The plan".

    pip install 'structmat[train]' scikit-learn
    python examples/compress_vit.py
"""

# %% A model and images: yours come from from_pretrained and structmat.data.read_images
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, default_data_collator

import structmat as sm
from structmat.evaluate import accuracy, relative_flops
from structmat.integrations.transformers.arguments import StructuredTrainingArguments
from structmat.integrations.transformers.trainer import StructuredTrainer

torch.manual_seed(0)
folder = Path(tempfile.mkdtemp(prefix="structmat-example-"))

digits: Any = load_digits()
pixels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # (1797, 1, 8, 8)
labels = torch.tensor(digits.target)
order = torch.randperm(len(labels))
examples = [{"pixel_values": pixels[k], "labels": int(labels[k])} for k in order.tolist()]
known, unseen = examples[:1400], examples[1400:]


def train(network: Any, name: str, teacher: Any = None, **options: Any) -> None:
    """Train a network for a short time."""
    args = StructuredTrainingArguments(
        output_dir=str(folder / name),
        per_device_train_batch_size=32,
        lr_scheduler_type="cosine",
        logging_steps=200,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **options,
    )
    collator = default_data_collator
    StructuredTrainer(network, args, teacher=teacher, train_dataset=known, data_collator=collator).train()


def top1(network: Any) -> float:
    """The share of unseen images that a network classifies correctly."""
    batches: Any = DataLoader(unseen, batch_size=100, collate_fn=default_data_collator)  # pyright: ignore[reportArgumentType]
    return accuracy(network, batches).top1


config = ViTConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=8,
    patch_size=2,
    num_channels=1,
    id2label={k: str(k) for k in range(10)},
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
dense = ViTForImageClassification(config)
train(dense, "dense", num_train_epochs=20, learning_rate=2e-3)
dense.eval()

# %% The plan: BLAST in the MLPs, and low-rank attention
plan = sm.make_plan(dense, {r".*\.fc\d": sm.Blast, r".*\.[qkvo]_proj": sm.LowRank}, keep=0.3, blocks=4)
print("\n".join(str(plan).splitlines()[:6]))

# %% Compression goes block by block on images without labels, and refines each block
model = copy.deepcopy(dense)
images = torch.stack([example["pixel_values"] for example in known[:512]])
fits = sm.compress_(model, plan, batches=list(images.split(64)), refine=sm.Refinement(steps=50))

# %% The report says what every layer is, what it costs, and how far it is from the weight that it replaced
report = sm.report(model, fits=fits, example_inputs=images[:1])
print("\n".join(str(report).splitlines()[:9]))
print(f"parameters: {report.dense_parameters:,} -> {report.parameters:,}")

# %% Save and load, as always with transformers
model.save_pretrained(folder / "small")
small = AutoModelForImageClassification.from_pretrained(folder / "small")

# %% Compare the dense and the compressed model
scores = {"dense": top1(dense), "compressed": top1(small)}
print(f"operations: {relative_flops(small, images[:1]).relative:.3f} of the dense model's")

# %% Retrain for a few epochs, with the dense model as teacher
train(small, "better", teacher=dense, num_train_epochs=3, learning_rate=1e-3, distill_logits=1.0)
scores["retrained"] = top1(small)
print(" -> ".join(f"{name} {score:.3f}" for name, score in scores.items()))
