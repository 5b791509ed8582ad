"""Whole language models: prefill, generation and the training step, dense against compressed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StaticCache

from structmat import _checks
from structmat._progress import progress_bar
from structmat.bench.machine import checked_device
from structmat.bench.models import GenerationBench, ModelSize, ModelTime
from structmat.bench.timing import Timing, captured, time_in_turn
from structmat.bench.verify import FEW_TOKENS, check_format, check_layer, exact_weight
from structmat.formats import Format
from structmat.nn import StructuredLinear

DECODED = 16
"""The number of tokens that are generated in a row to time decoding."""

LONG = 100
"""Texts of more tokens than this are generated three times at most."""


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

    ``prefill`` is one call on a prompt, which fills a cache except in the mode ``"compile"``. Generation starts from
    one token and takes the most probable next one each time; in the modes ``"graphs"`` and ``"compile"`` the cache is
    static and as long as the longest text. Every structured layer is checked against its dense definition first, one of
    each format.

    Args:
        models: The models by name, all on one device and in one dtype; the first is the reference, usually a dense one.
        prefill: The lengths of prompts.
        generate: The lengths of texts to generate.
        training: The lengths of texts for a training step (forward and backward, gradients of all parameters).
        most_tokens: The most tokens to generate; the time of a longer text is scaled up. None for no limit.
        rounds: How often each is timed; texts of more than 100 tokens are generated three times at most.
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
    with progress_bar(total=3 + len(prefill) + len(generate) + len(training), show=progress, leave=False) as bar:
        bar.set_description("checking")
        _check(models, [1, *prefill], bool(training))
        sizes = {name: _size(model, max(prefill, default=1)) for name, model in models.items()}
        bar.update()
        clock = _Clock(models, rounds, mode, device, bar)
        for tokens in prefill:
            clock.time_calls("prefill", tokens, _prefill)
        clock.time_texts(generate, most_tokens)
        for tokens in training:
            clock.time_calls("training", tokens, _training)
    settings = {
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "mode": mode,
        "rounds": rounds,
        "most_tokens": most_tokens,
        "batch": 1,
    }
    return GenerationBench(tuple(clock.times), sizes, settings=settings)


@dataclass(frozen=True)
class _Clock:
    """Times all models in turn at one thing after the other.

    Attributes:
        models: The models by name.
        rounds: How often each is timed.
        mode: The mode, as in ``bench_generation``.
        device: The device of the models.
        bar: The progress bar.
        times: What was measured so far.
    """

    models: Mapping[str, nn.Module]
    rounds: int
    mode: str
    device: torch.device
    bar: Any
    times: list[ModelTime] = field(default_factory=list)

    def time_calls(self, step: str, tokens: int, call: Callable[[nn.Module, int, str], Callable[[], object]]) -> None:
        """Time one call on a text of this length."""
        self.bar.set_description(f"{step} {tokens}")
        runs = {name: call(model, tokens, self.mode) for name, model in self.models.items()}
        self._add(step, tokens, time_in_turn(runs, rounds=self.rounds, device=self.device))

    def time_texts(self, lengths: Sequence[int], most: int | None) -> None:
        """Time decoding, and the generation of texts of these lengths, of which at most ``most`` tokens are made."""
        made = [min(tokens, most or tokens) for tokens in lengths]
        self.bar.set_description("warming up")
        writers = {name: _Writer(model, max([DECODED, *made]), self.mode) for name, model in self.models.items()}
        self.bar.update()
        texts = [("decode", 1, DECODED), *(("generate", n, count) for n, count in zip(lengths, made, strict=True))]
        for step, tokens, count in texts:
            self.bar.set_description(f"{step} {tokens}")
            runs = {name: functools.partial(writer.write, count) for name, writer in writers.items()}
            few = self.rounds if count <= LONG else min(self.rounds, 3)
            found = time_in_turn(runs, rounds=few, warmup=1 if count <= DECODED else 0, device=self.device)
            self._add(step, tokens, found, tokens / count)

    def _add(self, step: str, tokens: int, found: Mapping[str, Timing], scale: float = 1.0) -> None:
        """Write down times, each scaled from what was measured to the number of tokens."""
        scaled = {name: timing.each(1 / scale) if scale != 1 else timing for name, timing in found.items()}
        reference = scaled[next(iter(self.models))]
        extrapolated = step == "generate" and scale != 1
        for name, timing in scaled.items():
            self.times.append(ModelTime(name, step, tokens, timing, reference, extrapolated))
        self.bar.update()


def _common(models: Mapping[str, nn.Module]) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of all models.

    Args:
        models: The models by name.

    Returns:
        The device and the dtype.

    Raises:
        ValueError: If they differ.
    """
    found = {name: (p.device, p.dtype) for name, model in models.items() for p in [next(model.parameters())]}
    if len(set(found.values())) > 1:
        texts = ", ".join(f"{name}: {device}, {dtype}" for name, (device, dtype) in found.items())
        raise ValueError(f"expected models on one device and of one dtype, got {texts}")
    return next(iter(found.values()))


def _check(models: Mapping[str, nn.Module], tokens: Sequence[int], gradients: bool) -> None:
    """Check one structured layer of each format and choice of algorithms, and the gradients of each format."""
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
    """Count the parameters and measure, on a GPU, the memory that a prompt and one more token take."""
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
    """A call that reads a prompt."""
    ids = _ids(model, tokens)
    call = _compiled(model, mode)

    def run() -> None:
        with torch.no_grad():
            call(ids, use_cache=mode != "compile", logits_to_keep=1)

    return captured(lambda: run) if mode == "graphs" else run


def _training(model: Any, tokens: int, mode: str) -> Callable[[], object]:
    """A call that takes the gradients of all parameters."""
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
        longest: The most tokens that ``write`` is asked for.
        mode: The mode, as in ``bench_generation``.
    """

    def __init__(self, model: Any, longest: int, mode: str) -> None:
        self.model, self.mode = model, mode
        self.ids = _ids(model, 1)
        self.first = self.ids.clone()
        self.cache: Any = None
        if mode == "eager":
            self.step: Callable[[], object] = self._step
            return
        self.cache = StaticCache(config=model.config, max_cache_len=longest + 4)
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
            for layer in self.cache.layers:  # entries behind the end of the text are masked
                layer.cumulative_length.zero_() if isinstance(layer.cumulative_length, Tensor) else layer.reset()

    def write(self, tokens: int) -> None:
        """Generate this many tokens."""
        self._restart()
        for _ in range(tokens):
            self.step()
