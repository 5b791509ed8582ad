"""The smaller commands: ``generate``, ``densify``, ``harden`` and ``import-blast``."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from structmat import _checks
from structmat.cli import models
from structmat.cli.calibration import CalibrationOptions, batches_of
from structmat.cli.fingerprints import fingerprint
from structmat.cli.models import DtypeOption, Placement
from structmat.cli.options import Model, Options, Target, command_line, recorded
from structmat.cli.output import Output
from structmat.cli.show import count, say
from structmat.data.chats import chat_text
from structmat.data.tokens import encode, pad
from structmat.export.quantize import KINDS, quantize_
from structmat.inspect.reports import report as report_on
from structmat.network.surgery import densify_, harden_
from structmat.plan import plan_of


@dataclass(frozen=True)
class Sampling(Options):
    """How a text is continued.

    Attributes:
        tokens: The largest number of tokens to add.
        temperature: The temperature of the random choices; 0 for none.
        seed: The seed of the random choices.
        chat: Whether the prompt is a message that the model answers.
    """

    tokens: Annotated[int, typer.Option(help="The largest number of tokens to add.")] = 100
    temperature: Annotated[
        float, typer.Option(help="The temperature of the random choices; 0 takes the most probable token each time.")
    ] = 0.8
    seed: Annotated[int, typer.Option(help="The seed of the random choices.")] = 0
    chat: Annotated[
        bool, typer.Option("--chat", help="Let the model answer PROMPT as a message, with its chat template.")
    ] = False

    def __post_init__(self) -> None:
        _checks.positive_int(self.tokens, "--tokens")
        if not self.temperature >= 0:
            raise ValueError(f"expected --temperature of at least 0, got {self.temperature}")


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The beginning of the text.", metavar="PROMPT")],
    sampling: Sampling,
    placement: Placement,
) -> None:
    """Run ``structmat generate``."""
    tokens, temperature = sampling.tokens, sampling.temperature
    transformers = models.library()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.check_name(model))
    loaded = models.load(model, placement)
    if not loaded.can_generate():
        raise ValueError(f"expected a language model that generates, got a {type(loaded).__name__}")
    if sampling.chat and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"expected a model with a chat template for --chat, got {model!r}; leave --chat out")
    text = chat_text([{"role": "user", "content": prompt}], tokenizer, answering=True) if sampling.chat else prompt
    inputs = {name: tensor.to(loaded.device) for name, tensor in pad([encode(tokenizer, text)], 0).items()}
    torch.manual_seed(sampling.seed)
    choice: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        choice["temperature"] = temperature
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=sampling.chat, skip_special_tokens=True)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    loaded.generate(**inputs, **choice, max_new_tokens=tokens, streamer=streamer, pad_token_id=padding)


@dataclass(frozen=True)
class Weights(Options):
    """How the weights of a model are written.

    Attributes:
        dtype: The dtype of the weights.
    """

    dtype: DtypeOption = "auto"

    @property
    def placement(self) -> Placement:
        """Where the model is while it is changed: on the CPU."""
        return Placement(self.dtype, "cpu")


def densify(model: Model, target: Target, weights: Weights) -> None:
    """Run ``structmat densify``."""
    record = {"model": model, **recorded(weights), "model_files": fingerprint(models.check_name(model))}
    spelled = command_line("densify", model, weights)
    output = Output(target.out, "densify", record, overwrite=target.overwrite, spelled=spelled)
    if output.said_finished():
        return
    with output:
        loaded = models.load(model, weights.placement)
        layers = len(plan_of(loaded))
        densify_(loaded)
        save(loaded, models.processors(model), output, {"layers": layers})
    say(f"{layers} layers were structured and are dense now")


@dataclass(frozen=True)
class Integers(Options):
    """The kind of integers.

    Attributes:
        to: ``"int8"`` or ``"int4"``.
    """

    to: Annotated[str, typer.Option(help="The integers: int8 with a scale for each row, or int4 for 32 entries.")] = (
        "int8"
    )

    def __post_init__(self) -> None:
        _checks.one_of(self.to, KINDS, "--to")


def quantize(
    model: Model, target: Target, integers: Integers, calibration: CalibrationOptions, weights: Weights
) -> None:
    """Run ``structmat quantize``."""
    record = {"model": model, **recorded(weights), **recorded(integers)}
    if calibration.calibrate is not None:
        record |= recorded(calibration)
    record["model_files"] = fingerprint(models.check_name(model))
    spelled = command_line("quantize", model, integers, calibration, weights)
    output = Output(target.out, "quantize", record, overwrite=target.overwrite, spelled=spelled)
    if output.said_finished():
        return
    with output:
        loaded, processors = models.load(model, weights.placement), models.processors(model)
        errors = quantize_(loaded, integers.to, batches=batches_of(calibration, processors, loaded.config))
        save(loaded, processors, output, {"layers": errors})
    say(f"{len(errors)} layers are in {integers.to} now; their matrices changed by {max(errors.values()):.1e} at most")


def harden(model: Model, target: Target, weights: Weights) -> None:
    """Run ``structmat harden``."""
    record = {"model": model, **recorded(weights), "model_files": fingerprint(models.check_name(model))}
    spelled = command_line("harden", model, weights)
    output = Output(target.out, "harden", record, overwrite=target.overwrite, spelled=spelled)
    if output.said_finished():
        return
    with output:
        loaded = models.load(model, weights.placement)
        stored = sum(parameter.numel() for parameter in loaded.parameters())
        gaps = harden_(loaded)
        after = report_on(loaded)
        facts = {"layers": gaps, "parameters": after.parameters, "dense_parameters": after.dense_parameters}
        save(loaded, models.processors(model), output, facts)
    say(
        f"{len(gaps)} layers hardened, the matrices changed by {max(gaps.values()):.1e} at most; "
        f"{count(after.parameters)} parameters in all where {count(stored)} were stored"
    )


def import_blast(
    folder: Annotated[
        Path, typer.Argument(help="The folder with the checkpoint of the authors of BLAST.", metavar="FOLDER")
    ],
    target: Target,
) -> None:
    """Run ``structmat import-blast``."""
    record = {"model": str(folder), "model_files": fingerprint(folder)}
    spelled = command_line("import-blast", folder)
    output = Output(target.out, "import-blast", record, overwrite=target.overwrite, spelled=spelled)
    if output.said_finished():
        return
    models.library()
    blast_llama = importlib.import_module("structmat.integrations.transformers.blast_llama")
    with output:
        loaded = blast_llama.import_blast_checkpoint(folder)
        save(loaded, models.processors(str(folder)), output, {"layers": len(plan_of(loaded))})


def save(model: Any, processors: dict[str, Any], output: Output, facts: dict[str, Any]) -> None:
    """Write a model with its processors, and finish the output.

    Args:
        model: A model of transformers.
        processors: The model's tokenizer and image processor, as ``models.processors`` finds them.
        output: The output, which is entered.
        facts: What came out, for the record.
    """
    folder = output.new_folder()
    model.save_pretrained(folder)
    for processor in processors.values():
        processor.save_pretrained(folder)
    output.finish(facts)
