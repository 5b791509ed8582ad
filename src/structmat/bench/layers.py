"""Single layers: structured against dense, side by side, with weights that no cache holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from structmat import _checks
from structmat._progress import progress_bar
from structmat.bench.machine import Peak, checked_device, cold_bytes, dtype_name, measure_peak
from structmat.bench.results import LayerBench, LayerTime
from structmat.bench.stacks import WORK, Stacks
from structmat.bench.verify import FEW_TOKENS, check_format
from structmat.formats import Format
from structmat.nn import StructuredLinear
from structmat.nn.linear import bucket
from structmat.plan import Rule

SMALL_KEEP = 0.2
"""The least share of the parameters in the check at a small size, where a smaller budget may allow no member."""

Chooser = Callable[[nn.Module, Sequence[int]], object]
"""A function that sets ``algorithms`` on the layers of a network for some numbers of tokens, in place, like
``autotune_``."""


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

    A timed run calls a stack of layers one after the other, each with weights of its own, as in a network. A stack has
    more layers than the caches hold (``stacks.MOST_COPIES`` at most), and the dense stack has as many. On a CPU an
    untimed run of the same stack precedes each timed one, so that none is the first after another. First every format
    is checked against its dense definition in every dtype, at a small size with odd blocks and at the smallest shape,
    and each stack's layer again before it is timed.

    Args:
        formats: The rules, each with a ``keep``, by labels.
        shapes: The shapes ``(M, N)``, out before in.
        tokens: The numbers of input vectors.
        dtypes: The dtypes of weights and inputs.
        device: A CPU or a CUDA device.
        steps: Any of ``"forward"`` (the product), ``"backward"`` (the gradients of the input and of all factors) and
            ``"training"`` (both together).
        rounds: How often each is timed.
        mode: ``"eager"``, ``"graphs"`` (the whole stack as one CUDA graph) or ``"compile"`` (each layer through
            ``torch.compile``), for dense and structured alike.
        choose: A function that chooses algorithms, such as ``autotune_``, which are timed beside the automatic one.
        algorithms: The algorithms to time beside the automatic one, in the formats that have them.
        cold: The bytes of the weights in a stack, at least; None for the number that suits the device's caches.
        peaks: The peaks by the names of the dtypes; None for measuring them now.
        progress: Whether to show a progress bar.

    Returns:
        The times, the limits, and the hardware.

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
    _check_options({"formats": formats, "shapes": shapes, "tokens": tokens, "dtypes": dtypes}, steps, rounds)
    planned = {shape: {label: rule.format_for(*shape) for label, rule in formats.items()} for shape in shapes}
    gradients = any(step != "forward" for step in steps)
    cold = cold_bytes(device) if cold is None else cold
    measured = dict(peaks or {})
    times: list[LayerTime] = []
    total = len(dtypes) * (1 + len(shapes) * len(tokens))
    with progress_bar(total=total, desc="measuring", show=progress, leave=False) as bar:
        for dtype in dtypes:
            bar.set_postfix_str(f"checking {dtype_name(dtype)}")
            _check(formats, planned, dtype, device, tokens, gradients)
            bar.update()
        for dtype in dtypes:
            name = dtype_name(dtype)
            peak = measured[name] = measured.get(name) or measure_peak(dtype, device, large=cold > 0)
            for shape in shapes:
                stacks = Stacks(planned[shape], dtype, device, cold, mode)
                ways = _checked_ways(stacks, formats, choose, algorithms, tokens, gradients)
                for count in tokens:
                    bar.set_postfix_str(f"{shape[0]} x {shape[1]}, {count} tokens, {name}")
                    times += stacks.time(count, {label: ways[label][count] for label in ways}, steps, rounds, peak)
                    bar.update()
    settings = {"device": str(device), "mode": mode, "rounds": rounds, "cold_bytes": cold}
    return LayerBench(tuple(times), measured, settings=settings)


def _check_options(lists: Mapping[str, Sequence[Any] | Mapping[str, Any]], steps: Sequence[str], rounds: int) -> None:
    for name, values in lists.items():
        if not values:
            raise ValueError(f"expected at least one of {name}, got none")
    for step in steps or ("",):
        _checks.one_of(step, WORK, "a step")
    for count in lists["tokens"]:
        _checks.positive_int(count, "tokens")
    _checks.positive_int(rounds, "rounds")


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


def _checked_ways(
    stacks: Stacks,
    rules: Mapping[str, Rule],
    chooser: Chooser | None,
    algorithms: Sequence[str],
    tokens: Sequence[int],
    gradients: bool,
) -> dict[str, dict[int, list[str]]]:
    """What is timed beside the automatic algorithm, for each format and number of tokens, checked at a small size."""
    found: dict[str, dict[int, list[str]]] = {}
    for label, format in stacks.formats.items():
        wanted = [name for name in algorithms if name in format.algorithms]
        found[label] = {count: list(wanted) for count in tokens}
        if chooser is not None:
            layer = StructuredLinear(format, bias=False, dtype=stacks.dtype, device=stacks.device)
            chooser(nn.Sequential(layer), tokens)
            for count in tokens:
                name = layer.algorithms.get(bucket(count))
                found[label][count] += [] if name is None or name in wanted else [name]
        every = sorted({way for ways in found[label].values() for way in ways})
        small = _small(rules[label])
        check_format(small, stacks.dtype, stacks.device, [7], gradients=gradients, algorithms=every)
    return found
