"""The first part of the demo: how accurate a network is once it is compressed, retrained, or trained from scratch."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from structmat._progress import progress_bar
from structmat.compress.api import compress_
from structmat.demo.settings import Key, Settings
from structmat.demo.vit import Digits, VisionTransformer, accuracy, digits, train
from structmat.fit import Fit
from structmat.formats import FORMATS
from structmat.inspect.reports import report
from structmat.network.sites import structured_layers
from structmat.network.surgery import apply_plan_, harden_
from structmat.nn import StructuredModule
from structmat.plan import Plan, plan_of
from structmat.training import StructureLearning

DENSE_RATE, RETRAINING_RATE = 2e-3, 1e-3
"""The highest learning rates of training from a random init, and of retraining."""


@dataclass
class Result:
    """What one structure made of one budget, over the seeds.

    Attributes:
        name: The name of the structure, or ``"dense"``.
        keep: The budget that was asked for.
        real_keep: The share of the linear layers' parameters that the structure has.
        parameters: The parameters of the whole network.
        multiplications: The multiplications of its linear layers, per image.
        relative_multiplications: The same relative to the dense network.
        weight_error: The relative Frobenius error over all compressed weights, for each seed.
        before: The test accuracy before retraining, for each seed.
        after: The test accuracy after retraining, for each seed.
        scratch: The test accuracy when trained from a random init, for each seed.
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


@dataclass
class Accuracies:
    """The first part of the demo.

    Attributes:
        dense: The result of the dense network.
        results: The result of each structure and budget.
        layers: The retrained layers of each structure at the budget of the table, by their names in the network.
    """

    dense: Result
    results: dict[Key, Result]
    layers: dict[str, dict[str, StructuredModule]]


def measure_accuracies(settings: Settings, plans: Mapping[Key, Plan]) -> Accuracies:
    """Train, compress and retrain with every plan and seed.

    Args:
        settings: The seeds and epochs.
        plans: The plan of each structure and budget.

    Returns:
        What came out.
    """
    data = digits()
    long, short = settings.epochs
    found = Accuracies(Result("dense", 1.0), {}, {})
    from_scratch = sum(_in_table(settings, keep) for _, keep in plans)
    epochs = settings.seeds * (long + len(plans) * short + from_scratch * long)
    with progress_bar(total=epochs, unit="epoch") as bar:
        for seed in range(settings.seeds):
            bar.set_description("train dense")
            torch.manual_seed(seed)
            dense = VisionTransformer()
            train(dense, data, epochs=long, learning_rate=DENSE_RATE, seed=seed, progress=bar.update)
            found.dense.before.append(accuracy(dense, data))
            if seed == 0:
                _count(found.dense, dense, data)
            for (name, keep), plan in plans.items():
                result = found.results.setdefault((name, keep), Result(name, keep))
                bar.set_description(f"{name} at keep {keep:g}")
                model = _retrained(dense, plan, result, data, settings, seed, bar.update)
                if seed == 0:
                    _count(result, model, data)
                    result.relative_multiplications = result.multiplications / found.dense.multiplications
                if _in_table(settings, keep):
                    found.layers.setdefault(name, structured_layers(model))
                    bar.set_description(f"{name} from scratch")
                    result.scratch.append(_from_scratch(plan, result, data, settings, seed, bar.update))
    return found


def _in_table(settings: Settings, keep: float) -> bool:
    return math.isclose(keep, settings.keep)


def _retrained(
    dense: nn.Module,
    plan: Plan,
    result: Result,
    data: Digits,
    settings: Settings,
    seed: int,
    progress: Callable[[], object],
) -> nn.Module:
    """A copy of the network, compressed and retrained; the result learns how good it is."""
    model = copy.deepcopy(dense)
    result.weight_error.append(_pooled_error(dense, compress_(model, plan, progress=False)))
    result.before.append(accuracy(model, data))
    learning = _learning(result)
    epochs = settings.epochs[1]
    train(model, data, epochs=epochs, learning_rate=RETRAINING_RATE, seed=seed, progress=progress, structure=learning)
    result.after.append(accuracy(_hardened(model), data))
    return model


def _from_scratch(
    plan: Plan, result: Result, data: Digits, settings: Settings, seed: int, progress: Callable[[], object]
) -> float:
    """The accuracy of a network that is structured from the beginning."""
    torch.manual_seed(seed)
    model = apply_plan_(VisionTransformer(), plan)
    learning, epochs = _learning(result), settings.epochs[0]
    train(model, data, epochs=epochs, learning_rate=DENSE_RATE, seed=seed, progress=progress, structure=learning)
    return accuracy(_hardened(model), data)


def _learning(result: Result) -> StructureLearning | None:
    """How the layers of a structure learn where their blocks are, if they do."""
    return StructureLearning(result.keep, shrinkage=0.2, sigma=None) if FORMATS[result.name].learns else None


def _hardened(model: nn.Module) -> nn.Module:
    """The network with what it has learned of its structure made final."""
    if any(format.learns for format in plan_of(model).values()):
        harden_(model)
    return model


def _pooled_error(dense: nn.Module, fits: Mapping[str, Fit]) -> float:
    energies = {name: float(dense.get_submodule(name).get_parameter("weight").detach().square().sum()) for name in fits}
    return math.sqrt(sum(fit.error**2 * energies[name] for name, fit in fits.items()) / sum(energies.values()))


def _count(result: Result, model: nn.Module, data: Digits) -> None:
    """Write down the parameters and multiplications of a network."""
    costs = report(model, example_inputs=data.test_images[:1])
    result.parameters, result.multiplications = costs.parameters, costs.multiplications
    formats = plan_of(model).values()
    if formats:
        result.real_keep = sum(f.num_parameters() for f in formats) / sum(f.M * f.N for f in formats)
