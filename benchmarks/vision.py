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
    """A low-rank layer, each component under a gate in [0, 1]: ``y = left (gate * (right x)) + bias``.

    For low-rank matrices what Gaudi-GBLR does for blocks: gates are soft-thresholded after every step while the network
    is over its budget, and a component whose gate is 0 costs nothing.
    """

    def __init__(self, format: sm.LowRank, factors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        super().__init__()
        self.left = nn.Parameter(factors["left"].detach().clone())
        self.right = nn.Parameter(factors["right"].detach().clone())
        self.gate = nn.Parameter(torch.ones(format.rank))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

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
        return F.linear(F.linear(x, self.right) * self.gate, self.left, self.bias)


def gated_(model: nn.Module) -> nn.Module:
    """Put gates on the components of all low-rank layers, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, sm.StructuredLinear) and isinstance(layer.format, sm.LowRank):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LearnedRank(layer.format, layer.factors, layer.bias))
    return model


@torch.no_grad()
def gate_step_(model: nn.Module, settings: StructureLearning, rate: float, progress: float) -> float:
    """The proximal step on the gates; the last phase keeps the largest within the budget. Returns the share."""
    layers = [module for module in model.modules() if isinstance(module, LearnedRank)]
    dense = sum(layer.dense for layer in layers)

    def share() -> float:
        return sum(layer.price * int((layer.gate > 0).sum()) for layer in layers) / dense

    for layer in layers:
        layer.gate.sub_(settings.strength(share(), settings.targets[".*"]) * rate).clamp_(0, 1)
    if settings.is_hard(progress) and share() > settings.targets[".*"]:
        gates = torch.cat([layer.gate for layer in layers])
        prices = torch.cat([torch.full_like(layer.gate, layer.price) for layer in layers])
        order = gates.argsort(descending=True)
        kept = torch.zeros_like(gates)
        kept[order] = (prices[order].cumsum(0) <= settings.targets[".*"] * dense).float()
        for layer, mask in zip(layers, kept.split([len(layer.gate) for layer in layers]), strict=True):
            layer.gate.mul_(mask)
    return share()


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        network: ``"vit"`` or ``"mixer"``.
        method: ``"dense"``, a key of ``FORMATS``, or ``"learned ranks"``.
        keep: Share of the dense multiplications of the structured layers.
        rate: Highest learning rate.
        seed: Of weights and data order.
        steps: Of the optimizer, with batches of 128.
        pretrained_steps: Of training a dense network first, which is then compressed; 0 for a random start.
        structure: What differs from ``learning``'s settings of ``StructureLearning``.
        options: What differs from the usual in ``make_plan``.
        structure_rate: Learning rate of widths, locations and gates.
        start: Cost of the structure at the beginning, relative to the budget.
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

    @property
    def learning(self) -> StructureLearning | None:
        """How the structure is learned, if it is."""
        if self.method not in ("gaudi-gblr", "learned ranks"):
            return None
        usual = {"shrinkage": 2.0, "hard_share": 0.3} if self.method == "learned ranks" else {"shrinkage": 0.2}
        return StructureLearning(self.keep, **{"sigma": None, **usual, **self.structure})


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
        sm.apply_plan_(model, plan, generator=torch.Generator().manual_seed(run.seed))
    return gated_(model) if run.method == "learned ranks" else model


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
    gates = {id(module.gate) for module in model.modules() if isinstance(module, LearnedRank)}
    if gates:
        found = [p for group in groups for p in group["params"] if id(p) in gates]
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in gates]
        groups.append({"name": "structure", "params": found, "lr": run.structure_rate, "weight_decay": 0.0,
                       "betas": (0.0, 0.999)})  # fmt: skip
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=run.steps, pct_start=0.1,
        cycle_momentum=False,
    )  # fmt: skip
    learning = run.learning
    if learning is not None and not gates:
        set_sigma_(model, learning.sigma_at(0))
    history: list[dict[str, Any]] = []
    model.train()
    for step in range(run.steps):
        chosen = torch.randint(len(labels), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(shifted(images[chosen], generator)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate, progress = optimizer.param_groups[-1]["lr"], (step + 1) / run.steps
        noted: dict[str, Any] = {}
        if learning is not None and gates:
            noted["structure_share"] = gate_step_(model, learning, rate, progress)
        elif learning is not None:
            state = structure_step_(model, learning, rate, progress)
            noted = {"structure_share": state.share, "structure_dead": state.dead, "structure_sigma": state.sigma,
                     "costs": dict(state.costs)}  # fmt: skip
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
        "before": before, "development": accuracy(model, data.development), "test": accuracy(model, data.test),
        "keep": kept(run, model, dense), "unhardened_development": soft,
        "hardening_gap": max(gaps.values(), default=0.0), "history": history,
        "seconds": time.perf_counter() - started, "data": data.name,
    }  # fmt: skip
    return record, model


def kept(run: Run, model: nn.Module, dense: int) -> float:
    """Multiplications of the layers, as a share of the dense ones."""
    if run.method == "dense":
        return 1.0
    total = 0
    for module in model.modules():
        if isinstance(module, LearnedRank):
            total += module.price * int((module.gate > 0).sum())
        elif isinstance(module, sm.StructuredLinear):
            total += module.format.num_parameters(module.factors)
    return total / dense
