"""``structmat compress``."""

from __future__ import annotations

import dataclasses
import importlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from structmat import _checks
from structmat._names import alike
from structmat._ranks import current
from structmat.cli import models
from structmat.cli.calibration import CalibrationData, CalibrationOptions, RefinementOptions, read_calibration, told
from structmat.cli.estimates import size_of
from structmat.cli.fingerprints import fingerprint
from structmat.cli.formats import read_blocks, read_format
from structmat.cli.launch import joined
from structmat.cli.models import Placement
from structmat.cli.options import Model, Options, Target, command_line, recorded
from structmat.cli.output import Output, read_record
from structmat.cli.plan import LEAST_SHARED, kept
from structmat.cli.push import PushOptions
from structmat.cli.results import budget_lines, held_in_memory, result_lines, streamed
from structmat.cli.selection import PlanOrFile
from structmat.cli.show import say
from structmat.cli.tracking import TrackingOptions, figures_of, move_runs
from structmat.compress.allocate import Allocation, AllocationSettings, allocate
from structmat.compress.efforts import EFFORTS
from structmat.compress.estimate import Estimate, estimate
from structmat.export.quantize import KINDS
from structmat.fit import Method, default_method
from structmat.formats import Blast, Format
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
        effort: How much is fitted and measured, a key of ``EFFORTS``.
        learn: Whether layers that learn their structure stay so.
        stream: Whether to go from file to file.
        uniform: Whether every layer keeps the same share, also where there is data to share the budget by.
        two_sided: Whether errors are weighed by gradients at the outputs too; None for what the plan
            is made for: where layers share the budget.
        quantize: The kind of integers that weights are stored in; None for floating point.
    """

    method: Annotated[
        str,
        typer.Option(
            help=f"The algorithm: {' or '.join(METHODS)}; published is that of the format's paper, where the default "
            "is another."
        ),
    ] = "default"
    effort: Annotated[
        str,
        typer.Option(
            help=f"How much is fitted and measured: {', '.join(EFFORTS)}; quick has fewer steps and less "
            "data than default, and best has more."
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
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform",
            help="Let every layer keep the same share; with --calibrate layers share the budget by what they "
            "do to the output, unless there is a --plan, a --rule, --learn or --method.",
        ),
    ] = False
    two_sided: Annotated[
        bool | None,
        typer.Option(
            "--two-sided/--one-sided",
            help="Weigh errors by the gradients at the outputs of layers too, or not; the first where layers share the "
            "budget, or in a plan of structmat allocate, without --stream.",
        ),
    ] = None
    quantize: Annotated[
        str | None,
        typer.Option(help="Store the weights of all linear layers in integers, int8 or int4, once they are fitted."),
    ] = None

    def record(self) -> dict[str, Any]:
        """What the fits depend on, as JSON-compatible data."""
        unsaid = {"effort": "default", "learn": False, "uniform": False, "two_sided": None, "quantize": None}
        return {name: value for name, value in super().record().items() if name not in unsaid or value != unsaid[name]}

    def check(self, made: Plan, placement: Placement, *, data: bool) -> bool:
        """Check that the options go with the plan and with each other.

        Args:
            made: The plan.
            placement: The dtype and the device.
            data: Whether there is calibration data.

        Returns:
            Whether layers are to be hardened once they are fitted.

        Raises:
            ValueError: If an option does not go with another one, or with the formats of the plan.
        """
        _checks.one_of(self.method, METHODS, "--method")
        _checks.one_of(self.effort, EFFORTS, "--effort")
        if self.method != "default" and self.effort != "default":
            raise ValueError(f"expected no --effort with --method {self.method}, which has steps of its own")
        if self.two_sided and (self.stream or not data):
            raise ValueError(
                "expected --two-sided with --calibrate and without --stream: it takes gradients of the whole network"
            )
        if self.stream and placement != Placement():
            raise ValueError(
                "expected neither --dtype nor --device with --stream, which keeps the files' own and the CPU"
            )
        if self.quantize is not None:
            _checks.one_of(self.quantize, KINDS, "--quantize")
            if self.stream or self.learn:
                raise ValueError("expected --quantize without --stream and --learn; run structmat quantize afterwards")
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


@dataclass(frozen=True)
class Compression:
    """What a compression is of, and how it is done.

    Attributes:
        model: A folder, or a name on the Hub.
        plan: The options of the plan.
        fit: How the layers are fitted.
        calibration: The calibration data.
        refinement: How blocks are refined.
        placement: The dtype and the device.
        push: Whether the result is uploaded.
        tracking: Where figures are reported to.
    """

    model: str
    plan: PlanOrFile
    fit: FitOptions
    calibration: CalibrationOptions
    refinement: RefinementOptions
    placement: Placement
    push: PushOptions
    tracking: TrackingOptions

    def run(self, target: Target) -> dict[str, Any]:
        """Compress, together with the other processes that a launcher started, or find out that this is done already.

        The result is uploaded then, if that is wanted.

        Args:
            target: Where to write.

        Returns:
            The record of what was done and came out.

        Raises:
            ValueError: If an option does not go with another one.
        """
        with joined():
            return self._run(target)

    def _run(self, target: Target) -> dict[str, Any]:
        started = time.perf_counter()
        if self.refinement.refine and self.calibration.calibrate is None:
            raise ValueError("expected --calibrate with --refine, which tunes on data")
        _checks.one_of(self.fit.method, METHODS, "--method")
        self.push.check()
        self.tracking.check()
        skeleton = models.skeleton(self.model)
        made = self.plan.plan_for(skeleton)
        hardens = self.fit.check(made, self.placement, data=self.calibration.calibrate is not None)
        output = self._output(target, skeleton)
        if not output.said_finished():
            self._say_budget(made, skeleton)
            with output:
                output.check_shared()
                if not output.said_finished():  # by a process that has ended since
                    facts = self._results(made, skeleton, output, hardens)
                    output.finish({**facts, "seconds": time.perf_counter() - started})
                    for line in result_lines(facts):
                        say(line)
        if current().leads:
            self.push.upload(target.out)
        return read_record(target.out) or {}

    def _output(self, target: Target, skeleton: Any) -> Output:
        """The output, with what it depends on."""
        groups = (self.plan, self.fit, self.calibration, self.refinement, self.placement)
        options, spelled = recorded(*groups), command_line("compress", self.model, *groups)
        files = fingerprint(self.model) or getattr(skeleton.config, "_commit_hash", None)
        facts = {"model": self.model, **options, "model_files": files}
        return Output(target.out, "compress", facts, overwrite=target.overwrite, spelled=spelled)

    def _say_budget(self, made: Plan, skeleton: Any) -> None:
        """Tell the user what is kept, and what stays dense."""
        dtype = models.dtype_named(self.placement.dtype)
        for line in budget_lines(made, skeleton, None if dtype == "auto" else dtype):
            say(line)
        for name, members in alike(made.skipped.items()).items():
            say(f"stays dense: {name}: {made.skipped[members[0]]}")

    def _results(self, made: Plan, skeleton: Any, output: Output, hardens: bool) -> dict[str, Any]:
        """Compress and write the model; return what came out."""
        processors = models.processors(self.model)
        data = None
        if self.calibration.calibrate is not None:
            read = self.refinement.parts_of(self.calibration)
            data = told(read, processors, skeleton.config, max(format.N for format in made.values()))
        how: dict[str, Any] = {
            "method": METHODS[self.fit.method] or EFFORTS[self.fit.effort].method,
            "batches": None if data is None else data.batches,
            "refine": self.refinement.settings_for(self.calibration.batch_size),
            "cache": output.partial / "fits",
        }
        folder = output.new_folder()
        tracking = self.tracking if current().leads else TrackingOptions()
        with tracking.tracker(output.partial, skeleton, output.path.name) as tracker:
            facts = self._written(made, skeleton, folder, data, how, hardens)
            if tracker is not None:
                for figures in figures_of(facts):
                    tracker.report(figures)
        if current().leads:
            move_runs(output.partial, folder)
            for processor in processors.values():
                processor.save_pretrained(folder)
        return facts

    def _written(
        self, made: Plan, skeleton: Any, folder: Path, data: CalibrationData | None, how: dict[str, Any], hardens: bool
    ) -> dict[str, Any]:
        """Compress, from file to file or in memory, and write the model without its processors."""
        if self.fit.stream:
            made = made if data is None else self._allocated(made, None, data, how["cache"])
            return streamed(self.model, skeleton, folder, made, how)
        loaded = models.load(self.model, self.placement)
        if current().leads:
            expected = self._expected(made, data, loaded, loaded.device)
            alone = "" if current().size == 1 else "in one process, "
            say(f"compressing takes about {expected} {alone}from the start")
        if data is not None:
            made = self._allocated(made, loaded, data, how["cache"])
            how["two_sided"] = self.fit.two_sided
        how["effort"] = self.fit.effort
        return held_in_memory(loaded, folder, made, how, data, hardens, self.fit.quantize)

    def _shares(self, made: Plan) -> bool:
        """Whether layers share the budget of the plan, where there is data."""
        chosen_otherwise = self.fit.learn or self.fit.method != "default" or self.plan.plan is not None
        return not (self.fit.uniform or chosen_otherwise or self.plan.rules) and kept(made) < 1

    def _allocated(self, made: Plan, model: Any, data: CalibrationData, cache: Path) -> Plan:
        """The plan in which layers share its budget by what they do to the output, where that is wanted."""
        keep = kept(made)
        if not self._shares(made):
            return made
        if keep < LEAST_SHARED:
            say(f"every layer keeps the same share: a budget of {keep:.3f} leaves no choice")
            return made
        chosen = read_format(self.plan.format, "--format")
        structures = [chosen, "low_rank"] if chosen.format is Blast else chosen
        settings = AllocationSettings(keep, structures, read_blocks(self.plan.blocks), effort=self.fit.effort)
        plan = shared_budget(self.model, model, data.batches, settings, [re.escape(name) for name in made], cache)
        dense = sum(not format.replaces for format in plan.values())
        say(f"layers share the budget by their effect on the output: {plan.kept:.3f} kept, {dense} layers stay dense")
        return Plan(dict(plan), made.skipped, plan.two_sided)

    def expected(self) -> Estimate:
        """How long all of it takes from the start, without loading the model."""
        skeleton, read = models.skeleton(self.model), self.refinement.parts_of(self.calibration)
        without = self.calibration.calibrate is None
        data = None if without else read_calibration(read, models.processors(self.model), skeleton.config)
        device = models.device_named(self.placement.device)
        return self._expected(self.plan.plan_for(skeleton), data, skeleton, device)

    def _expected(self, made: Plan, data: CalibrationData | None, model: Any, device: torch.device) -> Estimate:
        """How long a plan takes on a model, which may have no weights."""
        settings = self.refinement.settings_for(self.calibration.batch_size)
        passes = settings.passes(len(data.batches)) if data and settings else 0.0
        return estimate(
            made,
            method=METHODS[self.fit.method],
            data=None if data is None else size_of(data, model, made, device),
            refined=passes,
            shared=self._shares(made) and kept(made) >= LEAST_SHARED,
            effort=self.fit.effort,
            device=device,
        )


def shared_budget(
    name: str, model: Any, batches: list[Any], settings: AllocationSettings, layers: list[str], cache: Path | None
) -> Allocation:
    """Share a budget among the layers of a model, which is in memory or read from its files block by block.

    Args:
        name: The model's folder, or its name on the Hub.
        model: The model; None to read its files.
        batches: The calibration data.
        settings: How the budget is shared.
        layers: Patterns of the layers that share it.
        cache: The folder for finished fits; None for none.

    Returns:
        The plan.
    """
    if model is not None:
        asked = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        return allocate(model, batches, layers=layers, cache=cache, **asked)
    streamed = importlib.import_module("structmat.integrations.transformers.streamed_allocation")
    return streamed.allocate_checkpoint(models.folder_of(name), batches, settings, layers=layers, cache=cache)


def compress(
    model: Model,
    target: Target,
    plan: PlanOrFile,
    fit: FitOptions,
    calibration: CalibrationOptions,
    refinement: RefinementOptions,
    placement: Placement,
    push: PushOptions,
    tracking: TrackingOptions,
) -> None:
    """Run ``structmat compress``."""
    Compression(model, plan, fit, calibration, refinement, placement, push, tracking).run(target)
