"""``structmat.compress.api``."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from structmat import _checks
from structmat.cli import models, options
from structmat.cli.calibration import CalibrationOptions, calibration_batches, described
from structmat.cli.output import Output, fingerprint
from structmat.cli.plan import weigh
from structmat.cli.selection import PlanOptions, plan_for
from structmat.cli.show import count, say
from structmat.compress.api import compress_
from structmat.compress.refinement import Refinement
from structmat.data.sources import Source
from structmat.fit import Fit, Lee2024Blast, Lee2024Gblr, Method
from structmat.formats import Blast, Format, GaudiGblr
from structmat.inspect.reports import share
from structmat.network.surgery import harden_
from structmat.plan import Plan

CALIBRATION = "Calibration"

METHODS = ("default", "published")


def compress(
    model: options.Model,
    out: options.Out,
    format: options.FormatName = "blast",
    keep: options.Keep = 0.5,
    blocks: options.Blocks = "16",
    layers: options.Layers = None,
    exclude: options.Exclude = None,
    rules: options.Rules = None,
    skip_misfits: options.SkipMisfits = False,
    plan: Annotated[
        Path | None,
        typer.Option(help="A plan from structmat plan, instead of all of these.", rich_help_panel=options.PLAN),
    ] = None,
    method: Annotated[
        str, typer.Option(help="default, or published: the algorithm of the format's paper.")
    ] = "default",
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Data to calibrate on, which makes results far better: a text file such as stories.txt.xz[:1500], a "
            "table, a folder (of images, for a model of images), or a data set on the Hub.",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Documents, rows or images to use, at most.", rich_help_panel=CALIBRATION)
    ] = 512,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens at which documents are cut; 512 or as many as the model takes.", rich_help_panel=CALIBRATION
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.", rich_help_panel=CALIBRATION)] = 8,
    packed: Annotated[
        bool,
        typer.Option("--packed", help="Cut rows from all documents, one after the other.", rich_help_panel=CALIBRATION),
    ] = False,
    split: options.Split = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Tune each block's factors together.", rich_help_panel=CALIBRATION)
    ] = False,
    refine_steps: Annotated[
        int, typer.Option(help="Steps of it, for each block.", rich_help_panel=CALIBRATION)
    ] = Refinement.steps,
    refine_rate: Annotated[
        float, typer.Option(help="Its learning rate.", rich_help_panel=CALIBRATION)
    ] = Refinement.learning_rate,
    learn: Annotated[
        bool,
        typer.Option("--learn", help="Keep gaudi_gblr layers as they learn, for retrain; usually they are hardened."),
    ] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    stream: Annotated[
        bool,
        typer.Option("--stream", help="From file to file, one block at a time: for models larger than the memory."),
    ] = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Replace the layers of a pretrained model by structured ones; interrupted, it goes on when it is run again."""
    started = time.perf_counter()
    wanted = PlanOptions(
        format, keep, blocks, tuple(layers or ()), tuple(exclude or ()), tuple(rules or ()), skip_misfits, plan
    )
    _checks.one_of(method, METHODS, "--method")
    settings = Refinement(refine_steps, refine_rate) if refine else None
    if stream and (dtype, device) != ("auto", "auto"):
        raise ValueError("expected neither --dtype nor --device with --stream, which keeps the files' own and the CPU")
    if settings is not None and calibrate is None:
        raise ValueError("expected --calibrate with --refine, which tunes on data")
    data = None
    if calibrate is not None:
        data = CalibrationOptions(calibrate, samples, length, batch_size, packed, split)
    skeleton = models.skeleton(model)
    made = plan_for(skeleton, wanted)
    gaudi = any(isinstance(format, GaudiGblr) for format in made.values())
    if learn and not gaudi:
        raise ValueError("expected a layer of format gaudi_gblr with --learn, got none")
    if gaudi and stream:
        raise ValueError("expected no gaudi_gblr with --stream: it is hardened in memory; leave --stream out")
    record = {
        "model": model,
        **wanted.record(),
        **({"learn": True} if learn else {}),
        "method": method,
        "calibrate": calibrate,
        **({} if data is None else {"samples": samples, "length": length, "batch_size": batch_size}),
        **({} if data is None else {"packed": packed, "split": split}),
        **({} if settings is None else {"refine": True, "refine_steps": refine_steps, "refine_rate": refine_rate}),
        "dtype": dtype,
        "device": device,
        "stream": stream,
        "model_files": fingerprint(model) or getattr(skeleton.config, "_commit_hash", None),
        "data_files": None if data is None else fingerprint(Source.parse(data.source).name),
    }
    output = Output(out, "compress", record, overwrite=overwrite)
    if output.said_finished():
        return
    before, after = weigh(made)
    say(f"{len(made)} layers of {count(before)} parameters, to keep {count(after)} ({share(after, before)})")
    for name, reason in made.skipped.items():
        say(f"stays dense: {name}: {reason}")
    with output:
        if output.said_finished():  # by a process that has ended since
            return
        processors = models.processors(model)
        batches = None if data is None else calibration_batches(data, processors, skeleton.config)
        if batches is not None:
            say(f"calibrating on {described(batches)}")
        how: dict[str, Any] = {
            "method": method_named(method), "batches": batches, "refine": settings, "cache": output.partial / "fits"
        }  # fmt: skip
        folder = output.new_folder()
        if stream:
            folder.rmdir()
            streaming = importlib.import_module("structmat.integrations.transformers.streaming")
            fits = streaming.compress_checkpoint(models.folder_of(model), folder, made, **how)
            parameters, used = sum(p.numel() for p in skeleton.parameters()) - before + after, "cpu"
        else:
            loaded = models.load(model, dtype=dtype, device=device)
            fits = compress_(loaded, made, **how)
            if gaudi and not learn:
                harden_(loaded)
            loaded.save_pretrained(folder)
            parameters, used = sum(p.numel() for p in loaded.parameters()), str(loaded.device)
        for processor in processors.values():
            processor.save_pretrained(folder)
        facts = results(parameters, made, fits)
        output.finish({**facts, "device": used, "seconds": time.perf_counter() - started})
    say(
        f"mean error of the layers {facts['error']:.4f}; {count(facts['parameters'])} parameters in all, "
        f"{share(facts['parameters'], facts['dense_parameters'])} of the dense model's"
    )


def method_named(name: str) -> Any:
    """What ``compress_`` takes for ``--method``."""
    return published if name == "published" else None


def published(format: Format) -> Method[Any] | None:
    """The algorithm of the format's paper, where that is not the default."""
    if isinstance(format, GaudiGblr):
        return Lee2024Gblr.published()
    return Lee2024Blast.published() if isinstance(format, Blast) else None


def results(parameters: int, made: Plan, fits: Mapping[str, Fit]) -> dict[str, Any]:
    """What came out, for the record.

    Args:
        parameters: Of the compressed model.
        made: The plan.
        fits: By layer.

    Returns:
        JSON-compatible data.
    """
    before, after = weigh(made)
    layers = {
        name: {
            "format": fit.format.to_json(),
            "keep": fit.format.keep,
            "error": fit.error,
            "output_error": fit.output_error,
            "seconds": fit.seconds,
        }
        for name, fit in fits.items()
    }
    return {
        "error": math.sqrt(sum(fit.error**2 for fit in fits.values()) / max(1, len(fits))),
        "keep": after / before if before else 1.0,
        "parameters": parameters,
        "dense_parameters": parameters + before - after,
        "skipped": dict(made.skipped),
        "layers": layers,
    }
