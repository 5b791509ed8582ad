"""Whole language models: prefill, generation and the training step, dense against compressed."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat._progress import progress_bar
from structmat.bench.layers import checked_device
from structmat.bench.machine import hardware
from structmat.bench.timing import Timing, captured, time_in_turn
from structmat.bench.verify import FEW_TOKENS, check_format, check_layer, exact_weight
from structmat.formats import Format
from structmat.nn import StructuredLinear

DECODED = 16
"""So many tokens are generated in a row to time decoding."""


@dataclass(frozen=True)
class ModelTime:
    """One model doing one thing, beside the reference that was timed in the same rounds.

    Attributes:
        model: Its name.
        step: ``"prefill"``, ``"decode"`` (one token), ``"generate"`` or ``"training"``.
        tokens: Of the prompt, 1, generated, or of the training text.
        seconds: What it takes.
        reference_seconds: What the reference takes.
        extrapolated: Whether fewer tokens were generated and the time was scaled up.
    """

    model: str
    step: str
    tokens: int
    seconds: Timing
    reference_seconds: Timing
    extrapolated: bool = False

    @property
    def speedup(self) -> float:
        """How many times faster than the reference, by the medians."""
        return self.reference_seconds.median / self.seconds.median

    @property
    def tokens_per_second(self) -> float:
        """By the median."""
        return self.tokens / self.seconds.median

    def to_dict(self) -> dict[str, Any]:
        """All fields and ratios as JSON-compatible data."""
        ratios = ("speedup", "tokens_per_second")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in ratios}}


@dataclass(frozen=True)
class ModelSize:
    """What a model takes.

    Attributes:
        parameters: Their number.
        bytes: Of parameters and buffers.
        peak_bytes: The most while a prompt was read and a token generated, with ``bytes`` in it; None on a CPU.
    """

    parameters: int
    bytes: int
    peak_bytes: int | None


@dataclass(frozen=True)
class GenerationBench:
    """What ``bench_generation`` measured.

    Attributes:
        times: One for each model and thing it does.
        sizes: By the models' names.
        hardware: What it ran on.
        settings: Device, dtype, mode and rounds.
    """

    times: tuple[ModelTime, ...]
    sizes: Mapping[str, ModelSize]
    hardware: Mapping[str, str] = field(default_factory=hardware)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-compatible data."""
        return {
            "hardware": dict(self.hardware),
            "settings": dict(self.settings),
            "sizes": {name: dataclasses.asdict(size) for name, size in self.sizes.items()},
            "models": [found.to_dict() for found in self.times],
        }

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps(self.to_dict(), indent=1)


def bench_generation(
    models: Mapping[str, nn.Module],
    *,
    prefill: Sequence[int] = (512,),
    generate: Sequence[int] = (10, 100, 1000),
    training: Sequence[int] = (),
    most_tokens: int | None = None,
    rounds: int = 5,
    mode: str = "eager",
    progress: bool = True,
) -> GenerationBench:
    """Time language models of transformers in turn in the same run, at batch size 1.

    ``prefill`` is one call on a prompt, with a cache to be filled but in the mode ``"compile"``. Generation starts
    from one token and takes the most probable next one each time; in the modes ``"graphs"`` and ``"compile"`` with a
    static cache as long as the longest text. Every structured layer is checked against its dense definition first,
    one of each format.

    Args:
        models: By name, all on one device and in one dtype; the first is the reference, a dense one in general.
        prefill: Lengths of prompts.
        generate: Lengths of texts to generate.
        training: Lengths of texts for a training step (forward and backward, gradients of all parameters).
        most_tokens: Generate no more than so many tokens, and scale the time up for longer texts; None for no limit.
        rounds: How often each is timed; generations of more than 100 tokens three times at most.
        mode: ``"eager"``, ``"graphs"`` (each call as a CUDA graph) or ``"compile"``, for all models alike.
        progress: Whether to show a progress bar.

    Returns:
        Times, sizes and the hardware.

    Raises:
        ValueError: If there is no model, devices or dtypes differ, a number is not positive, or the mode does not fit
            the device.
        IncorrectResultError: If a layer does not compute what its dense definition says; nothing is timed then.
    """
    if not models:
        raise ValueError("expected at least one model, got none")
    for counts, what in ((prefill, "prefill"), (generate, "generate"), (training, "training")):
        for count in counts:
            _checks.positive_int(count, what)
    _checks.positive_int(rounds, "rounds")
    if most_tokens is not None:
        _checks.positive_int(most_tokens, "most_tokens")
    device, dtype = _common(models)
    checked_device(device, mode)
    bar = progress_bar(total=3 + len(prefill) + len(generate) + len(training), show=progress, leave=False)
    with bar:
        _describe(bar, "checking")
        _check(models, [1, *prefill], bool(training))
        sizes = {name: _size(model, max(prefill, default=1)) for name, model in models.items()}
        bar.update()
        times: list[ModelTime] = []
        reference = next(iter(models))

        def add(step: str, tokens: int, found: Mapping[str, Timing], scale: float = 1.0) -> None:
            scaled = {name: timing.each(1 / scale) if scale != 1 else timing for name, timing in found.items()}
            times.extend(
                ModelTime(name, step, tokens, timing, scaled[reference], scale != 1) for name, timing in scaled.items()
            )
            bar.update()

        for tokens in prefill:
            _describe(bar, f"prefill {tokens}")
            runs = {name: _prefill(model, tokens, mode) for name, model in models.items()}
            add("prefill", tokens, time_in_turn(runs, rounds=rounds, device=device))
        measured = [min(tokens, most_tokens or tokens) for tokens in generate]
        _describe(bar, "warming up")
        writers = {name: _Writer(model, max([DECODED, *measured]), mode) for name, model in models.items()}
        bar.update()
        for step, tokens, count in [
            ("decode", 1, DECODED), *(("generate", n, m) for n, m in zip(generate, measured, strict=True))
        ]:  # fmt: skip
            _describe(bar, f"{step} {tokens}")
            runs = {name: functools.partial(writer.write, count) for name, writer in writers.items()}
            few = rounds if count <= 100 else min(rounds, 3)
            found = time_in_turn(runs, rounds=few, warmup=1 if count <= DECODED else 0, device=device)
            add(step, tokens, found, tokens / count)
        del writers
        for tokens in training:
            _describe(bar, f"training {tokens}")
            runs = {name: _training(model, tokens, mode) for name, model in models.items()}
            add("training", tokens, time_in_turn(runs, rounds=rounds, device=device))
    times = [dataclasses.replace(t, extrapolated=t.extrapolated and t.step == "generate") for t in times]
    settings = {
        "device": str(device), "dtype": str(dtype).removeprefix("torch."), "mode": mode, "rounds": rounds,
        "most_tokens": most_tokens, "batch": 1,
    }  # fmt: skip
    return GenerationBench(tuple(times), sizes, settings=settings)


def _describe(bar: Any, text: str) -> None:
    bar.set_description(text)


def _common(models: Mapping[str, nn.Module]) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of all models.

    Args:
        models: By name.

    Returns:
        Both.

    Raises:
        ValueError: If they differ.
    """
    found = {name: (p.device, p.dtype) for name, model in models.items() for p in [next(model.parameters())]}
    if len(set(found.values())) > 1:
        texts = ", ".join(f"{name}: {device}, {dtype}" for name, (device, dtype) in found.items())
        raise ValueError(f"expected models on one device and of one dtype, got {texts}")
    return next(iter(found.values()))


def _check(models: Mapping[str, nn.Module], tokens: Sequence[int], gradients: bool) -> None:
    """Check one structured layer of each format and choice of algorithms as it is, and the gradients of the format."""
    seen: set[tuple[Format, str]] = set()
    for model in models.values():
        for layer in model.modules():
            if not isinstance(layer, StructuredLinear) or (layer.format, str(layer.algorithms)) in seen:
                continue
            seen.add((layer.format, str(layer.algorithms)))
            weight, factor = exact_weight(layer), next(layer.parameters())
            for count in tokens:
                check_layer(layer, torch.randn(count, layer.in_features, device=factor.device).to(factor.dtype), weight)
            if gradients:
                check_format(layer.format, factor.dtype, factor.device, [FEW_TOKENS], gradients=True)


def _size(model: nn.Module, tokens: int) -> ModelSize:
    """Count the parameters and, on a GPU, what a prompt and one more token take."""
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
    ids = _ids(model, tokens)
    if ids.device.type != "cuda":
        return ModelSize(parameters, size, None)
    torch.cuda.synchronize(ids.device)
    torch.cuda.reset_peak_memory_stats(ids.device)
    before = torch.cuda.memory_allocated(ids.device)
    with torch.no_grad():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        model(ids[:, :1], past_key_values=cache, use_cache=True)
    torch.cuda.synchronize(ids.device)
    return ModelSize(parameters, size, size + torch.cuda.max_memory_allocated(ids.device) - before)


def _ids(model: Any, tokens: int) -> Tensor:
    """A random text ``(1, tokens)``."""
    device = next(model.parameters()).device
    return torch.randint(model.get_input_embeddings().num_embeddings, (1, tokens), device=device)


def _prefill(model: Any, tokens: int, mode: str) -> Callable[[], object]:
    ids = _ids(model, tokens)
    call = _compiled(model, mode)

    def run() -> None:
        with torch.no_grad():
            call(ids, use_cache=mode != "compile", logits_to_keep=1)

    return captured(lambda: run) if mode == "graphs" else run


def _training(model: Any, tokens: int, mode: str) -> Callable[[], object]:
    ids = _ids(model, tokens)
    call = _compiled(model, mode)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> None:
        torch.autograd.grad(call(ids, labels=ids, use_cache=mode != "compile").loss, parameters)

    return captured(lambda: run) if mode == "graphs" else run


def _compiled(model: Any, mode: str) -> Callable[..., Any]:
    if mode != "compile":
        return model
    torch.compiler.reset()
    return torch.compile(model, dynamic=False)


class _Writer:
    """Generates text from one token, the most probable token each time.

    Args:
        model: The model.
        longest: Most tokens that ``write`` is asked for.
        mode: As in ``bench_generation``.
    """

    def __init__(self, model: Any, longest: int, mode: str) -> None:
        self.model, self.mode = model, mode
        self.ids = _ids(model, 1)
        self.first = self.ids.clone()
        self.cache: Any = None
        if mode == "eager":
            self.step: Callable[[], object] = self._step
            return
        import transformers  # noqa: PLC0415 - the model is of transformers, which is an optional dependency

        self.cache = transformers.StaticCache(config=model.config, max_cache_len=longest + 4)
        if mode == "compile":
            torch.compiler.reset()
            self.step = torch.compile(self._step, dynamic=False)
        else:
            self._step()  # what is made at the first call is made outside of the graph
            self._restart()
            self.step = captured(lambda: self._step)

    @torch.no_grad()
    def _step(self) -> None:
        found = self.model(self.ids, past_key_values=self.cache, use_cache=True)
        if self.mode == "eager":
            self.cache = found.past_key_values
        self.ids.copy_(found.logits[:, -1:].argmax(-1))

    def _restart(self) -> None:
        self.ids.copy_(self.first)
        if self.mode == "eager":
            self.cache = None
        else:
            for layer in self.cache.layers:  # what is behind a text's end is masked
                layer.cumulative_length.zero_() if isinstance(layer.cumulative_length, Tensor) else layer.reset()

    def write(self, tokens: int) -> None:
        """Generate so many tokens."""
        self._restart()
        for _ in range(tokens):
            self.step()
