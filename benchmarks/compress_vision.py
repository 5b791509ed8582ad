"""Compress trained networks of images without retraining: the same share in every layer, or one budget for all.

The ViT of ``vision.py``, trained on Fashion-MNIST for 2,000 steps, and ResNet-20 with the published weights for
CIFAR-10. 1,024 training images calibrate the first and 256 the second, others for each seed; accuracy is that on the
test images. The convolutions of ResNet-20 are compressed as matrices, but for the first. Every cell is kept as JSON; a
second call makes those that are missing.

    python benchmarks/compress_vision.py                     # about half an hour on 2 cores
    python benchmarks/compress_vision.py --only "vit.*0.5"
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import time
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import structmat as sm
import vision
from hardware import hardware, hardware_line

RESULTS = Path(__file__).parent / "results"
CELLS = RESULTS / "compress_vision"
IMAGES = {"vit": 1024, "resnet-20": 256}
SEEDS = (0, 1, 2)
KEEPS = (0.5, 0.3)
SHARINGS = ("uniform", "allocated")
STRUCTURES = {"low-rank": ("low_rank",), "BLAST": ("blast",), "BLAST or low-rank": ("blast", "low_rank")}
BLOCKS = 4
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Examples = tuple[Tensor, Tensor]


class ResidualBlock(nn.Module):
    """Two convolutions with batch norms around a shortcut that skips pixels and pads channels with zeros."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.extra = (1, 0) if before == after else (2, after - before)
        self.conv1 = nn.Conv2d(before, after, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C', H', W')``."""
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(shortcut + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


def stage(before: int, after: int) -> nn.Sequential:
    """Three residual blocks."""
    return nn.Sequential(*(ResidualBlock(before if i == 0 else after, after) for i in range(3)))


class ResNet20(nn.Module):
    """The residual network of depth 20 for images of 32 x 32 (He et al. 2016, section 4.2)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (stage(*widths) for widths in ((16, 16), (16, 32), (32, 64)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, 3, 32, 32)`` to ``(B, 10)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def mosaic(path: Path) -> Tensor:
    """The images ``(10000, 3, 32, 32)`` of a mosaic, standardised."""
    pixels = numpy.asarray(Image.open(path).convert("RGB"))
    images = torch.from_numpy(pixels.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3).copy())
    shape = (1, 3, 1, 1)
    return (images.permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(shape)) / torch.tensor(DEVIATION).view(shape)


def resnet(folder: Path) -> tuple[nn.Module, Examples, Examples, str]:
    """ResNet-20, training and test examples, and the layers to compress."""
    model = ResNet20()
    model.load_state_dict(load_file(folder / "resnet-cifar10" / "resnet20.safetensors"))
    cifar = folder / "cifar10"
    train = mosaic(cifar / "train_1.webp"), torch.from_numpy(numpy.load(cifar / "train_labels.npy"))[:10000].long()
    test = mosaic(cifar / "test.webp"), torch.from_numpy(numpy.load(cifar / "test_labels.npy")).long()
    return model.eval(), train, test, r"layer.*conv\d"


def vit() -> tuple[nn.Module, Examples, Examples, str]:
    """The trained ViT, training and test examples, and the layers to compress."""
    data = vision.load_data()
    run = vision.Run("vit", "dense", 1.0, 1e-3, 0, 0, pretrained_steps=2000)
    return vision.begin(run, data).eval(), data.train, data.test, vision.LAYERS["vit"]


def cell(network: str, structures: str, keep: float, sharing: str, seed: int, folder: Path) -> dict[str, Any]:
    """One cell."""
    model, train, test, layers = resnet(folder) if network == "resnet-20" else vit()
    dense = vision.accuracy(model, test)
    chosen = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(seed))[: IMAGES[network]]
    batches = list(train[0][chosen].chunk(8))
    formats = STRUCTURES[structures]
    start = time.perf_counter()
    if sharing == "uniform":
        rules: dict[Any, Any] = {layers: formats[0]}
        plan: sm.Plan = sm.make_plan(model, rules, keep=keep, blocks=BLOCKS, misfits="skip")
    else:
        plan = sm.allocate(
            model, batches, keep=keep, structures=formats, blocks=BLOCKS, layers=layers, effect="kl", progress=False
        )
    sm.compress_(model, plan, batches=batches, two_sided=True, progress=False)
    kept = sum(f.num_parameters() for f in plan.values()) / sum(f.M * f.N for f in plan.values())
    return {
        "network": network,
        "structures": structures,
        "asked": keep,
        "sharing": sharing,
        "seed": seed,
        "kept": kept,
        "dense": dense,
        "accuracy": vision.accuracy(sm.densify_(model), test),  # convolutions are fast when they are dense
        "seconds": time.perf_counter() - start,
        "hardware": hardware(),
    }


def table(found: list[dict[str, Any]]) -> str:
    """The cells as Markdown."""
    lines = [
        "# Networks of images compressed without retraining",
        "",
        f"Made by `benchmarks/compress_vision.py` on: {hardware_line(found[0]['hardware'])}.",
        "",
        "Test accuracy in percent, the mean over three sets of calibration images (1,024 for the ViT and 256 for "
        "ResNet-20) and in brackets the least and the largest; in sequence, with errors weighed by gradients. "
        "*Uniform*: every layer keeps the same share. *Allocated*: `allocate` with the KL divergence of the logits. "
        "BLAST has 4 x 4 blocks; where a row has two structures, uniform is BLAST.",
        "",
        "| network | structure | keep | uniform | allocated |",
        "|---|---|---|---|---|",
    ]
    for network, structures, keep in itertools.product(("vit", "resnet-20"), STRUCTURES, KEEPS):
        texts = []
        for sharing in SHARINGS:
            key = (network, structures, keep, sharing)
            own = [c for c in found if (c["network"], c["structures"], c["asked"], c["sharing"]) == key]
            values = [100 * c["accuracy"] for c in own]
            texts.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "")
        dense = next((c["dense"] for c in found if c["network"] == network), None)
        if any(texts) and dense is not None:
            lines.append(f"| {network} (dense {100 * dense:.2f}) | {structures} | {keep} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the cells that are missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=".*", help="cells to run: a pattern for 'network structure keep how seed'")
    options = parser.parse_args()
    if "STRUCTMAT_DATA" not in os.environ:
        raise SystemExit("expected STRUCTMAT_DATA to name the folder with fashion-mnist, cifar10 and resnet-cifar10")
    folder = Path(os.environ["STRUCTMAT_DATA"])
    CELLS.mkdir(parents=True, exist_ok=True)
    for key in itertools.product(("vit", "resnet-20"), STRUCTURES, KEEPS, SHARINGS, SEEDS):
        name = "-".join(map(str, key)).replace(" ", "-").lower()
        path = CELLS / f"{name}.json"
        if path.exists() or not re.search(options.only, " ".join(map(str, key))):
            continue
        result = cell(*key, folder)
        path.write_text(json.dumps(result, indent=1))
        print(
            name, f"kept {result['kept']:.3f} accuracy {result['accuracy']:.4f} {result['seconds']:.0f} s", flush=True
        )
    found = [json.loads(path.read_text()) for path in sorted(CELLS.glob("*.json"))]
    if found:
        (RESULTS / "compress_vision.md").write_text(table(found))


if __name__ == "__main__":
    main()
