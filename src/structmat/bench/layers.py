"""Single layers: structured against dense, side by side, with weights that no cache holds."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat._progress import progress_bar
from structmat.bench.machine import Peak, cold_bytes, hardware, measure_peak
from structmat.bench.timing import MODES, Timing, captured, time_in_turn
from structmat.bench.verify import FEW_TOKENS, check_format, check_layer, exact_weight
from structmat.formats import Format
from structmat.nn import StructuredLinear
from structmat.nn.linear import bucket
from structmat.plan import Rule

STEPS = ("forward", "backward", "training")
"""What is timed: the product, its gradients (of the input and of all factors), or both."""

WORK = {"forward": 1, "backward": 2, "training": 3}
"""Products of the size of the forward one that a step needs at least."""

SMALL_KEEP = 0.2
"""Least share of the parameters in the check at a small size, where a smaller budget may allow no member."""

MOST_COPIES = 256
"""Of a layer in a stack, however small it is."""

Chooser = Callable[[nn.Module, Sequence[int]], object]
"""Sets ``algorithms`` on the layers of a network for some numbers of tokens, in place, as ``autotune_`` does."""


@dataclass(frozen=True)
class LayerTime:
    """One layer in one setting, beside the dense layer that was timed in the same rounds.

    Attributes:
        format: Its label.
        settings: The format, as text.
        algorithm: ``"automatic"``, or the one that was chosen for this machine.
        shape: ``(M, N)``.
        tokens: Input vectors of a call.
        dtype: Of weights and input.
        step: ``"forward"``, ``"backward"`` or ``"training"``.
        copies: Layers with weights of their own that were called one after the other in a timed run.
        seconds: Of one layer.
        dense_seconds: Of one dense layer.
        flop_limit: Seconds that the operations take at the measured peak.
        byte_limit: Seconds that reading the weights and input and writing the output take at the measured peak.
        dense_flop_limit: The same for the dense layer.
        dense_byte_limit: The same for the dense layer.
    """

    format: str
    settings: str
    algorithm: str
    shape: tuple[int, int]
    tokens: int
    dtype: str
    step: str
    copies: int
    seconds: Timing
    dense_seconds: Timing
    flop_limit: float
    byte_limit: float
    dense_flop_limit: float
    dense_byte_limit: float

    @property
    def speedup(self) -> float:
        """How many times faster than the dense layer, by the medians."""
        return self.dense_seconds.median / self.seconds.median

    @property
    def flop_share(self) -> float:
        """Share of the measured peak of operations that is reached."""
        return self.flop_limit / self.seconds.median

    @property
    def byte_share(self) -> float:
        """Share of the measured peak of reading that is reached."""
        return self.byte_limit / self.seconds.median

    @property
    def limit_share(self) -> float:
        """Share of the roofline reached: the larger of the two limits over the time."""
        return max(self.flop_share, self.byte_share)

    @property
    def dense_limit_share(self) -> float:
        """The same for the dense layer."""
        return max(self.dense_flop_limit, self.dense_byte_limit) / self.dense_seconds.median

    def to_dict(self) -> dict[str, Any]:
        """All fields and ratios as JSON-compatible data."""
        ratios = ("speedup", "flop_share", "byte_share", "limit_share", "dense_limit_share")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in ratios}}


@dataclass(frozen=True)
class LayerBench:
    """What ``bench_layers`` measured.

    Attributes:
        times: One for each setting.
        peaks: What was possible in each dtype in the same run.
        hardware: What it ran on.
        settings: Device, mode and rounds.
    """

    times: tuple[LayerTime, ...]
    peaks: Mapping[str, Peak]
    hardware: Mapping[str, str] = field(default_factory=hardware)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-compatible data."""
        return {
            "hardware": dict(self.hardware),
            "settings": dict(self.settings),
            "peaks": {name: dataclasses.asdict(peak) for name, peak in self.peaks.items()},
            "layers": [found.to_dict() for found in self.times],
        }

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps(self.to_dict(), indent=1)


def bench_layers(
    formats: Mapping[str, Rule],
    *,
    shapes: Sequence[tuple[int, int]] = ((4096, 4096),),
    tokens: Sequence[int] = (1, 16, 128),
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    device: torch.device | str = "cpu",
    steps: Sequence[str] = ("forward",),
    rounds: int = 20,
    mode: str = "eager",
    choose: Chooser | None = None,
    algorithms: Sequence[str] = (),
    cold: int | None = None,
    peaks: Mapping[str, Peak] | None = None,
    progress: bool = True,
) -> LayerBench:
    """Time structured layers against ``nn.Linear``, in turn in the same run.

    A timed run calls a stack of layers one after the other, each with weights of its own, so many that no cache holds
    them (``MOST_COPIES`` at most), as in a network; the dense stack has as many layers. On a CPU an untimed run of the
    same stack precedes each timed one, so that none is the first after another. First every format is checked against
    its dense definition in every dtype, at a small size with odd blocks and at the smallest shape, and each stack's
    layer again before it is timed.

    Args:
        formats: Rules with a ``keep``, by a label.
        shapes: ``(M, N)``, out before in.
        tokens: Numbers of input vectors.
        dtypes: Of weights and inputs.
        device: A CPU or a CUDA device.
        steps: Any of ``"forward"``, ``"backward"`` and ``"training"``, which is both together.
        rounds: How often each is timed.
        mode: ``"eager"``, ``"graphs"`` (the whole stack as one CUDA graph) or ``"compile"`` (each layer through
            ``torch.compile``), for dense and structured alike.
        choose: Chooses algorithms for this machine, such as ``autotune_``; where it changes something, the layer is
            timed as it is and with what was chosen.
        algorithms: To time beside the automatic one, in the formats that have them.
        cold: Bytes of the weights in a stack, at least; None for what suits the device's caches.
        peaks: By the dtypes' names; None for measuring them now.
        progress: Whether to show a progress bar.

    Returns:
        Times, limits, and the hardware.

    Raises:
        ValueError: If an option is unknown or empty, a rule does not fit a shape, or graphs are wanted on a CPU.
        IncorrectResultError: If a product or gradient is not what its dense definition says; nothing is timed then.

    Example:
        >>> from structmat import Blast
        >>> rules = {"blast": Rule(Blast, keep=0.5, blocks=4)}
        >>> found = bench_layers(rules, shapes=[(64, 64)], tokens=[2], rounds=1, cold=0, progress=False)
        >>> found.times[0].settings
        'Blast(M=64, N=64, blocks=(4, 4), rank=14)'
    """
    device = checked_device(device, mode)
    for name, values in (("formats", formats), ("shapes", shapes), ("tokens", tokens), ("dtypes", dtypes)):
        if not values:
            raise ValueError(f"expected at least one of {name}, got none")
    for step in steps or ("",):
        _checks.one_of(step, STEPS, "a step")
    for count in tokens:
        _checks.positive_int(count, "tokens")
    _checks.positive_int(rounds, "rounds")
    planned = {shape: {label: rule.format_for(*shape) for label, rule in formats.items()} for shape in shapes}
    gradients = any(step != "forward" for step in steps)
    cold = cold_bytes(device) if cold is None else cold
    measured = dict(peaks or {})
    times: list[LayerTime] = []
    bar = progress_bar(
        total=len(dtypes) * (1 + len(shapes) * len(tokens)), desc="measuring", show=progress, leave=False
    )
    with bar:
        for dtype in dtypes:
            bar.set_postfix_str(f"checking {_name(dtype)}")
            _check(formats, planned, dtype, device, tokens, gradients)
            bar.update()
        for dtype in dtypes:
            if _name(dtype) not in measured:
                measured[_name(dtype)] = measure_peak(dtype, device, large=cold > 0)
            for shape in shapes:
                stacks = _Stacks(planned[shape], dtype, device, cold, mode)
                stacks.choose(choose, algorithms, tokens, formats, gradients)
                for count in tokens:
                    bar.set_postfix_str(f"{shape[0]} x {shape[1]}, {count} tokens, {_name(dtype)}")
                    times += stacks.time(count, steps, rounds, measured[_name(dtype)])
                    bar.update()
    settings = {"device": str(device), "mode": mode, "rounds": rounds, "cold_bytes": cold}
    return LayerBench(tuple(times), measured, settings=settings)


def checked_device(device: torch.device | str, mode: str) -> torch.device:
    """The device, if it is one that can be timed in this mode.

    Args:
        device: A CPU or a CUDA device.
        mode: One of ``MODES``.

    Returns:
        The device.

    Raises:
        ValueError: If it is neither a CPU nor a CUDA device, is not there, or cannot run in the mode.
    """
    _checks.one_of(mode, MODES, "mode")
    device = torch.device(device)
    _checks.one_of(device.type, ("cpu", "cuda"), "the device's type")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a CUDA device that is there, but PyTorch sees none; take the device cpu")
    if mode == "graphs" and device.type != "cuda":
        raise ValueError("expected a CUDA device for the mode 'graphs', got the CPU; take 'eager' or 'compile'")
    return device


def _check(
    formats: Mapping[str, Rule],
    planned: Mapping[tuple[int, int], Mapping[str, Format]],
    dtype: torch.dtype,
    device: torch.device,
    tokens: Sequence[int],
    gradients: bool,
) -> None:
    """Check each format at a small size with odd blocks, and at the smallest shape that will be timed."""
    smallest = min(planned, key=lambda shape: shape[0] * shape[1])
    for label, rule in formats.items():
        check_format(_small(rule), dtype, device, sorted({1, 7, *tokens}), gradients=gradients)
        if gradients:
            check_format(planned[smallest][label], dtype, device, [FEW_TOKENS], gradients=True)


def _small(rule: Rule) -> Format:
    """A small member of a format, with blocks of odd sizes."""
    blocks = rule.blocks or 1
    I, J = (blocks, blocks) if isinstance(blocks, int) else blocks
    return dataclasses.replace(rule, keep=max(rule.keep or 0.0, SMALL_KEEP)).format_for(21 * I, 27 * J)


class _Stacks:
    """The layers of one shape and dtype: one stack for the dense layer and for each format."""

    def __init__(
        self, formats: Mapping[str, Format], dtype: torch.dtype, device: torch.device, cold: int, mode: str
    ) -> None:
        self.dtype, self.device, self.mode, self.formats = dtype, device, mode, formats
        M, N = next(iter(formats.values())).shape
        self.shape = (M, N)
        first: dict[str, nn.Module] = {"dense": nn.Linear(N, M, bias=False, dtype=dtype, device=device)}
        self.weights: dict[str, Tensor] = {}
        self.ways: dict[str, dict[int, list[str]]] = {}
        for label, format in formats.items():
            layer = StructuredLinear(format, bias=False, dtype=dtype, device=device)
            self.weights[label] = exact_weight(layer)
            first[label] = layer
        self.bytes = {label: _held(layer) for label, layer in first.items()}
        self.copies = min(MOST_COPIES, max(2, -(-cold // min(self.bytes.values())))) if cold else 1
        self.layers = {
            label: [layer, *(copy.deepcopy(layer) for _ in range(self.copies - 1))] for label, layer in first.items()
        }

    def choose(
        self,
        chooser: Chooser | None,
        algorithms: Sequence[str],
        tokens: Sequence[int],
        rules: Mapping[str, Rule],
        gradients: bool,
    ) -> None:
        """Find what is to be timed beside the automatic choice, and check all of it at a small size."""
        for label, format in self.formats.items():
            wanted = [name for name in algorithms if name in format.algorithms]
            self.ways[label] = {count: list(wanted) for count in tokens}
            if chooser is not None:
                layer = StructuredLinear(format, bias=False, dtype=self.dtype, device=self.device)
                chooser(nn.Sequential(layer), tokens)
                for count in tokens:
                    name = layer.algorithms.get(bucket(count))
                    self.ways[label][count] += [] if name is None or name in wanted else [name]
            every = sorted({name for names in self.ways[label].values() for name in names})
            check_format(_small(rules[label]), self.dtype, self.device, [7], gradients=gradients, algorithms=every)

    def time(self, tokens: int, steps: Sequence[str], rounds: int, peak: Peak) -> list[LayerTime]:
        """Time every step with so many tokens."""
        x = torch.randn(tokens, self.shape[1], device=self.device).to(self.dtype)
        stacks: dict[tuple[str, str], list[nn.Module]] = {("dense", "automatic"): self.layers["dense"]}
        for label in self.formats:
            stacks[label, "automatic"] = self.layers[label]
            for algorithm in self.ways[label][tokens]:
                stacks[label, algorithm] = [_set_to(layer, tokens, algorithm) for layer in self.layers[label]]
        for (label, _), layers in stacks.items():
            if isinstance(layers[0], StructuredLinear):
                check_layer(layers[0], x, self.weights[label])
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

    def _result(
        self, label: str, way: str, tokens: int, step: str, seconds: Timing, dense: Timing, peak: Peak
    ) -> LayerTime:
        M, N = self.shape
        format = self.formats[label]
        flops = 2 * format.multiplications(tokens, self.layers[label][0].state_dict())
        moved = {name: _moved(self.bytes[name], tokens, self.shape, self.dtype, step) for name in (label, "dense")}
        return LayerTime(
            label, str(format), way, self.shape, tokens, _name(self.dtype), step, self.copies, seconds, dense,
            WORK[step] * flops / peak.flops, moved[label] / peak.bytes,
            WORK[step] * 2 * tokens * M * N / peak.flops, moved["dense"] / peak.bytes,
        )  # fmt: skip


def _set_to(layer: nn.Module, tokens: int, algorithm: str) -> nn.Module:
    """The same layer, with the same parameters, that multiplies so many tokens by an algorithm."""
    other: Any = copy.copy(layer)
    other.algorithms = {bucket(tokens): algorithm}
    return other


def _run(layers: Sequence[nn.Module], x: Tensor, step: str, mode: str) -> Callable[[], object]:
    """What is timed: the step through all layers."""
    called: Sequence[Callable[[Tensor], Tensor]] = layers
    if mode == "compile":
        called = [torch.compile(layer, fullgraph=True, dynamic=False) for layer in layers]

    def build() -> Callable[[], object]:
        return _step(layers, called, x, step)

    return captured(build) if mode == "graphs" else build()


def _step(
    layers: Sequence[nn.Module], called: Sequence[Callable[[Tensor], Tensor]], x: Tensor, step: str
) -> Callable[[], object]:
    if step == "forward":

        def forward() -> None:
            with torch.no_grad():
                for layer in called:
                    layer(x)

        return forward
    x = x.detach().clone().requires_grad_()
    learned = [[x, *(p for p in layer.parameters() if p.requires_grad)] for layer in layers]
    upstream = torch.randn_like(called[0](x))
    if step == "training":

        def training() -> None:
            for layer, parameters in zip(called, learned, strict=True):
                torch.autograd.grad(layer(x), parameters, upstream)

        return training
    outputs = [layer(x) for layer in called]

    def backward() -> None:
        for y, parameters in zip(outputs, learned, strict=True):
            torch.autograd.grad(y, parameters, upstream, retain_graph=True)

    return backward


def _held(layer: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in layer.state_dict().values())


def _moved(weights: int, tokens: int, shape: tuple[int, int], dtype: torch.dtype, step: str) -> int:
    """Bytes that a step reads and writes at least, with intermediates that stay in a cache."""
    vectors = tokens * sum(shape) * dtype.itemsize  # input and output, or their gradients
    forward = weights + vectors
    backward = 2 * weights + vectors + tokens * shape[1] * dtype.itemsize  # reads factors and input, writes gradients
    return {"forward": forward, "backward": backward, "training": forward + backward}[step]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
