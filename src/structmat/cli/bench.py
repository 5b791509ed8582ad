"""``structmat bench``: how fast structured layers and models are, against dense ones in the same run."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from structmat import _checks
from structmat._files import write_atomically
from structmat.bench import LayerBench, bench_layers
from structmat.bench.autotune import autotune_
from structmat.cli import models, options
from structmat.cli.selection import read_blocks, read_rule, usual_layers
from structmat.cli.show import say, table
from structmat.integrations.transformers.generation import GenerationBench, bench_generation
from structmat.integrations.transformers.llamas import SHAPES, random_llama
from structmat.network.surgery import apply_plan_, densify_
from structmat.plan import Rule, make_plan, plan_of

LAYERS, MODELS = "Layers", "Models"
FORMATS = ("blast", "low_rank", "monarch")
MOST_TOKENS = 32
"""So many are generated on a CPU unless the option says something else; longer texts are extrapolated."""


def bench(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Models to time, folders or names on the Hub, the first one the reference; one alone is compared with "
            "itself made dense, or compressed with random factors. Without a model or --shape, layers are timed.",
        ),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--formats", metavar="FORMAT[:keep=0.3][:blocks=8x16] ...", help="By default blast low_rank monarch."
        ),
    ] = None,
    keep: Annotated[float, typer.Option(help="Share of the dense parameters, where --formats does not say.")] = 0.5,
    blocks: Annotated[
        list[str] | None,
        typer.Option(
            "--blocks",
            metavar="COUNT ...",
            help="Block counts such as 16 or 8x16, each for every format that has blocks; by default 16.",
        ),
    ] = None,
    dtypes: Annotated[
        list[str] | None,
        typer.Option(
            "--dtypes", metavar="DTYPE ...", help="By default float32 on a CPU, bfloat16 on a GPU; one for models."
        ),
    ] = None,
    device: options.Device = "auto",
    mode: Annotated[
        str,
        typer.Option(help="eager, graphs (CUDA graphs) or compile (torch.compile), for dense and structured alike."),
    ] = "eager",
    backward: Annotated[bool, typer.Option("--backward", help="Time the backward and the training step too.")] = False,
    optimize: Annotated[
        bool, typer.Option("--optimize", help="Choose algorithms for this machine first, with autotune_.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="How often each is timed.")] = 20,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for bench.json and bench.png.")] = Path(
        "structmat-bench"
    ),
    shapes: Annotated[
        list[str] | None,
        typer.Option("--shapes", metavar="OUTxIN ...", help="By default 4096x4096.", rich_help_panel=LAYERS),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(
            "--tokens", metavar="COUNT ...", help="Input vectors; by default 1 16 128.", rich_help_panel=LAYERS
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape", help=f"A model with random weights instead: {' or '.join(SHAPES)}.", rich_help_panel=MODELS
        ),
    ] = None,
    prefill: Annotated[
        list[int] | None,
        typer.Option(
            "--prefill", metavar="COUNT ...", help="Lengths of prompts; by default 512.", rich_help_panel=MODELS
        ),
    ] = None,
    generate: Annotated[
        list[int] | None,
        typer.Option(
            "--generate", metavar="COUNT ...", help="Lengths of texts; by default 10 100 1000.", rich_help_panel=MODELS
        ),
    ] = None,
    most_tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Scale the time of so many tokens up for longer texts; by default {MOST_TOKENS} on a CPU.",
            rich_help_panel=MODELS,
        ),
    ] = None,
) -> None:
    """Time structured layers or whole language models against dense ones, once it is checked that they are right.

    Layers are timed as stacks of copies with weights of their own that no cache holds. bench.json has every number.
    """
    place = models.device_named(device)
    rules = rules_for(formats or FORMATS, keep, blocks or ["16"])
    kinds = [dtype_for(name) for name in dtypes or ["float32" if place.type == "cpu" else "bfloat16"]]
    _checks.positive_int(rounds, "--rounds")
    folder_for(out)
    if not names and shape is None:
        found = bench_layers(
            rules,
            shapes=[read_shape(text) for text in shapes or ["4096x4096"]],
            tokens=tokens or (1, 16, 128),
            dtypes=kinds,
            device=place,
            steps=("forward", "backward", "training") if backward else ("forward",),
            rounds=rounds,
            mode=mode,
            choose=choose if optimize else None,
        )
        show_layers(found)
    else:
        prompts = tuple(prefill or (512,))
        compared = models_for(names or [], shape, rules, kinds, place)
        if optimize:
            for model in compared.values():
                if plan_of(model):
                    choose(model, (1, *prompts))
        found = bench_generation(
            compared,
            prefill=prompts,
            generate=tuple(generate or (10, 100, 1000)),
            training=prompts if backward else (),
            most_tokens=most_tokens or (MOST_TOKENS if place.type == "cpu" else None),
            rounds=rounds,
            mode=mode,
        )
        show_models(found)
    write(found, out)


def choose(model: nn.Module, tokens: Sequence[int]) -> None:
    """Set the fastest algorithms, in place, and leave every layer structured."""
    autotune_(model, tokens=tokens, allow_dense=False)


def rules_for(formats: Sequence[str], keep: float, blocks: Sequence[str]) -> dict[str, Rule]:
    """The formats to time, by a label.

    Args:
        formats: ``FORMAT[:keep=0.3][:blocks=8x16]`` each.
        keep: Where a format does not say.
        blocks: Counts, one of which each format with blocks gets that does not say.

    Returns:
        Complete rules.
    """
    _checks.fraction(keep, "--keep")
    found: dict[str, Rule] = {}
    for text in formats:
        _, rule = read_rule(f".*={text}")
        share = keep if rule.keep is None else rule.keep
        counts: Sequence[Any] = [None]
        if rule.format.takes_blocks:
            counts = [read_blocks(count) for count in blocks] if rule.blocks is None else [rule.blocks]
        for count in counts:
            pair = (count, count) if isinstance(count, int) else count
            label = " ".join([rule.format.name, *([] if pair is None else [f"{pair[0]}x{pair[1]}"]), f"keep {share:g}"])
            found[label] = Rule(rule.format, share, count)
    return found


def dtype_for(name: str) -> torch.dtype:
    """The dtype of this name, which must be a real one."""
    _checks.one_of(name, models.DTYPES[1:], "--dtypes")
    return models.dtype_named(name)


def read_shape(text: str) -> tuple[int, int]:
    """Read ``4096x11008``.

    Args:
        text: Out features and in features.

    Returns:
        Both.

    Raises:
        ValueError: If it does not read.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", text.strip())
    if found is None:
        raise ValueError(f"expected --shapes such as 4096x11008, out features x in features, got {text!r}")
    return int(found[1]), int(found[2])


def folder_for(out: Path) -> None:
    """Check that a folder can be written before anything is measured.

    Args:
        out: The folder.

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
        shape: Of a model with random weights instead.
        rules: For a dense model that is alone.
        dtypes: One.
        device: Where to put them.

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
    """The models of these names; one alone with what it is to be compared with.

    Args:
        names: Folders, or names on the Hub.
        rules: For a dense model that is alone.
        dtype: Of the weights.
        device: Where to put them.

    Returns:
        The models by name, the reference first.

    Raises:
        ValueError: If one generates no text.
    """
    kind = str(dtype).removeprefix("torch.")
    found: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        found[name] = models.load(name, dtype=kind, device=str(device))
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


def show_layers(found: LayerBench) -> None:
    """Print times of layers as a table."""
    rows = [
        (
            f"{time.shape[0]} x {time.shape[1]}", time.dtype, time.step, str(time.tokens), time.format, time.algorithm,
            seconds(time.seconds.median), f"{time.seconds.spread:.0%}", f"{time.speedup:.2f}x",
            f"{time.flop_share:.2f}", f"{time.byte_share:.2f}", f"{time.limit_share:.2f}",
            f"{time.dense_limit_share:.2f}",
        )
        for time in found.times
    ]  # fmt: skip
    head = (
        "shape", "dtype", "step", "tokens", "format", "algorithm", "time", "spread", "speed-up", "of peak flops",
        "of peak bytes", "of limit", "dense of limit",
    )  # fmt: skip
    table(head, rows, right=range(6, 13))
    for dtype, peak in found.peaks.items():
        say(f"measured peaks, {dtype}: {peak.flops / 1e9:,.0f} GFLOP/s, {peak.bytes / 1e9:,.1f} GB/s")


def show_models(found: GenerationBench) -> None:
    """Print times of models as a table."""
    rows = [
        (
            time.model, time.step, str(time.tokens), seconds(time.seconds.median), f"{time.seconds.spread:.0%}",
            f"{time.tokens_per_second:,.1f}", f"{time.speedup:.2f}x", "extrapolated" if time.extrapolated else "",
        )
        for time in found.times
    ]  # fmt: skip
    table(("model", "step", "tokens", "time", "spread", "tokens/s", "speed-up", ""), rows, right=(2, 3, 4, 5, 6))
    for name, size in found.sizes.items():
        peak = "" if size.peak_bytes is None else f", peak {size.peak_bytes / 2**30:.2f} GiB"
        say(f"{name}: {size.parameters / 1e6:,.1f} M parameters, {size.bytes / 2**30:.2f} GiB{peak}")
    if any(size.peak_bytes is None for size in found.sizes.values()):
        say("the peak memory is measured on a GPU alone; on a CPU, the weights are what is known")


def seconds(value: float) -> str:
    """A time in a unit that suits it."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def write(found: LayerBench | GenerationBench, folder: Path) -> None:
    """Write everything as JSON, and a picture."""
    text = json.dumps(found.to_dict(), indent=1) + "\n"
    write_atomically(folder / "bench.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    say(f"wrote {folder / 'bench.json'}")
    if importlib.util.find_spec("matplotlib") is None:
        say("no bench.png, which needs matplotlib: pip install 'structmat[plot]'")
        return
    from structmat.bench.plots import layer_speeds, model_speeds  # noqa: PLC0415 - the extra ``plot``

    figure = layer_speeds(found) if isinstance(found, LayerBench) else model_speeds(found)
    write_atomically(folder / "bench.png", lambda temporary: figure.savefig(temporary, format="png"))
    say(f"wrote {folder / 'bench.png'}")
