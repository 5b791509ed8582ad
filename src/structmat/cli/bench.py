"""``structmat bench``: how fast structured layers and models are, against dense ones in the same run."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from structmat import _checks
from structmat.bench import bench_layers
from structmat.bench.autotune import autotune_
from structmat.bench.models import SHAPES, GenerationBench
from structmat.cli import models
from structmat.cli.models import Placement
from structmat.cli.selection import usual_layers
from structmat.cli.times import show_layers, show_models, write
from structmat.cli.timing import MOST_TOKENS, FormatsOptions, LayerOptions, ModelOptions, TimingOptions, read_shape
from structmat.network.surgery import apply_plan_, densify_
from structmat.plan import Rule, make_plan, plan_of


def bench(
    formats: FormatsOptions,
    timing: TimingOptions,
    layers: LayerOptions,
    whole: ModelOptions,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL...",
            help="Models to time, folders or names on the Hugging Face Hub, the first one the reference; one alone is "
            "compared with itself made dense, or compressed with random factors. Layers are timed where neither a "
            "model nor --shape is given.",
        ),
    ] = None,
) -> None:
    """Run ``structmat bench``.

    Layers are timed as stacks of copies with weights of their own that no cache holds.
    """
    device = models.device_named(timing.device)
    rules, dtypes = formats.rules(), timing.dtypes_on(device)
    _checks.positive_int(timing.rounds, "--rounds")
    check_folder(timing.out)
    if names or whole.shape is not None:
        found = time_models(models_for(names or [], whole.shape, rules, dtypes, device), timing, whole, device)
        show_models(found)
    else:
        found = bench_layers(
            rules,
            shapes=[read_shape(text) for text in layers.shapes],
            tokens=layers.tokens,
            dtypes=dtypes,
            device=device,
            steps=("forward", "backward", "training") if timing.backward else ("forward",),
            rounds=timing.rounds,
            mode=timing.mode,
            choose=choose if timing.autotune else None,
        )
        show_layers(found)
    write(found, timing.out)


def time_models(
    compared: Mapping[str, nn.Module], timing: TimingOptions, whole: ModelOptions, device: torch.device
) -> GenerationBench:
    """Time language models.

    Args:
        compared: The models by name, the reference first.
        timing: How is timed.
        whole: What the models do.
        device: Where the models are.

    Returns:
        The times.
    """
    if timing.autotune:
        for model in compared.values():
            if plan_of(model):
                choose(model, (1, *whole.prefill))
    integration = importlib.import_module("structmat.integrations.transformers")
    return integration.bench_generation(
        compared,
        prefill=whole.prefill,
        generate=whole.generate,
        training=whole.prefill if timing.backward else (),
        most_tokens=whole.most_tokens or (MOST_TOKENS if device.type == "cpu" else None),
        rounds=timing.rounds,
        mode=timing.mode,
    )


def choose(model: nn.Module, tokens: Sequence[int]) -> None:
    """Set the fastest algorithms, in place, and leave every layer structured."""
    autotune_(model, tokens=tokens, allow_dense=False)


def check_folder(out: Path) -> None:
    """Check that a folder can be written before anything is measured.

    Args:
        out: The folder for results.

    Raises:
        FileExistsError: If there is a file of that name.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"expected --out to be a folder, but {str(out)!r} is a file")


def models_for(
    names: Sequence[str],
    shape: str | None,
    rules: Mapping[str, Rule],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> dict[str, nn.Module]:
    """The models to time.

    Args:
        names: Folders, or names on the Hub.
        shape: The shape of a model with random weights instead; None for named models.
        rules: What becomes of a dense model that is alone.
        dtypes: The dtype of the weights, one alone.
        device: Where to put the models.

    Returns:
        The models by name, the reference first.

    Raises:
        ValueError: If there are both names and a shape, or several dtypes.
    """
    if len(dtypes) > 1:
        raise ValueError(f"expected one of --dtypes for models, got {len(dtypes)}")
    if shape is None:
        return named_models(names, rules, dtypes[0], device)
    if names:
        raise ValueError(f"expected models or --shape, got {' '.join(names)} and --shape {shape}")
    return random_models(shape, rules, dtypes[0], device)


def random_models(
    shape: str, rules: Mapping[str, Rule], dtype: torch.dtype, device: torch.device
) -> dict[str, nn.Module]:
    """A Llama with random weights, dense and in every format."""
    _checks.one_of(shape, SHAPES, "--shape")
    models.library()
    make = importlib.import_module("structmat.integrations.transformers").random_llama
    found: dict[str, nn.Module] = {"dense": make(shape, dtype=dtype, device=device)}
    return found | {label: make(shape, rule, dtype=dtype, device=device) for label, rule in rules.items()}


def named_models(
    names: Sequence[str], rules: Mapping[str, Rule], dtype: torch.dtype, device: torch.device
) -> dict[str, nn.Module]:
    """Load the models of these names; one alone comes with what it is to be compared with.

    Args:
        names: Folders, or names on the Hub.
        rules: What becomes of a dense model that is alone.
        dtype: The dtype of the weights.
        device: Where to put the models.

    Returns:
        The models by name, the reference first.

    Raises:
        ValueError: If one generates no text.
    """
    placement = Placement(str(dtype).removeprefix("torch."), str(device))
    found: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        found[name] = models.load(name, placement)
        if not found[name].can_generate():
            raise ValueError(f"expected a language model that generates, got a {type(found[name]).__name__}")
    if len(found) > 1:
        return found
    (name, model), *_ = found.items()
    if plan_of(model):
        return {"dense": densify_(copy.deepcopy(model)), name: model}
    layers = "|".join(re.escape(layer) for layer in usual_layers(model))
    for label, rule in rules.items():
        small = copy.deepcopy(model)
        found[label] = apply_plan_(small, make_plan(small, {layers: rule}))
    return found
