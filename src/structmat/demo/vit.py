"""The demo's network and data: a small Vision Transformer on scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from structmat.training import StructureLearning, parameter_groups, set_sigma_, structure_step_

STRUCTURE_RATE = 2e-3
"""The highest learning rate of widths and locations."""


@dataclass(frozen=True)
class Digits:
    """Standardised 8 x 8 images ``(n, 8, 8)`` and their labels, 1347 to train on and 450 to test."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits() -> Digits:
    """Load the digits that scikit-learn carries, split once and for all, the classes in equal shares."""
    images, labels = load_digits(return_X_y=True)
    train, test = train_test_split(range(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    pixels = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8)
    pixels = (pixels - pixels[train].mean()) / pixels[train].std()
    targets = torch.tensor(labels)
    return Digits(pixels[train], targets[train], pixels[test], targets[test])


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        width: The number of features of a token.
        heads: The number of attention heads.
        hidden: The number of features inside the MLP.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(B, T, width)`` to the same shape."""
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Patches of 2 x 2 pixels, 16 tokens, three blocks of width 64, mean pooling.

    Args:
        width: The number of features of a token.
        depth: The number of blocks.
        heads: The number of attention heads.
        hidden: The number of features inside the MLP.
    """

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4, hidden: int = 128) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(torch.randn(16, width) / 2)
        self.blocks = nn.Sequential(*[Block(width, heads, hidden) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, 8, 8)`` to logits ``(B, 10)``."""
        patches = images.reshape(-1, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 16, 4)
        tokens = self.blocks(self.embed(patches) + self.position)
        return self.head(self.norm(tokens).mean(1))


def train(
    model: nn.Module,
    data: Digits,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    progress: Callable[[], object] = lambda: None,
    structure: StructureLearning | None = None,
) -> None:
    """Train with AdamW and a one-cycle schedule; three images in ten are shifted by up to a pixel.

    Args:
        model: The network, changed in place.
        data: The digits.
        epochs: The number of passes over the training images, in batches of 64.
        learning_rate: The highest learning rate.
        seed: The seed of the order of the images and of their shifts.
        progress: A function that is called after every epoch.
        structure: How the structure of Gaudi-GBLR layers is learned; None for networks without them.
    """
    generator = torch.Generator().manual_seed(seed)
    count, batch = len(data.train_labels), 64
    steps = epochs * (count // batch)
    optimizer = _optimizer(model, learning_rate, structure)
    highest = [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, highest, total_steps=steps, pct_start=0.2, cycle_momentum=structure is None
    )
    model.train()
    step = 0
    for _ in range(epochs):
        for index in torch.randperm(count, generator=generator)[: count // batch * batch].view(-1, batch):
            loss = F.cross_entropy(model(_shifted(data.train_images[index], generator)), data.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if structure is not None:
                structure_step_(model, structure, optimizer.param_groups[-1]["lr"], step / steps)
            schedule.step()
        progress()
    model.eval()


def _optimizer(model: nn.Module, learning_rate: float, structure: StructureLearning | None) -> torch.optim.Optimizer:
    if structure is None:
        return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    set_sigma_(model, structure.sigma_at(0))
    groups = parameter_groups(model, learning_rate, 0.05, structure_learning_rate=STRUCTURE_RATE)
    return torch.optim.AdamW(groups)


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    n = len(images)
    chosen = torch.rand(n, generator=generator) < 0.3
    corners = torch.where(chosen[:, None], torch.randint(0, 3, (n, 2), generator=generator), 1)
    offsets = corners[..., None] + torch.arange(8)
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min()))
    return padded[torch.arange(n)[:, None, None], offsets[:, 0, :, None], offsets[:, 1, None, :]]


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """The share of the test images that the network names right."""
    return (model(data.test_images).argmax(1) == data.test_labels).float().mean().item()
