"""Choose for each structured layer the fastest way to multiply, by measuring it where it runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat import _checks
from structmat._files import read_json, write_atomically
from structmat.bench.machine import hardware
from structmat.bench.timing import time_side_by_side
from structmat.formats import Format
from structmat.network.capture import count_vectors
from structmat.network.sites import structured_layers
from structmat.network.surgery import densify_, tile_
from structmat.nn import StructuredModule
from structmat.nn.linear import bucket
from structmat.ops.common import TRITON

AUTOMATIC = "automatic"
DENSE = "dense"
TILED = "tiled"

COLD_BYTES = 96 * 2**20
"""The memory that the copies of a layer hold together, which are measured in turn so that no cache holds them all."""

GAIN = 0.95
"""The time, relative to the automatic way, below which another way is taken; a smaller gain is within the noise."""


@dataclass(frozen=True)
class Choice:
    """The measurement of one layer at one number of tokens, and the way that was chosen.

    Attributes:
        layer: The name of the layer.
        format: The format of the layer, as text.
        tokens: The number of vectors that the layer multiplies in a call.
        dtype: The dtype of the product.
        algorithm: One of the format's ``algorithms``, ``"automatic"``, ``"tiled"`` or ``"dense"``.
        seconds: The time that the chosen way takes.
        automatic_seconds: The time that the automatic way takes.
        dense_seconds: The time that a dense product takes.
        dense_bytes: The memory that the dense weight would take beyond that of the factors.
    """

    layer: str
    format: str
    tokens: int
    dtype: str
    algorithm: str
    seconds: float
    automatic_seconds: float
    dense_seconds: float
    dense_bytes: int

    @classmethod
    def from_data(cls, data: Any) -> Choice:
        """Read what the JSON of one choice holds.

        Args:
            data: The parsed JSON.

        Returns:
            The choice.

        Raises:
            ValueError: If a field is missing or of another kind, or a number is out of range.
        """
        kinds = {"int": int, "float": float, "str": str}
        found = _checks.fields(data, {f.name: kinds[str(f.type)] for f in dataclasses.fields(cls)}, "a choice")
        _checks.positive_int(found["tokens"], "'tokens' of a choice")
        if not min(found["seconds"], found["automatic_seconds"], found["dense_seconds"]) > 0:
            raise ValueError(f"expected seconds above 0 in a choice, got {_checks.shown(data)}")
        return cls(**{**found, "algorithm": found["algorithm"].replace(" ", "_")})

    @property
    def dense_is_faster(self) -> bool:
        """Whether a dense product would be faster than what was chosen."""
        return self.algorithm != DENSE and self.dense_seconds < self.seconds


@dataclass(frozen=True)
class Tuning:
    """The choices for a network; ``print`` shows them as a table.

    Attributes:
        choices: The choices, one for each layer and number of tokens.
        hardware: The facts of the machine on which they were measured.
    """

    choices: tuple[Choice, ...]
    hardware: Mapping[str, str]

    @property
    def densified(self) -> tuple[str, ...]:
        """The layers for which a dense product was chosen."""
        return tuple(dict.fromkeys(choice.layer for choice in self.choices if choice.algorithm == DENSE))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the choices as JSON, in one step.

        Args:
            path: The file.
        """
        text = json.dumps(
            {"hardware": dict(self.hardware), "choices": [dataclasses.asdict(choice) for choice in self.choices]}
        )
        write_atomically(path, lambda temporary: temporary.write_text(text))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tuning:
        """Read what ``save`` wrote; names of algorithms in old files, such as ``"in place"``, get their underscores.

        Args:
            path: The file.

        Returns:
            The choices, for ``apply_``.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file holds something else; the message names it.
        """
        what = "the choices that Tuning.save writes"
        found = _checks.fields(read_json(path, what), {"hardware": dict, "choices": list}, f"{what} in {str(path)!r}")
        with _checks.about(os.fspath(path)):
            choices = tuple(Choice.from_data(choice) for choice in found["choices"])
            return cls(choices, _checks.values(found["hardware"], str, "'hardware' of the choices"))

    def apply_(self, model: nn.Module, *, allow_dense: bool = False) -> nn.Module:
        """Set the choices on a network of the same plan, in place; a warning says where the hardware is another.

        Args:
            model: The network.
            allow_dense: Whether layers for which a dense product was chosen may be made dense.

        Returns:
            The same network.

        Raises:
            ValueError: If a layer is missing or has another format, or a dense one is not allowed; nothing has changed
                then.
        """
        layers = _layers(model)
        for choice in self.choices:
            if choice.layer not in layers or str(layers[choice.layer].format) != choice.format:
                found = layers[choice.layer].format if choice.layer in layers else "no structured layer"
                raise ValueError(f"expected {choice.format} at {choice.layer!r}, as it was measured, got {found}")
            known = (AUTOMATIC, DENSE, TILED, *layers[choice.layer].format.algorithms)
            _checks.one_of(choice.algorithm, known, f"the algorithm of {choice.layer!r}")
        if self.densified and not allow_dense:
            raise ValueError(
                f"expected allow_dense=True, since a dense product was chosen for {len(self.densified)} layers: "
                f"{', '.join(self.densified[:5])}"
            )
        here = _hardware(next(iter(layers.values())).factors)
        other = {key: (value, here.get(key)) for key, value in self.hardware.items() if here.get(key) != value}
        if other:
            changes = "; ".join(f"{key} {then}, now {now}" for key, (then, now) in other.items())
            warnings.warn(
                f"the choices were measured elsewhere ({changes}); measure again with autotune_", stacklevel=2
            )
        for choice in self.choices:
            layers[choice.layer].algorithms = {}
        for choice in self.choices:
            if choice.algorithm in layers[choice.layer].format.algorithms:
                layers[choice.layer].algorithms[bucket(choice.tokens)] = choice.algorithm
        tiled = dict.fromkeys(choice.layer for choice in self.choices if choice.algorithm == TILED)
        if tiled:
            tile_(model, tiled)
        if self.densified:
            densify_(model, self.densified)
        return model

    def __str__(self) -> str:
        groups: dict[tuple[Any, ...], list[Choice]] = {}
        for choice in self.choices:
            groups.setdefault((choice.format, choice.tokens, choice.dtype, choice.algorithm), []).append(choice)
        lines = []
        for (format, tokens, dtype, algorithm), found in groups.items():
            first = found[0]
            line = (
                f"{len(found)} x {format}, {tokens} tokens, {dtype}: {algorithm}, {first.seconds * 1e3:.3f} ms, "
                f"{first.dense_seconds / first.seconds:.2f}x of the dense speed"
            )
            if first.dense_is_faster:
                line += f"; dense would be faster and take {first.dense_bytes / 2**20:+.1f} MiB for each"
            lines.append(line)
        return "\n".join(lines)


def autotune_(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    tokens: Iterable[int] | None = None,
    allow_dense: bool = False,
    rounds: int = 10,
) -> Tuning:
    """Measure every structured layer on this hardware and set the fastest way to multiply, in place.

    Ways are the algorithms of the format, tiles for GBLR matrices (not in training mode), and the dense product. Layers
    of one format are measured once, at the most frequent number of vectors of each power of two, for which a choice
    holds. What is chosen is told: the result says it for every layer, and where a dense product would be faster and
    what it would cost in memory. Save the network before: layers in tiles or dense are saved as such.

    Args:
        model: The network, on the device and in the dtype in which it will run.
        example_inputs: A batch that it is called on: a tensor, a tuple of arguments or a mapping of keyword arguments.
        tokens: The numbers of vectors to measure all layers at, instead of calling the network, such as those of the
            prompt and of one step of a generation.
        allow_dense: Whether layers for which a dense product is faster, over all of their calls, are made dense.
        rounds: The number of times that each way is timed.

    Returns:
        The choices.

    Raises:
        ValueError: If there is no structured layer, not exactly one of ``example_inputs`` and ``tokens`` is given, or
            the call reached no structured layer.

    Example:
        >>> from structmat import Blast, StructuredLinear
        >>> model = nn.Sequential(StructuredLinear(Blast(64, 64, blocks=4, rank=8)))
        >>> autotune_(model, tokens=[1, 16], rounds=1).choices[0].tokens
        1
    """
    if (example_inputs is None) == (tokens is None):
        raise ValueError("expected either example_inputs or tokens, got " + ("neither" if tokens is None else "both"))
    layers = _layers(model)
    if tokens is None:
        calls = count_vectors(model, layers, example_inputs)
    else:
        counts = [_checks.positive_int(count, "tokens") for count in tokens]
        if not counts:
            raise ValueError("expected at least one number of tokens, got none")
        calls = {name: Counter((count, _dtype(layer)) for count in counts) for name, layer in layers.items()}
    if not any(calls.values()):
        raise ValueError("expected a call that reaches a structured layer, got one that reached none")
    ties: dict[tuple[int, ...], list[str]] = {}
    for name, layer in layers.items():
        ties.setdefault(tuple(id(factor) for factor in layer.factors.values()), []).append(name)
    measured: dict[tuple[Any, ...], dict[str, float]] = {}
    choices: list[Choice] = []
    for names in ties.values():  # layers with the same factors become dense, or tiles, together
        layer = layers[names[0]]
        timed: list[_Timed] = []
        for (count, dtype), times in _by_bucket(sum((calls[name] for name in names), Counter())):
            contents = layer.format.num_parameters(layer.factors)
            key = (layer.format, count, dtype, contents, next(iter(layer.factors.values())).device)
            if key not in measured:
                measured[key] = measured_ways(layer, count, dtype, rounds)
            timed.append(_Timed(count, dtype, times, measured[key]))
        for name in names:
            choices += _chosen(name, layer, timed, allow_dense and "" not in names, "" not in names)
    optimization = Tuning(tuple(choices), _hardware(next(iter(layers.values())).factors))
    optimization.apply_(model, allow_dense=allow_dense)
    return optimization


@dataclass(frozen=True)
class _Timed:
    """Seconds of each way for one number of tokens, and how many calls have it."""

    tokens: int
    dtype: torch.dtype
    calls: int
    seconds: Mapping[str, float]


def _by_bucket(calls: Counter[tuple[int, torch.dtype]]) -> list[tuple[tuple[int, torch.dtype], int]]:
    """The most frequent number of tokens of each bucket, and the calls in it: what is set holds for a bucket."""
    buckets: dict[tuple[int, torch.dtype], Counter[int]] = {}
    for (count, dtype), times in calls.items():
        buckets.setdefault((bucket(count), dtype), Counter())[count] += times
    return [((found.most_common(1)[0][0], dtype), found.total()) for (_, dtype), found in buckets.items()]


def _chosen(
    name: str, layer: StructuredModule, timed: list[_Timed], allow_dense: bool, allow_tiles: bool
) -> list[Choice]:
    best: list[str] = []
    for one in timed:
        others = {way: seconds for way, seconds in one.seconds.items() if way != DENSE}
        if not allow_tiles:
            others.pop(TILED, None)
        way = min(others, key=lambda key: others[key])
        best.append(way if others[way] < GAIN * others[AUTOMATIC] else AUTOMATIC)
    if TILED in best:  # a layer is either in tiles or not
        gain = sum(one.calls * (one.seconds[AUTOMATIC] - one.seconds[TILED]) for one in timed)
        best = [TILED if gain > 0 else AUTOMATIC] * len(best)
    structured = sum(one.calls * one.seconds[way] for one, way in zip(timed, best, strict=True))
    if allow_dense and sum(one.calls * one.seconds[DENSE] for one in timed) < GAIN * structured:
        best = [DENSE] * len(best)
    held = sum(factor.numel() * factor.element_size() for factor in layer.factors.values())
    choices = []
    for one, way in zip(timed, best, strict=True):
        count, dtype, times = one.tokens, one.dtype, one.seconds
        dense_bytes = layer.format.M * layer.format.N * dtype.itemsize - held
        choices.append(
            Choice(
                name,
                str(layer.format),
                count,
                str(dtype).removeprefix("torch."),
                way,
                times[way],
                times[AUTOMATIC],
                times[DENSE],
                dense_bytes,
            )
        )
    return choices


@torch.no_grad()
def measured_ways(layer: StructuredModule, tokens: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Time each way of multiplying, each call on the next of several copies of the layer.

    Args:
        layer: The layer.
        tokens: The number of vectors.
        dtype: The dtype of the product.
        rounds: How often each way is timed.

    Returns:
        The seconds by way; ``DENSE`` is a dense product of the layer's shape.
    """
    format = layer.format
    specs = format.factor_specs()
    factors = {n: f.detach().to(specs[n].dtype or dtype) for n, f in layer.factors.items()}
    device = next(iter(factors.values())).device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, format.N, generator=generator).to(device, dtype)
    ways: dict[str, tuple[Format, Mapping[str, Tensor], str]] = {AUTOMATIC: (format, factors, "")}
    kernels = device.type == "cuda" and dtype != torch.float64 and importlib.util.find_spec("triton") is not None
    ways |= {name: (format, factors, name) for name in format.algorithms if name != TRITON or kernels}
    tiled = None if layer.training else format.for_inference(factors)
    if tiled is not None:
        ways[TILED] = (*tiled, "")
    runs = {name: _in_turn(way, x) for name, way in ways.items()}
    weight = torch.randn(format.shape, generator=generator).to(device, dtype)
    copies = [weight.clone() for _ in range(_copies([weight]))]
    turn = iter(range(10**9))
    runs[DENSE] = lambda: F.linear(x, copies[next(turn) % len(copies)])
    return time_side_by_side(runs, rounds=rounds, settle=int(device.type == "cpu"))


def _in_turn(way: tuple[Format, Mapping[str, Tensor], str], x: Tensor) -> Callable[[], Tensor]:
    format, factors, algorithm = way
    copies = [{n: f.clone() for n, f in factors.items()} for _ in range(_copies(factors.values()))]
    turn = iter(range(10**9))
    return lambda: format.matmul(x, copies[next(turn) % len(copies)], algorithm)


def _copies(tensors: Iterable[Tensor]) -> int:
    held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return max(1, min(8, -(-COLD_BYTES // max(held, 1))))


def _layers(model: nn.Module) -> dict[str, StructuredModule]:
    layers = structured_layers(model)
    if not layers:
        raise ValueError("expected a network with structured layers, got none")
    return layers


def _dtype(layer: StructuredModule) -> torch.dtype:
    specs = layer.format.factor_specs()
    return next(factor.dtype for name, factor in layer.factors.items() if specs[name].dtype is None)


def _hardware(factors: Mapping[str, Tensor]) -> dict[str, str]:
    device = next(iter(factors.values())).device
    facts = hardware()
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "torch": facts["torch"]}
    return {key: facts[key] for key in ("processor", "threads", "capability", "torch")}
