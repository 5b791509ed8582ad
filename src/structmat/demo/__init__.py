"""``structmat demo``: one trained network, compressed by every structure."""

from __future__ import annotations

import copy
import json
import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structmat._files import write_atomically
from structmat._progress import progress_bar
from structmat._tables import share, table_text
from structmat._version import __version__
from structmat.bench import time_side_by_side
from structmat.compress.api import compress_
from structmat.fit import Fit
from structmat.formats import FORMATS, Blast, GaudiGblr
from structmat.formats import Format as Format
from structmat.inspect.plots import couplings, structure_maps, trade_off
from structmat.inspect.reports import report
from structmat.network.surgery import apply_plan_, harden_, tile_
from structmat.nn import StructuredModule
from structmat.plan import Plan, Rule, make_plan, plan_of
from structmat.training import StructureLearning

try:
    import matplotlib  # noqa: F401 - drawing comes last, and must not be what fails then

    from structmat.demo.vit import VisionTransformer, accuracy, digits, train
except ImportError as error:
    raise ImportError("the demo needs scikit-learn and matplotlib: pip install 'structmat[demo]'") from error

LAYERS = r"blocks\..*"
BLOCKS = {"monarch": 4, "block_sparse": 8, "blast": 8}
TITLES = {
    "low_rank": "low-rank",
    "block_diagonal": "block-diagonal",
    "monarch": "Monarch",
    "block_sparse": "block-sparse",
    "blast": "BLAST",
    "gaudi_gblr": "Gaudi-GBLR",
}
STRUCTURES = tuple(TITLES)


@dataclass(frozen=True)
class Settings:
    """What a run of the demo does.

    Attributes:
        keep: Share of the parameters of the linear layers, at most, in the table.
        formats: Names of the structures.
        seeds: How many times everything is done, from seed 0.
        out: Folder for pictures and results.
        quick: Fewer epochs and keeps: a look, not a comparison.
    """

    keep: float = 0.3
    formats: tuple[str, ...] = STRUCTURES
    seeds: int = 1
    out: Path = Path("structmat-demo")
    quick: bool = False

    @property
    def epochs(self) -> tuple[int, int]:
        """Of training, and of retraining."""
        return (8, 2) if self.quick else (30, 10)

    @property
    def keeps(self) -> tuple[float, ...]:
        """The budgets of the trade-off curve, in ascending order."""
        return (self.keep,) if self.quick else tuple(sorted({self.keep / 2, self.keep, min(2 * self.keep, 0.9)}))


@dataclass
class Result:
    """What one structure made of one budget, over the seeds.

    Attributes:
        name: Of the structure, or ``"dense"``.
        keep: The budget that was asked for.
        real_keep: The share of the linear layers' parameters that the structure has.
        parameters: Of the whole network.
        multiplications: Of its linear layers, per image.
        relative_multiplications: Those of the dense network being 1.
        weight_error: Relative Frobenius error over all compressed weights, for each seed.
        before: Test accuracy before retraining, for each seed.
        after: Test accuracy after it, for each seed.
        scratch: Test accuracy when trained from a random init, for each seed.
        relative_time: Inference time, that of the dense network being 1; None where it was not measured.
    """

    name: str
    keep: float
    real_keep: float = 1.0
    parameters: int = 0
    multiplications: int = 0
    relative_multiplications: float = 1.0
    weight_error: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    scratch: list[float] = field(default_factory=list)
    relative_time: float | None = None


def run_demo(settings: Settings) -> dict[str, Any]:
    """Train, compress, retrain, and show what came out.

    Everything that is printed also goes to ``results.json`` in the folder, beside ``trade_off.png``, ``couplings.png``
    (of BLAST) and ``structure.png`` (of Gaudi-GBLR). It runs on one thread, so that a seed gives the same accuracies on
    any number of cores.

    Args:
        settings: What to do.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: If no structure fits the budget.
    """
    plans, refused = _plans(settings)
    if not plans:
        raise ValueError("no structure fits the budget: " + "; ".join(f"{n}: {why}" for (n, _), why in refused.items()))
    settings.out.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    try:
        results, shown_layers = _measure(settings, plans)
    finally:
        torch.set_num_threads(threads)
    shown = [r for r in results if r.keep in (settings.keep, 1.0)]
    print(_table(shown))
    for (name, keep), reason in refused.items():
        print(f"{name} does not fit keep {keep:g}: {reason}")
    content = {
        "structmat": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {platform.system()}, one thread",
        "settings": {**asdict(settings), "out": None},
        "seconds": time.perf_counter() - started,
        "results": [asdict(result) for result in results],
        "refused": [{"format": n, "keep": k, "reason": why} for (n, k), why in refused.items()],
    }
    text = json.dumps(content, indent=1)
    write_atomically(settings.out / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
    _draw(settings, results, shown_layers)
    print(f"\nresults.json and the pictures are in {settings.out}/, after {content['seconds']:.0f} seconds")
    return content


def _plans(settings: Settings) -> tuple[dict[tuple[str, float], Plan], dict[tuple[str, float], str]]:
    """The plan for each structure and budget, and why there is none where a structure does not fit."""
    model = VisionTransformer()
    plans: dict[tuple[str, float], Plan] = {}
    refused: dict[tuple[str, float], str] = {}
    for keep in settings.keeps:
        for name in settings.formats:
            try:
                plans[name, keep] = make_plan(model, {LAYERS: Rule(FORMATS[name], blocks=BLOCKS.get(name))}, keep=keep)
            except ValueError as error:
                refused[name, keep] = str(error)
    return plans, refused


def _learning(name: str, keep: float) -> StructureLearning | None:
    """How a structure's layers learn theirs, if they do."""
    return StructureLearning(keep, shrinkage=0.2, sigma=None) if name == "gaudi_gblr" else None


def _hardened(model: nn.Module) -> nn.Module:
    """The network with what it has learned of its structure made final."""
    if any(isinstance(format, GaudiGblr) for format in plan_of(model).values()):
        harden_(model)
    return model


def _measure(
    settings: Settings, plans: Mapping[tuple[str, float], Plan]
) -> tuple[list[Result], dict[str, dict[str, StructuredModule]]]:
    data = digits()
    long, short = settings.epochs
    images = data.test_images
    dense_result = Result("dense", 1.0)
    results: dict[tuple[str, float], Result] = {}
    to_time: dict[str, nn.Module] = {}
    shown_layers: dict[str, dict[str, StructuredModule]] = {}
    from_scratch = sum(math.isclose(keep, settings.keep) for _, keep in plans)
    epochs = settings.seeds * (long + len(plans) * short + from_scratch * long)

    with progress_bar(total=epochs, unit="epoch") as bar:
        for seed in range(settings.seeds):
            bar.set_description("train dense")
            torch.manual_seed(seed)
            dense = VisionTransformer()
            train(dense, data, epochs=long, learning_rate=2e-3, seed=seed, progress=bar.update)
            dense_result.before.append(accuracy(dense, data))
            if seed == 0:
                costs = report(dense, example_inputs=images[:1])
                dense_result.parameters, dense_result.multiplications = costs.parameters, costs.multiplications
                to_time["dense"] = dense
            for (name, keep), plan in plans.items():
                bar.set_description(f"{name} at keep {keep:g}")
                at_table = math.isclose(keep, settings.keep)
                result = results.setdefault((name, keep), Result(name, keep))
                model = copy.deepcopy(dense)
                fits = compress_(model, plan, progress=False)
                result.weight_error.append(_pooled_error(dense, fits))
                result.before.append(accuracy(model, data))
                learning = _learning(name, keep)
                train(model, data, epochs=short, learning_rate=1e-3, seed=seed, progress=bar.update, structure=learning)
                _hardened(model)
                result.after.append(accuracy(model, data))
                if seed == 0:
                    _count(result, model, dense_result, images)
                if at_table:
                    if seed == 0:
                        to_time[name] = _tiled(model) if learning else model
                        shown_layers[name] = {n: m for n, m in model.named_modules() if isinstance(m, StructuredModule)}
                    bar.set_description(f"{name} from scratch")
                    torch.manual_seed(seed)
                    fresh = apply_plan_(VisionTransformer(), plan)
                    train(
                        fresh, data, epochs=long, learning_rate=2e-3, seed=seed, progress=bar.update, structure=learning
                    )
                    result.scratch.append(accuracy(_hardened(fresh), data))

    _time(to_time, images, [dense_result, *results.values()], settings.keep)
    return [dense_result, *results.values()], shown_layers


def _tiled(model: nn.Module) -> nn.Module:
    """A copy with hardened layers in tiles, as they run fastest."""
    tiled = copy.deepcopy(model)
    tile_(tiled)
    return tiled


def _pooled_error(dense: nn.Module, fits: Mapping[str, Fit]) -> float:
    energies = {name: float(dense.get_submodule(name).get_parameter("weight").detach().square().sum()) for name in fits}
    return math.sqrt(sum(fit.error**2 * energies[name] for name, fit in fits.items()) / sum(energies.values()))


def _count(result: Result, model: nn.Module, dense: Result, images: torch.Tensor) -> None:
    plan = plan_of(model)
    costs = report(model, example_inputs=images[:1])
    result.real_keep = sum(f.num_parameters() for f in plan.values()) / sum(f.M * f.N for f in plan.values())
    result.parameters = costs.parameters
    result.multiplications = costs.multiplications
    result.relative_multiplications = costs.multiplications / dense.multiplications


@torch.no_grad()
def _time(models: Mapping[str, nn.Module], images: torch.Tensor, results: Sequence[Result], keep: float) -> None:
    times = time_side_by_side({name: (lambda m=model: m(images)) for name, model in models.items()})
    for result in results:
        if result.keep in (keep, 1.0):
            result.relative_time = times[result.name] / times["dense"]


def _draw(
    settings: Settings, results: Sequence[Result], shown_layers: Mapping[str, Mapping[str, StructuredModule]]
) -> None:
    dense = results[0]
    curves: dict[str, list[tuple[float, float]]] = {}
    for result in results[1:]:
        point = (result.relative_multiplications, statistics.mean(result.after))
        curves.setdefault(TITLES[result.name], []).append(point)
    title = f"ViT on digits, compressed and retrained for {settings.epochs[1]} epochs"
    figure = trade_off(curves, reference=(1.0, statistics.mean(dense.before)), title=title)
    write_atomically(settings.out / "trade_off.png", lambda path: figure.savefig(path, format="png"))
    blast = shown_layers.get("blast", {}).get("blocks.0.qkv")
    if blast is not None and isinstance(blast.format, Blast):
        I, J = blast.format.blocks
        picture = couplings(blast, title=f"blocks.0.qkv as BLAST, {I} x {J} blocks, rank {blast.format.rank}")
        write_atomically(settings.out / "couplings.png", lambda path: picture.savefig(path, format="png"))
    if "gaudi_gblr" in shown_layers:
        title = "components over each matrix, Gaudi-GBLR after retraining"
        maps = structure_maps(shown_layers["gaudi_gblr"], title=title)
        write_atomically(settings.out / "structure.png", lambda path: maps.savefig(path, format="png"))


def _table(results: Sequence[Result]) -> str:
    head = (
        "structure", "keep", "parameters", "mult./image", "of dense", "weight error",
        "acc. compressed", "retrained", "from scratch", "time / dense",
    )  # fmt: skip
    lines: list[tuple[str, ...]] = []
    for r in results:
        dense = r.name == "dense"
        lines.append(
            (
                TITLES.get(r.name, r.name), f"{r.real_keep:.3f}", f"{r.parameters:,}", f"{r.multiplications:,}",
                share(r.relative_multiplications, 1), "" if dense else _spread(r.weight_error, "{:.3f}"),
                "" if dense else _spread(r.before), "" if dense else _spread(r.after),
                _spread(r.before if dense else r.scratch), f"{r.relative_time:.2f}",
            )
        )  # fmt: skip
    return table_text(head, lines, right=tuple(range(1, 10)))


def _spread(values: Sequence[float], form: str = "{:.1%}") -> str:
    """The mean, and over several seeds the standard deviation."""
    text = form.format(statistics.mean(values))
    return text if len(values) == 1 else f"{text} ± {form.format(statistics.stdev(values))}"
