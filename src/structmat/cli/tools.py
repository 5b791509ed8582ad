"""The smaller commands: ``generate``, ``densify``, ``harden`` and ``import-blast``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from structmat import _checks
from structmat.cli import models, options
from structmat.cli.output import Output, fingerprint
from structmat.cli.show import count, say
from structmat.inspect.reports import report as report_on
from structmat.network.surgery import densify_, harden_
from structmat.plan import plan_of


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(help="How the text begins.", metavar="PROMPT")],
    tokens: Annotated[int, typer.Option(help="Tokens to add, at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 for the most probable token each time.")] = 0.8,
    seed: Annotated[int, typer.Option(help="Of the random choices.")] = 0,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Let a language model continue a text."""
    _checks.positive_int(tokens, "--tokens")
    if not temperature >= 0:
        raise ValueError(f"expected --temperature of at least 0, got {temperature}")
    transformers = models.library()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.check_name(model))
    loaded = models.load(model, dtype=dtype, device=device)
    if not loaded.can_generate():
        raise ValueError(f"expected a language model that generates, got a {type(loaded).__name__}")
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(loaded.device)
    bos = tokenizer.bos_token_id
    if bos is not None and inputs["input_ids"][0, :1].tolist() != [bos]:
        inputs = {
            name: torch.nn.functional.pad(tensor, (1, 0), value=bos if name == "input_ids" else 1)
            for name, tensor in inputs.items()
        }
    torch.manual_seed(seed)
    choice: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        choice["temperature"] = temperature
    streamer = transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    loaded.generate(**inputs, **choice, max_new_tokens=tokens, streamer=streamer, pad_token_id=padding)


def densify(
    model: options.Model,
    out: options.Out,
    dtype: options.Dtype = "auto",
    overwrite: options.Overwrite = False,
) -> None:
    """Write a structured model as a plain dense one, which any program loads."""
    record = {"model": model, "dtype": dtype, "model_files": fingerprint(models.check_name(model))}
    output = Output(out, "densify", record, overwrite=overwrite)
    if output.said_finished():
        return
    with output:
        loaded = models.load(model, dtype=dtype, device="cpu")
        layers = len(plan_of(loaded))
        densify_(loaded)
        save(loaded, models.processors(model), output, {"layers": layers})
    say(f"{layers} layers were structured and are dense now")


def harden(
    model: options.Model,
    out: options.Out,
    dtype: options.Dtype = "auto",
    overwrite: options.Overwrite = False,
) -> None:
    """Write a model that has learned its structure (Gaudi-GBLR) with what is inside the segments alone (GBLR)."""
    record = {"model": model, "dtype": dtype, "model_files": fingerprint(models.check_name(model))}
    output = Output(out, "harden", record, overwrite=overwrite)
    if output.said_finished():
        return
    with output:
        loaded = models.load(model, dtype=dtype, device="cpu")
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
    folder: Annotated[Path, typer.Argument(help="Checkpoint of the authors of BLAST.", metavar="FOLDER")],
    out: options.Out,
    overwrite: options.Overwrite = False,
) -> None:
    """Convert a Llama that the authors of BLAST compressed."""
    output = Output(
        out, "import-blast", {"model": str(folder), "model_files": fingerprint(folder)}, overwrite=overwrite
    )
    if output.said_finished():
        return
    models.library()
    from structmat.integrations.transformers.blast_llama import import_blast_checkpoint  # noqa: PLC0415 - imports transformers

    with output:
        loaded = import_blast_checkpoint(folder)
        save(loaded, models.processors(str(folder)), output, {"layers": len(plan_of(loaded))})


def save(model: Any, processors: dict[str, Any], output: Output, facts: dict[str, Any]) -> None:
    """Write a model with its processors, and finish the output.

    Args:
        model: Of transformers.
        processors: As ``models.processors`` finds them.
        output: Entered.
        facts: For the record.
    """
    folder = output.new_folder()
    model.save_pretrained(folder)
    for processor in processors.values():
        processor.save_pretrained(folder)
    output.finish(facts)
