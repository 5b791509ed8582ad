"""``structmat bench``: how fast structured layers and models are, against dense ones in the same run."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from structmat import _checks
from structmat.bench import bench_layers
from structmat.bench.autotune import autotune_
from structmat.bench.timing import MODES
from structmat.cli import models
from structmat.cli.formats import METAVAR, NAMES, options_text, read_blocks, read_format
from structmat.cli.models import DeviceOption, Placement
from structmat.cli.options import Options
from structmat.cli.selection import usual_layers
from structmat.cli.times import show_layers, show_models, write
from structmat.integrations.transformers.generation import GenerationBench, bench_generation
from structmat.integrations.transformers.llamas import SHAPES, random_llama
from structmat.network.surgery import apply_plan_, densify_
from structmat.plan import Rule, make_plan, plan_of

LAYERS, MODELS = "Layers", "Models"

MOST_TOKENS = 32
"""The number of tokens that are generated on a CPU by default; the times of longer texts are extrapolated."""


@dataclass(frozen=True)
class FormatsOptions(Options):
    """Which formats are timed.

    Attributes:
        formats: The formats, with their options.
        keep: The share of the dense parameters, for formats that do not say their own.
        blocks: The block counts, each for every format that has blocks and does not say its own.
    """

    formats: Annotated[
        tuple[str, ...],
        typer.Option(
            "--formats",
            metavar=METAVAR,
            help=f"A format to time, repeated for several: {NAMES}. Some have options ({options_text()}).",
        ),
    ] = ("blast", "low_rank", "monarch")
    keep: Annotated[
        float, typer.Option(help="The share of the dense parameters, for formats without a keep of their own.")
    ] = 0.5
    blocks: Annotated[
        tuple[str, ...],
        typer.Option(
            "--blocks",
            metavar="COUNT",
            help="A block count such as 16 or 8x16 for every format that has blocks, repeated for several counts.",
        ),
    ] = ("16",)

    def rules(self) -> dict[str, Rule]:
        """Complete rules for the formats, by the labels that the table shows."""
        _checks.fraction(self.keep, "--keep")
        found: dict[str, Rule] = {}
        for text in self.formats:
            rule = read_format(text, "--formats")
            keep = self.keep if rule.keep is None else rule.keep
            counts: Sequence[Any] = [rule.blocks]
            if rule.format.takes_blocks and rule.blocks is None:
                counts = [read_blocks(count) for count in self.blocks]
            for count in counts:
                found[label(rule, keep, count)] = Rule(rule.format, keep, count, rule.options)
        return found


@dataclass(frozen=True)
class TimingOptions(Options):
    """How is timed.

    Attributes:
        dtypes: The dtypes; none for the usual one of the device.
        mode: The mode, one of ``MODES``.
        backward: Whether to time the backward pass and the training step.
        autotune: Whether to choose algorithms first.
        rounds: The number of times that each is timed.
        out: The folder for results.
        device: The device.
    """

    dtypes: Annotated[
        tuple[str, ...],
        typer.Option(
            "--dtypes",
            metavar="DTYPE",
            help=f"A dtype, repeated for several, but one alone for models: {', '.join(models.DTYPES[1:])}; by default "
            "float32 on a CPU and bfloat16 on a GPU.",
        ),
    ] = ()
    mode: Annotated[
        str,
        typer.Option(
            help=f"How dense and structured alike run: {', '.join(MODES)}, which are plain PyTorch, CUDA graphs and "
            "torch.compile."
        ),
    ] = "eager"
    backward: Annotated[
        bool, typer.Option("--backward", help="Time the backward pass and the training step too.")
    ] = False
    autotune: Annotated[
        bool, typer.Option("--autotune", help="Choose the fastest algorithms for this machine first.")
    ] = False
    rounds: Annotated[int, typer.Option(help="The number of times that each is timed.")] = 20
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for bench.json and bench.png.")] = Path(
        "structmat-bench"
    )
    device: DeviceOption = "auto"

    def dtypes_on(self, device: torch.device) -> list[torch.dtype]:
        """The dtypes to time on a device."""
        return [dtype_for(name) for name in self.dtypes or ["float32" if device.type == "cpu" else "bfloat16"]]


@dataclass(frozen=True)
class LayerOptions(Options):
    """Which layers are timed, where no model is.

    Attributes:
        shapes: The shapes, ``OUTxIN`` each.
        tokens: The numbers of input vectors.
    """

    shapes: Annotated[
        tuple[str, ...],
        typer.Option(
            "--shapes",
            metavar="OUTxIN",
            help="The out features and in features of a layer, repeated for several layers.",
            rich_help_panel=LAYERS,
        ),
    ] = ("4096x4096",)
    tokens: Annotated[
        tuple[int, ...],
        typer.Option(
            "--tokens",
            metavar="COUNT",
            help="A number of input vectors, repeated for several numbers.",
            rich_help_panel=LAYERS,
        ),
    ] = (1, 16, 128)


@dataclass(frozen=True)
class ModelOptions(Options):
    """Which models are timed, and doing what.

    Attributes:
        shape: The shape of a model with random weights, a key of ``SHAPES``; None for models that are named.
        prefill: The lengths of prompts.
        generate: The lengths of texts.
        most_tokens: The number of tokens after which the time of a text is extrapolated; None for the usual one.
    """

    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            help=f"The shape of a model with random weights, which is timed in place of named models: "
            f"{' or '.join(SHAPES)}.",
            rich_help_panel=MODELS,
        ),
    ] = None
    prefill: Annotated[
        tuple[int, ...],
        typer.Option(
            "--prefill",
            metavar="COUNT",
            help="The number of tokens in a prompt, repeated for several.",
            rich_help_panel=MODELS,
        ),
    ] = (512,)
    generate: Annotated[
        tuple[int, ...],
        typer.Option(
            "--generate",
            metavar="COUNT",
            help="The number of tokens in a text, repeated for several.",
            rich_help_panel=MODELS,
        ),
    ] = (10, 100, 1000)
    most_tokens: Annotated[
        int | None,
        typer.Option(
            help="The number of tokens that are generated at most, beyond which the time of a text is extrapolated; by "
            f"default {MOST_TOKENS} on a CPU.",
            rich_help_panel=MODELS,
        ),
    ] = None


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Models to time, folders or names on the Hugging Face Hub, the first one the reference; one alone is "
            "compared with itself made dense, or compressed with random factors. Layers are timed where neither a "
            "model nor --shape is given.",
        ),
    ],
    formats: FormatsOptions,
    timing: TimingOptions,
    layers: LayerOptions,
    whole: ModelOptions,
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
    return bench_generation(
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


def label(rule: Rule, keep: float, blocks: int | tuple[int, int] | None) -> str:
    """What the table calls a format with its options."""
    pair = (blocks, blocks) if isinstance(blocks, int) else blocks
    counts = [] if pair is None else [f"{pair[0]}x{pair[1]}"]
    others = [f"{name} {value}" for name, value in rule.options.items()]
    return " ".join([rule.format.name, *counts, f"keep {keep:g}", *others])


def dtype_for(name: str) -> torch.dtype:
    """The dtype of this name, which must be a real one."""
    _checks.one_of(name, models.DTYPES[1:], "--dtypes")
    return models.dtype_named(name)


def read_shape(text: str) -> tuple[int, int]:
    """Read ``4096x11008``.

    Args:
        text: The out features and the in features.

    Returns:
        The out features and the in features.

    Raises:
        ValueError: If it does not read.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if found is None:
        raise ValueError(f"expected --shapes such as 4096x11008, out features x in features, got {text!r}")
    return int(found[1]), int(found[2])


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
    found: dict[str, nn.Module] = {"dense": random_llama(shape, dtype=dtype, device=device)}
    return found | {label: random_llama(shape, rule, dtype=dtype, device=device) for label, rule in rules.items()}


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
