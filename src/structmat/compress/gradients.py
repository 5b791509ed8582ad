"""The second moments of the loss' gradients at the outputs of layers: what an error there does to the network's output.

With the moment ``C`` of a layer's inputs and that of its gradients, ``G``, an error ``E`` of its weight changes the
loss by about ``tr(G E C E^T) / 2`` for each token (K-FAC, Martens & Grosse 2015, arXiv 1503.05671, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from structmat._progress import progress_bar
from structmat._ranks import Sums, current
from structmat.compress.effects import NAMES, Effect, OutputEffect
from structmat.compress.efforts import EFFORTS
from structmat.compress.states import count_tokens
from structmat.compress.store import FitStore
from structmat.network.calls import call, device_of, evaluating, moved, same_draws, undisturbed
from structmat.network.capture import capturing_gradients
from structmat.network.masks import find_masks
from structmat.network.sites import Site

CLIP = (0.1, 10.0)
"""The least and the largest norm of a token's gradient, relative to the mean; a few tokens would decide it all."""

RIDGE = 0.1
"""The share of the mean diagonal that is added to a moment, since few tokens say little of most directions."""


@dataclass(frozen=True)
class Gradients:
    """The gradients at the outputs of layers.

    Attributes:
        moments: ``G (M, M)`` of each layer by name, float32, with a ridge.
        vectors: How many vectors each layer makes for each vector of the network's output, by name.
        effect: What is measured at the output, for people.
    """

    moments: Mapping[str, Tensor]
    vectors: Mapping[str, float]
    effect: str = ""


def gradient_moments(
    model: nn.Module,
    batches: Sequence[Any],
    sites: Mapping[str, Site],
    *,
    effect: Effect = "auto",
    vectors: int = EFFORTS["default"].gradients,
    store: FitStore | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Gradients:
    """Gather the gradients of what an allocation measures, at the outputs of layers.

    For logits the loss is the cross-entropy with labels that are drawn from the network itself, whose gradients have
    the curvature of the Kullback-Leibler divergence as their second moment (the true Fisher information); for other
    outputs it is their product with random numbers, whose gradients have that of the relative squared error.

    Args:
        model: The dense network, all of it in memory.
        batches: The calibration data, of which a part is used.
        sites: The layers by name.
        effect: What is measured at the output, as for ``OutputEffect``.
        vectors: About how many tokens (or examples) they are gathered on, in whole batches.
        store: Where the moments are kept; None for nowhere.
        seed: The seed of the labels.
        progress: Whether to show a progress bar.

    Returns:
        The gradients; a layer that no gradient reaches is missing.
    """
    given = some_of(batches, vectors)
    key = FitStore.digest(f"gradients|{seed}|{effect}", *tensors_in(given), *model.state_dict().values())
    kept = None if store is None or callable(effect) else store.read_tensors(key)
    if kept is None or any(f"{name}.vectors" not in kept for name in sites):  # those of more layers serve as well
        kept = (kept or {}) | _gathered(model, given, sites, effect, seed, progress)
        if store is not None and not callable(effect):
            store.write_tensors(key, kept)
    names = [name for name in sites if f"{name}.moment" in kept]
    return Gradients(
        {name: kept[f"{name}.moment"].to(sites[name].matrix.device) for name in names},
        {name: float(kept[f"{name}.vectors"]) for name in names},
        NAMES[int(kept["effect"])],
    )


def some_of(batches: Sequence[Any], vectors: int) -> list[Any]:
    """Batches from all over the data, with about as many tokens (or examples) as wanted."""
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(0)).tolist()
    taken: list[int] = []
    found = 0
    for i in order:
        taken.append(i)
        found += count_tokens(batches[i], example=1)
        if found >= vectors:
            break
    return [batches[i] for i in sorted(taken)]


def _gathered(
    model: nn.Module, batches: Sequence[Any], sites: Mapping[str, Site], effect: Effect, seed: int, progress: bool
) -> dict[str, Tensor]:
    """The moments of all batches, as tensors to keep."""
    sums = GradientSums()
    bar = progress_bar(desc="gradients", unit="batch", total=len(batches), show=progress)
    with undisturbed(), evaluating(model), frozen(model), bar:
        output = OutputEffect(model, batches, effect, references=False)
        masks = find_masks(model, batches, {name: site.module for name, site in sites.items()}, {})
        for done, i in enumerate(current().mine(len(batches))):
            with torch.enable_grad(), capturing_gradients(sites, masks[i].counted) as captured:
                loss, outputs = _loss(model, batches[i], output, i, seed)
                loss.backward()
            sums.add(i, captured, outputs)
            bar.update(min(len(batches), (done + 1) * current().size) - bar.n)
    gradients = sums.gradients(output.name)
    found = {"effect": torch.tensor(NAMES.index(output.name))}
    found |= {f"{name}.moment": moment for name, moment in gradients.moments.items()}
    for name in sites:
        found[f"{name}.vectors"] = torch.tensor(gradients.vectors.get(name, 0.0), dtype=torch.float64)
    return found


class GradientSums:
    """The sums of the outer products of gradients at the outputs of layers, over the batches of all processes."""

    def __init__(self) -> None:
        self._sums = Sums()

    def add(self, number: int, captured: Mapping[str, Sequence[Tensor]], outputs: int = 0) -> None:
        """Add the gradients of one batch; batches come in the order of ``Ranks.mine``.

        Args:
            number: The batch's number.
            captured: The gradients ``(T, M)`` at each call of each layer, by name.
            outputs: How many vectors of the network's output count in the batch.
        """
        new: dict[tuple[str, str], Any] = {("", "outputs"): outputs}
        for name, parts in captured.items():
            vectors = _clipped(torch.cat([*parts]).float())
            new[name, "count"], new[name, "moment"] = len(vectors), (vectors.mT @ vectors).double()
        self._sums.add(number, new)

    def gradients(self, effect: str) -> Gradients:
        """The moments of what was added, with a ridge, and float32; layers that no gradient reached are missing."""
        moments: dict[str, Tensor] = {}
        found = self._sums.total()
        counts = {name: value for (name, kind), value in found.items() if kind == "count"}
        for name, count in counts.items():
            moment = found[name, "moment"] / count
            moment.diagonal().add_(RIDGE * moment.diagonal().mean())
            if bool(moment.any()):
                moments[name] = moment.float()
        vectors = {name: counts[name] / max(found["", "outputs"], 1) for name in moments}
        return Gradients(moments, vectors, effect)


def _loss(model: nn.Module, batch: Any, output: OutputEffect, i: int, seed: int) -> tuple[Tensor, int]:
    """The sum of a batch's losses, and how many vectors of the output count."""
    device = device_of(model)
    with same_draws(i, device):
        returned = call(model, moved(batch, device))
    return loss_of(batch, returned, output, i, seed)


def loss_of(batch: Any, returned: Any, output: OutputEffect, i: int, seed: int) -> tuple[Tensor, int]:
    """The loss whose gradients have the curvature of an effect as their second moment.

    Args:
        batch: The inputs of the call.
        returned: What the network returned for them.
        output: What is measured.
        i: The batch's number.
        seed: The seed of the labels that are drawn from the network.

    Returns:
        The sum of the batch's losses, and how many vectors of the output count.
    """
    vectors = output.vectors(batch, returned, i)
    generator = torch.Generator().manual_seed(seed + i)
    if output.function is not None:
        return vectors[0].sum(), 1
    if output.of_logits:
        logits = vectors[0]
        points = torch.rand(len(logits), 1, generator=generator).to(logits)
        labels = (logits.detach().softmax(-1).cumsum(-1) < points).sum(-1).clamp_max(logits.shape[-1] - 1)
        return F.cross_entropy(logits, labels, reduction="sum"), len(logits)
    energy = sum(float(one.detach().square().sum()) for one in vectors)
    count = len(vectors[0])
    products = [(one * torch.randn(one.shape, generator=generator).to(one)).sum() for one in vectors]
    return torch.stack(products).sum() * (2 * count / max(energy, 1e-30)) ** 0.5, count


def _clipped(vectors: Tensor) -> Tensor:
    """Vectors ``(T, M)`` of norms that are not too far from their mean; those that are zero stay."""
    norms = torch.linalg.vector_norm(vectors, dim=1)
    alive = norms > 0
    mean = norms.sum() / alive.sum().clamp_min(1)
    wanted = norms.clamp(CLIP[0] * float(mean), CLIP[1] * float(mean))
    return vectors * torch.where(alive, wanted / norms.where(alive, 1), 0)[:, None]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of a network have gradients, while the context is entered; then they are as before."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def tensors_in(batches: Sequence[Any]) -> list[Tensor]:
    """Find all tensors in batches."""
    found: list[Tensor] = []
    for batch in batches:
        values = (
            batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
        )
        found += [value for value in values if isinstance(value, Tensor)]
    return found
