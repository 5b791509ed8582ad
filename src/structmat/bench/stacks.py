"""Stacks of layers whose weights no cache holds: what ``bench_layers`` times."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structmat.bench.machine import Peak, dtype_name
from structmat.bench.results import LayerTime
from structmat.bench.timing import Timing, captured, time_in_turn
from structmat.bench.verify import check_layer, exact_weight
from structmat.formats import Format
from structmat.nn import StructuredLinear
from structmat.nn.linear import bucket

WORK = {"forward": 1, "backward": 2, "training": 3}
"""The number of products of the size of the forward one that a step needs at least."""

MOST_COPIES = 256
"""The most copies of a layer in a stack, however small the layer is."""


class Stacks:
    """The layers of one shape and dtype: one stack for the dense layer and for each format.

    Args:
        formats: The formats of one shape by their labels.
        dtype: The dtype of weights and input.
        device: A CPU or a CUDA device.
        cold: The bytes of the weights in a stack, at least; 0 for one layer each.
        mode: One of ``timing.MODES``.
    """

    def __init__(
        self, formats: Mapping[str, Format], dtype: torch.dtype, device: torch.device, cold: int, mode: str
    ) -> None:
        self.dtype, self.device, self.mode, self.formats = dtype, device, mode, formats
        M, N = next(iter(formats.values())).shape
        self.shape = (M, N)
        first: dict[str, nn.Module] = {"dense": nn.Linear(N, M, bias=False, dtype=dtype, device=device)}
        self.weights: dict[str, Tensor] = {}
        for label, format in formats.items():
            layer = StructuredLinear(format, bias=False, dtype=dtype, device=device)
            self.weights[label] = exact_weight(layer)
            first[label] = layer
        self.bytes = {label: _held(layer) for label, layer in first.items()}
        self.copies = min(MOST_COPIES, max(2, -(-cold // min(self.bytes.values())))) if cold else 1
        self.layers = {
            label: [layer, *(copy.deepcopy(layer) for _ in range(self.copies - 1))] for label, layer in first.items()
        }

    def time(
        self, tokens: int, ways: Mapping[str, Sequence[str]], steps: Sequence[str], rounds: int, peak: Peak
    ) -> list[LayerTime]:
        """Time every step, the automatic algorithm of each format and some others.

        Args:
            tokens: The number of input vectors.
            ways: The other algorithms of each format.
            steps: The steps, keys of ``WORK``.
            rounds: How often each is timed.
            peak: What is possible in this dtype.

        Returns:
            One entry for each step, format and algorithm.
        """
        x = torch.randn(tokens, self.shape[1], device=self.device).to(self.dtype)
        stacks = self._checked(x, ways)
        times: list[LayerTime] = []
        for step in steps:
            if self.mode == "compile":
                torch.compiler.reset()
            runs = {"|".join(key): _run(layers, x, step, self.mode) for key, layers in stacks.items()}
            found = time_in_turn(runs, rounds=rounds, settle=int(self.device.type == "cpu"), device=self.device)
            dense = found["dense|automatic"].each(self.copies)
            for label, way in stacks:
                if label != "dense":
                    seconds = found[f"{label}|{way}"].each(self.copies)
                    times.append(self._result(label, way, tokens, step, seconds, dense, peak))
        return times

    def _checked(self, x: Tensor, ways: Mapping[str, Sequence[str]]) -> dict[tuple[str, str], list[nn.Module]]:
        """The stack of each label and algorithm, whose first layer computes what its dense definition says."""
        stacks: dict[tuple[str, str], list[nn.Module]] = {("dense", "automatic"): self.layers["dense"]}
        for label in self.formats:
            stacks[label, "automatic"] = self.layers[label]
            for algorithm in ways[label]:
                stacks[label, algorithm] = [_set_to(layer, len(x), algorithm) for layer in self.layers[label]]
        for (label, _), layers in stacks.items():
            if isinstance(layers[0], StructuredLinear):
                check_layer(layers[0], x, self.weights[label])
        return stacks

    def _result(
        self, label: str, way: str, tokens: int, step: str, seconds: Timing, dense: Timing, peak: Peak
    ) -> LayerTime:
        M, N = self.shape
        format = self.formats[label]
        flops = 2 * format.multiplications(tokens, self.layers[label][0].state_dict())
        moved = {name: _moved(self.bytes[name], tokens, self.shape, self.dtype, step) for name in (label, "dense")}
        return LayerTime(
            format=label,
            settings=str(format),
            algorithm=way,
            shape=self.shape,
            tokens=tokens,
            dtype=dtype_name(self.dtype),
            step=step,
            copies=self.copies,
            seconds=seconds,
            dense_seconds=dense,
            flop_limit=WORK[step] * flops / peak.flops,
            byte_limit=moved[label] / peak.bytes,
            dense_flop_limit=WORK[step] * 2 * tokens * M * N / peak.flops,
            dense_byte_limit=moved["dense"] / peak.bytes,
        )


def _set_to(layer: nn.Module, tokens: int, algorithm: str) -> nn.Module:
    """The same layer, with the same parameters, that multiplies this many tokens by an algorithm."""
    other: Any = copy.copy(layer)
    other.algorithms = {bucket(tokens): algorithm}
    return other


def _run(layers: Sequence[nn.Module], x: Tensor, step: str, mode: str) -> Callable[[], object]:
    """What is timed: the step through all layers."""
    called: Sequence[Callable[[Tensor], Tensor]] = layers
    if mode == "compile":
        called = [torch.compile(layer, fullgraph=True, dynamic=False) for layer in layers]

    def build() -> Callable[[], object]:
        return _forward(called, x) if step == "forward" else _with_gradients(layers, called, x, step)

    return captured(build) if mode == "graphs" else build()


def _forward(called: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Callable[[], object]:
    def forward() -> None:
        with torch.no_grad():
            for layer in called:
                layer(x)

    return forward


def _with_gradients(
    layers: Sequence[nn.Module], called: Sequence[Callable[[Tensor], Tensor]], x: Tensor, step: str
) -> Callable[[], object]:
    """The backward step, whose outputs are computed once before, or the training step, which computes them too."""
    x = x.detach().clone().requires_grad_()
    learned = [[x, *(p for p in layer.parameters() if p.requires_grad)] for layer in layers]
    upstream = torch.randn_like(called[0](x))

    def training() -> None:
        for layer, parameters in zip(called, learned, strict=True):
            torch.autograd.grad(layer(x), parameters, upstream)

    if step == "training":
        return training
    outputs = [layer(x) for layer in called]

    def backward() -> None:
        for y, parameters in zip(outputs, learned, strict=True):
            torch.autograd.grad(y, parameters, upstream, retain_graph=True)

    return backward


def _held(layer: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())


def _moved(weights: int, tokens: int, shape: tuple[int, int], dtype: torch.dtype, step: str) -> int:
    """The bytes that a step reads and writes at least, with intermediates that stay in a cache."""
    vectors = tokens * sum(shape) * dtype.itemsize  # input and output, or their gradients
    forward = weights + vectors
    backward = 2 * weights + vectors + tokens * shape[1] * dtype.itemsize  # reads factors and input, writes gradients
    return {"forward": forward, "backward": backward, "training": forward + backward}[step]
