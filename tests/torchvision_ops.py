"""Let torchvision import on a CPU-only torch, where its wheel's operator library does not load."""

from importlib.util import find_spec
from pathlib import Path

import torch

LIBRARIES: list[torch.library.Library] = []
"""Declarations live as long as their library does."""


def declare() -> None:
    """Declare the operators that torchvision misses on import; nothing where its library loads or is not installed."""
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None or LIBRARIES:
        return
    for file in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(file)
        except OSError:
            continue
        return
    LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
    for name in ("nms", "qnms"):
        LIBRARIES[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
