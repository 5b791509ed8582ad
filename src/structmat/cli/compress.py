"""``structmat compress``."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from structmat import _checks
from structmat._names import alike
from structmat.cli import models
from structmat.cli.calibration import CalibrationOptions, RefinementOptions, told
from structmat.cli.models import Placement
from structmat.cli.options import Model, Options, Target, recorded
from structmat.cli.output import Output, fingerprint
from structmat.cli.plan import weigh
from structmat.cli.results import budget_lines, held_out_of, measured_after, measured_before, result_lines, results
from structmat.cli.selection import PlanOrFile
from structmat.cli.show import say
from structmat.compress.api import compress_
from structmat.compress.estimate import estimate
from structmat.compress.states import count_tokens
from structmat.fit import Fit, Method, default_method
from structmat.formats import Format
from structmat.network.surgery import harden_
from structmat.plan import Plan


def published(format: Format) -> Method[Any]:
    """The algorithm of the format's paper."""
    return default_method(format).published()


METHODS = {"default": None, "published": published}
"""What ``compress_`` takes as its method, by the name on the command line."""


@dataclass(frozen=True)
class FitOptions(Options):
    """How the layers are fitted.

    Attributes:
        method: The algorithm, a key of ``METHODS``.
        learn: Whether layers that learn their structure stay so.
        stream: Whether to go from file to file.
    """

    method: Annotated[
        str,
        typer.Option(
            help=f"The algorithm: {' or '.join(METHODS)}; published is that of the format's paper, where the default "
            "is another."
        ),
    ] = "default"
    learn: Annotated[
        bool,
        typer.Option(
            "--learn", help="Leave gaudi_gblr layers as they learn, for retrain; by default they are hardened."
        ),
    ] = False
    stream: Annotated[
        bool,
        typer.Option(
            "--stream", help="Compress from file to file, one block at a time: for models larger than the memory."
        ),
    ] = False

    def record(self) -> dict[str, Any]:
        """What the fits depend on, as JSON-compatible data."""
        return {name: value for name, value in super().record().items() if name != "learn" or value}

    def check(self, made: Plan, placement: Placement) -> bool:
        """Check that the options go with the plan and with each other.

        Args:
            made: The plan.
            placement: The dtype and the device.

        Returns:
            Whether layers are to be hardened once they are fitted.

        Raises:
            ValueError: If an option does not go with another one, or with the formats of the plan.
        """
        _checks.one_of(self.method, METHODS, "--method")
        if self.stream and placement != Placement():
            raise ValueError(
                "expected neither --dtype nor --device with --stream, which keeps the files' own and the CPU"
            )
        learning = sorted({format.name for format in made.values() if format.learns})
        if self.learn and not learning:
            raise ValueError(
                "expected a layer of a format that learns with --learn, got none; pass --format gaudi_gblr"
            )
        if learning and self.stream:
            raise ValueError(
                f"expected no {' or '.join(learning)} with --stream: it is hardened in memory; leave --stream out"
            )
        return bool(learning) and not self.learn


def compress(
    model: Model,
    target: Target,
    plan: PlanOrFile,
    fit: FitOptions,
    calibration: CalibrationOptions,
    refinement: RefinementOptions,
    placement: Placement,
) -> None:
    """Run ``structmat compress``."""
    started = time.perf_counter()
    if refinement.refine and calibration.calibrate is None:
        raise ValueError("expected --calibrate with --refine, which tunes on data")
    _checks.one_of(fit.method, METHODS, "--method")
    skeleton = models.skeleton(model)
    made = plan.plan_for(skeleton)
    hardens = fit.check(made, placement)
    options = recorded(plan, fit, calibration, refinement, placement)
    files = fingerprint(model) or getattr(skeleton.config, "_commit_hash", None)
    output = Output(
        target.out, "compress", {"model": model, **options, "model_files": files}, overwrite=target.overwrite
    )
    if output.said_finished():
        return
    dtype = models.dtype_named(placement.dtype)
    for line in budget_lines(made, skeleton, None if dtype == "auto" else dtype):
        say(line)
    for name, members in alike(made.skipped.items()).items():
        say(f"stays dense: {name}: {made.skipped[members[0]]}")
    with output:
        if output.said_finished():  # by a process that has ended since
            return
        processors = models.processors(model)
        data = None
        if calibration.calibrate is not None:
            data = told(calibration, processors, skeleton.config, max(format.N for format in made.values()))
        how: dict[str, Any] = {
            "method": METHODS[fit.method],
            "batches": None if data is None else data.batches,
            "refine": refinement.settings,
            "cache": output.partial / "fits",
        }
        measured: dict[str, Any] = {}
        folder = output.new_folder()
        if fit.stream:
            fits = stream(model, folder, made, how)
            before, after = weigh(made)
            parameters, device = sum(p.numel() for p in skeleton.parameters()) - before + after, "cpu"
        else:
            loaded = models.load(model, placement)
            held_out = None if data is None else held_out_of(data, loaded)
            measured = measured_before(held_out, loaded)
            tokens = 0 if data is None else sum(count_tokens(batch) for batch in data.batches)
            passes = 3 * refinement.refine_steps / len(data.batches) if data is not None and refinement.refine else 0.0
            expected = estimate(made, method=how["method"], tokens=tokens, refined=passes, device=loaded.device)
            say(f"compressing takes about {expected} from the start")
            fits = compress_(loaded, made, **how)
            if hardens:
                harden_(loaded)
            measured |= measured_after(held_out, loaded)
            loaded.save_pretrained(folder)
            parameters, device = sum(p.numel() for p in loaded.parameters()), str(loaded.device)
        for processor in processors.values():
            processor.save_pretrained(folder)
        facts = results(parameters, made, fits)
        output.finish({**facts, **measured, "device": device, "seconds": time.perf_counter() - started})
    for line in result_lines(facts, measured):
        say(line)


def batches_of(
    calibration: CalibrationOptions, processors: dict[str, Any], config: Any, inputs: int = 0
) -> list[dict[str, Any]] | None:
    """The calibration data, of which the user is told; None where there is to be none."""
    return None if calibration.calibrate is None else told(calibration, processors, config, inputs).batches


def stream(model: str, folder: Path, made: Plan, how: Mapping[str, Any]) -> dict[str, Fit]:
    """Compress a checkpoint from file to file.

    Args:
        model: A folder, or a name on the Hub.
        folder: The folder to write.
        made: The plan.
        how: The further arguments of ``compress_checkpoint``.

    Returns:
        The fits by layer.
    """
    folder.rmdir()
    streaming = importlib.import_module("structmat.integrations.transformers.streaming")
    return streaming.compress_checkpoint(models.folder_of(model), folder, made, **how)
