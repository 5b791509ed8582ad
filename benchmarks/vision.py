"""Small vision networks with structured weights: data, networks, and one training run, for the benchmarks of learning.

Fashion-MNIST from the data folder that STRUCTMAT_DATA names, or scikit-learn's digits where there is none. The networks
are timm's, of width 128 and depth 3 on 16 tokens.
"""

from __future__ import annotations

import gzip
import os
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import structmat as sm
from structmat.training import StructureLearning, parameter_groups, set_sigma_, structure_step_

BATCH = 128
WEIGHT_DECAY = 0.05
STRUCTURE_RATE = 1e-3
LAYERS = {"vit": r"blocks\..*\.(qkv|proj|fc1|fc2)", "mixer": r"blocks\..*\.mlp_channels\.(fc1|fc2)"}
"""Which linear layers get a structure, by network."""

SHARES_OF_LEARNED_RANKS = 2.0
"""How many times the budget a low-rank network begins with where it learns its ranks."""

LAST_DROP = 0.7
"""Share of the steps after which a network that learns its ranks is within its budget."""

MEMORY_OF_SENSITIVITY = 0.85
"""Weight of what was before in the moving average."""


@dataclass(frozen=True)
class Data:
    """Standardised images ``(n, 1, side, side)`` and labels: to train on, to tune on, and to test on."""

    name: str
    train: tuple[Tensor, Tensor]
    development: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    @property
    def side(self) -> int:
        """Pixels of an image along each axis."""
        return self.train[0].shape[-1]


def load_data() -> Data:
    """Fashion-MNIST (the last 5,000 training images to tune on), or the digits (1,000, 347 and 450 images)."""
    folder = os.environ.get("STRUCTMAT_DATA")
    if folder is not None:
        root = Path(folder) / "fashion-mnist"
        images, labels = idx(root / "train-images-idx3-ubyte.gz"), idx(root / "train-labels-idx1-ubyte.gz")
        test = idx(root / "t10k-images-idx3-ubyte.gz"), idx(root / "t10k-labels-idx1-ubyte.gz")
        name, held_out = "Fashion-MNIST", 5000
    else:
        from structmat.demo.vit import digits  # noqa: PLC0415 - needs scikit-learn

        found = digits()
        images, labels = found.train_images, found.train_labels
        test = found.test_images, found.test_labels
        name, held_out = "digits", 347
    images, mean, std = images.float(), images.float().mean(), images.float().std()

    def standard(pixels: Tensor) -> Tensor:
        return ((pixels.float() - mean) / std)[:, None]

    return Data(
        name,
        (standard(images[:-held_out]), labels[:-held_out].long()),
        (standard(images[-held_out:]), labels[-held_out:].long()),
        (standard(test[0]), test[1].long()),
    )


def idx(path: Path) -> Tensor:
    """The bytes of an IDX file, ``(n,)`` or ``(n, rows, columns)``."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = [int.from_bytes(content[4 + 4 * d : 8 + 4 * d], "big") for d in range(dimensions)]
    return torch.frombuffer(bytearray(content[4 + 4 * dimensions :]), dtype=torch.uint8).view(shape)


def network(kind: str, data: Data, seed: int) -> nn.Module:
    """A dense network with random weights: ``"vit"`` or ``"mixer"``."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {"img_size": data.side, "patch_size": data.side // 4, "in_chans": 1, "num_classes": 10}
    if kind == "mixer":
        return MlpMixer(**common, num_blocks=3, embed_dim=128, mlp_ratio=(0.5, 2.0))
    return VisionTransformer(
        **common, embed_dim=128, depth=3, num_heads=4, mlp_ratio=2.0, class_token=False, global_pool="avg"
    )


class LearnedRank(nn.Module):
    """A low-rank layer that loses components while it learns: ``y = left (kept * (right x)) + bias``."""

    def __init__(self, format: sm.LowRank, factors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        super().__init__()
        self.left = nn.Parameter(factors["left"].detach().clone())
        self.right = nn.Parameter(factors["right"].detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.kept = nn.Buffer(torch.ones(format.rank))
        self.sensitivity = nn.Buffer(torch.zeros(format.rank))

    @property
    def price(self) -> int:
        """Parameters of a component."""
        return self.left.shape[0] + self.right.shape[1]

    @property
    def dense(self) -> int:
        """Parameters of the dense matrix."""
        return self.left.shape[0] * self.right.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """``(..., N)`` to ``(..., M)``."""
        return F.linear(F.linear(x, self.right) * self.kept, self.left, self.bias)


def with_learned_ranks_(model: nn.Module) -> nn.Module:
    """Let all low-rank layers lose components while they learn, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, sm.StructuredLinear) and isinstance(layer.format, sm.LowRank):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LearnedRank(layer.format, layer.factors, layer.bias))
    return model


@torch.no_grad()
def rank_step_(model: nn.Module, keep: float, progress: float) -> float:
    """Drop the components that matter least, over all layers; between the backward pass and the optimizer's step.

    What a component matters is the moving average of ``|sum of left * gradient|`` per parameter, to first order the
    change of the loss if it were not there; average and schedule are like those of AdaLoRA (Zhang et al. 2023,
    sections 3.2 and 3.3), but what is dropped does not come back. From a tenth of the steps until ``LAST_DROP`` the
    share falls to ``keep`` along a cubic. Returns the share.
    """
    layers = [module for module in model.modules() if isinstance(module, LearnedRank)]
    for layer in layers:
        gradient = layer.left.grad
        if gradient is None:
            raise ValueError("expected gradients, got none; call rank_step_ after backward")
        layer.sensitivity.lerp_((layer.left * gradient).sum(0).abs(), 1 - MEMORY_OF_SENSITIVITY)
    remaining = 1 - min(max((progress - 0.1) / (LAST_DROP - 0.1), 0.0), 1.0)
    most = keep * (1 + (SHARES_OF_LEARNED_RANKS - 1) * remaining**3) * sum(layer.dense for layer in layers)
    scores = torch.cat([layer.sensitivity.where(layer.kept > 0, -1.0) / layer.price for layer in layers])
    prices = torch.cat([torch.full_like(layer.kept, layer.price) for layer in layers])
    order = scores.argsort(descending=True, stable=True)
    fits = torch.zeros_like(scores)
    fits[order] = (prices[order].cumsum(0) <= most).float()
    for layer, mask in zip(layers, fits.split([len(layer.kept) for layer in layers]), strict=True):
        layer.kept.mul_(mask)
    return sum(layer.price * int(layer.kept.sum()) for layer in layers) / sum(layer.dense for layer in layers)


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        network: ``"vit"`` or ``"mixer"``.
        method: ``"dense"``, a key of ``FORMATS``, or ``"learned ranks"``.
        keep: Share of the dense multiplications of the structured layers.
        rate: Highest learning rate.
        seed: The seed of weights and data order.
        steps: The number of steps of the optimizer, with batches of 128.
        pretrained_steps: The steps of training a dense network first, which is then compressed; 0 for a random start.
        structure: What differs from ``learning``'s settings of ``StructureLearning``.
        options: What differs from the usual in ``make_plan``.
        structure_rate: Learning rate of widths and locations.
        start: Cost of the structure at the beginning, relative to the budget.
        segments: Where Gaudi-GBLR begins: ``"random"`` for equal widths at random places, ``"diagonal"`` for the same
            along the diagonal, ``"uneven"`` for random widths of the same sum at random places.
    """

    network: str
    method: str
    keep: float
    rate: float
    seed: int
    steps: int
    pretrained_steps: int = 0
    structure: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    structure_rate: float = STRUCTURE_RATE
    start: float = 1.0
    segments: str = "random"

    @property
    def learning(self) -> StructureLearning | None:
        """How the structure is learned, if it is."""
        if self.method != "gaudi-gblr":
            return None
        return StructureLearning(self.keep, **{"sigma": None, "shrinkage": 0.2, **self.structure})


FORMATS: dict[str, tuple[type[sm.Format], Any]] = {
    "low-rank": (sm.LowRank, None),
    "monarch": (sm.Monarch, 4),
    "block-sparse": (sm.BlockSparse, 16),
    "blast": (sm.Blast, 4),
    "gaudi-gblr": (sm.GaudiGblr, None),
}
"""Structure and blocks of each method."""


def begin(run: Run, data: Data) -> nn.Module:
    """The network before it is trained, or retrained."""
    model = network(run.network, data, run.seed)
    if run.pretrained_steps:
        model = pretrained(run, model, data)
    if run.method == "dense":
        return model
    kind, blocks = FORMATS["low-rank" if run.method == "learned ranks" else run.method]
    start = SHARES_OF_LEARNED_RANKS if run.method == "learned ranks" else run.start
    rule = sm.Rule(kind, blocks=blocks, options=dict(run.options))
    plan = sm.make_plan(model, {LAYERS[run.network]: rule}, keep=min(1.0, run.keep * start))
    if run.pretrained_steps:
        sm.compress_(model, plan)
    else:
        generator = torch.Generator().manual_seed(run.seed)
        sm.apply_plan_(model, plan, generator=generator)
        placed_(model, run.segments, generator)
    return with_learned_ranks_(model) if run.method == "learned ranks" else model


@torch.no_grad()
def placed_(model: nn.Module, segments: str, generator: torch.Generator) -> None:
    """Give the segments of new Gaudi-GBLR layers other places or widths, in place; as in ``Run``."""
    for layer in model.modules():
        if segments == "random" or not (isinstance(layer, sm.StructuredLinear) and "location" in layer.factors):
            continue
        location, width = layer.factors["location"], layer.factors["width"]
        if segments == "diagonal":
            location.copy_((torch.arange(location.shape[1]) / location.shape[1]).expand_as(location))
        else:
            shares = torch.rand(width.shape, generator=generator)
            width.copy_((shares * (width.mean(1) / shares.mean(1))[:, None]).clamp(max=1))


def pretrained(run: Run, model: nn.Module, data: Data) -> nn.Module:
    """The dense network of this seed, trained; kept in the temporary folder, so that all methods start from it."""
    folder = Path(tempfile.gettempdir()) / "structmat-vision"
    folder.mkdir(exist_ok=True)
    path = folder / f"{run.network}-{data.name}-{run.seed}-{run.pretrained_steps}.pt"
    if not path.exists():
        dense = Run(run.network, "dense", 1.0, 1e-3, run.seed, run.pretrained_steps)
        train(dense, model, data)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path))
    return model


def train(run: Run, model: nn.Module, data: Data, every: int = 50) -> list[dict[str, Any]]:
    """Train in place with AdamW, the rate rising for a tenth of the steps and falling as a cosine; the history."""
    images, labels = data.train
    generator = torch.Generator().manual_seed(run.seed)
    groups = parameter_groups(model, run.rate, WEIGHT_DECAY, structure_learning_rate=run.structure_rate)
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=run.steps,
        pct_start=0.1,
        cycle_momentum=False,
    )
    learning = run.learning
    if learning is not None:
        set_sigma_(model, learning.sigma_at(0))
    history: list[dict[str, Any]] = []
    model.train()
    for step in range(run.steps):
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(shifted(images[chosen], generator)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        progress = (step + 1) / run.steps
        noted: dict[str, Any] = {}
        if run.method == "learned ranks":
            noted["structure_share"] = rank_step_(model, run.keep, progress)
        optimizer.step()
        if learning is not None:
            state = structure_step_(model, learning, optimizer.param_groups[-1]["lr"], progress)
            noted = {
                "structure_share": state.share,
                "structure_dead": state.dead,
                "structure_sigma": state.sigma,
                "costs": dict(state.costs),
            }
        schedule.step()
        if (step + 1) % every == 0 or step + 1 == run.steps:
            history.append({"step": step + 1, "loss": loss.item(), **noted})
    model.eval()
    return history


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Three batches in four moved by up to two pixels (one on small images) along each axis."""
    most = 2 if images.shape[-1] > 8 else 1
    down, right = (int(torch.randint(-most, most + 1, (1,), generator=generator)) for _ in range(2))
    if torch.rand(1, generator=generator) < 0.25:
        return images
    return images.roll((down, right), (2, 3))


@torch.no_grad()
def accuracy(model: nn.Module, examples: tuple[Tensor, Tensor]) -> float:
    """Share of the images that are named right."""
    images, labels = examples
    right = sum(
        int((model(some).argmax(1) == truth).sum())
        for some, truth in zip(images.split(500), labels.split(500), strict=True)
    )
    return right / len(labels)


def execute(run: Run, data: Data) -> tuple[dict[str, Any], nn.Module]:
    """Begin, train, harden and measure; the record and the network."""
    started = time.perf_counter()
    model = begin(run, data)
    before = accuracy(model, data.development) if run.pretrained_steps else None
    history = train(run, model, data)
    dense = sum(
        layer.weight.numel()
        for name, layer in network(run.network, data, 0).named_modules()
        if re.fullmatch(LAYERS[run.network], name) and isinstance(layer, nn.Linear)
    )
    soft = accuracy(model, data.development)
    gaps: dict[str, float] = {}
    if run.method == "gaudi-gblr":
        gaps = sm.harden_(model)
    record: dict[str, Any] = {
        "before": before,
        "development": accuracy(model, data.development),
        "test": accuracy(model, data.test),
        "keep": kept(run, model, dense),
        "unhardened_development": soft,
        "hardening_gap": max(gaps.values(), default=0.0),
        "history": history,
        "seconds": time.perf_counter() - started,
        "data": data.name,
    }
    return record, model


def kept(run: Run, model: nn.Module, dense: int) -> float:
    """Multiplications of the layers, as a share of the dense ones."""
    if run.method == "dense":
        return 1.0
    total = 0
    for module in model.modules():
        if isinstance(module, LearnedRank):
            total += module.price * int(module.kept.sum())
        elif isinstance(module, sm.StructuredLinear):
            total += module.format.num_parameters(module.factors)
    return total / dense
