"""Fits of many layers: in batches of one shape, with a cache of finished ones and a time estimate."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structmat._files import read_tensors, write_tensors
from structmat._progress import progress_bar
from structmat._version import __version__
from structmat.fit.base import Fit, Method
from structmat.formats import Format

BATCH_BYTES = 64 * 2**20
"""Weights of one shape are fitted together up to this much memory for a copy of them."""


@dataclass(frozen=True)
class Task:
    """One weight to fit.

    Attributes:
        name: Of the layer.
        weight: ``(M, N)``.
        format: What to fit.
        method: How.
        target: What to fit it to; ``weight`` where earlier layers do not change the inputs.
        gram: Second moment ``(N, N)`` of the inputs; None for the Frobenius norm.
    """

    name: str
    weight: Tensor
    format: Format
    method: Method[Any]
    target: Tensor
    gram: Tensor | None = None

    @property
    def cost(self) -> float:
        """About how many multiplications the fit takes."""
        return self.method.cost(self.format, aware=self.gram is not None)


class FitBar:
    """A progress bar over the multiplications of all fits, whose time estimate so weighs large layers more.

    Args:
        total: Multiplications of everything.
        show: Whether to draw it.
    """

    def __init__(self, total: float, show: bool) -> None:
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        self._bar = progress_bar(total=total, desc="compress", smoothing=0, bar_format=form, miniters=0, show=show)
        self._done = 0.0

    def __enter__(self) -> FitBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, text: str) -> None:
        """Show what is going on."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(0)  # draws, at most ten times a second

    def advance(self, cost: float) -> None:
        """Count work as done."""
        self._done += cost
        self._bar.update(self._done - self._bar.n)

    def advance_within(self, cost: float, share: float) -> None:
        """Show a share of a piece of work that ``advance`` will count once it is done."""
        self._bar.update(max(0.0, self._done + cost * share - self._bar.n))


def fit_tasks(tasks: Sequence[Task], bar: FitBar, store: FitStore | None) -> dict[str, Fit]:
    """Fit every task; those of one format, method, dtype and device together.

    A batch is taken from the store only as a whole, so that a fit does not depend on what an earlier run finished.

    Args:
        tasks: What to fit.
        bar: The progress bar.
        store: Where finished fits are kept; None for nowhere.

    Returns:
        The fits by name, in the tasks' order.
    """
    fits: dict[str, Fit] = {}
    for batch in _batches(tasks):
        found = [store.get(task) for task in batch] if store else [None]
        if any(fit is None for fit in found):
            found = _fit_batch(batch, bar)
            for task, fit in zip(batch, found, strict=True):
                if store:
                    store.put(task, fit)
        fits.update((task.name, fit) for task, fit in zip(batch, found, strict=True) if fit is not None)
        bar.advance(sum(task.cost for task in batch))
    return {task.name: fits[task.name] for task in tasks}


def _fit_batch(batch: Sequence[Task], bar: FitBar) -> list[Fit]:
    names = [task.name for task in batch]
    cost = sum(task.cost for task in batch)
    bar.say(names[0])

    def show(step: int, steps: int, errors: tuple[float, ...]) -> None:
        bar.say(f"{names[0]}, {step}/{steps}, error {max(errors):.3f}")
        bar.advance_within(cost, step / steps)

    grams = [task.gram for task in batch if task.gram is not None]
    fitted = batch[0].method.fit_many(
        [task.target for task in batch], batch[0].format, grams=grams or None, names=names, progress=show
    )
    return [
        fit if task.target is task.weight else with_error(fit, task.weight)
        for task, fit in zip(batch, fitted, strict=True)
    ]


def with_error(fit: Fit, weight: Tensor) -> Fit:
    """The fit with its error against this weight ``(M, N)``."""
    dense = weight.detach().double()
    norm = torch.linalg.vector_norm(dense)
    rest = torch.linalg.vector_norm(dense - fit.format.to_dense(fit.factors).double())
    return replace(fit, error=float(rest / norm) if norm > 0 else 0.0)


def _batches(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """Tasks with one format, method, dtype and device, in groups of bounded memory."""
    groups: dict[tuple[Any, ...], list[Task]] = {}
    for task in tasks:
        key = (task.format, task.method, task.weight.dtype, task.weight.device, task.gram is None)
        groups.setdefault(key, []).append(task)
    for group in groups.values():
        M, N = group[0].format.shape
        size = max(1, BATCH_BYTES // (4 * M * N + (0 if group[0].gram is None else 16 * N * N)))
        yield from (group[k : k + size] for k in range(0, len(group), size))


class FitStore:
    """Finished fits in a folder, each under the hash of everything that it depends on.

    Args:
        folder: Made if it is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, task: Task) -> Fit | None:
        """The fit of this task, if it is there.

        Args:
            task: What was to be fitted.

        Returns:
            The fit, or None.
        """
        return self.read(self._key(task), task.format, task.weight.device)

    def put(self, task: Task, fit: Fit) -> None:
        """Keep the fit of this task."""
        self.write(self._key(task), fit)

    def _key(self, task: Task) -> str:
        tensors = (task.weight, task.target, task.gram)
        return digest(f"{task.format!r}|{task.method!r}", *(t for t in tensors if t is not None))

    def read(self, key: str, format: Format, device: torch.device) -> Fit | None:
        """What ``write`` kept under this key, on this device, or None."""
        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            return None
        tensors, metadata = read_tensors(path)
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        bias = tensors.pop("bias", None)
        format.check_factors(tensors)
        facts = json.loads(metadata["fit"])
        return Fit(
            format, tensors, facts["error"], tuple(facts["history"]), facts["seconds"], facts["output_error"], bias
        )

    def write(self, key: str, fit: Fit) -> None:
        """Keep a fit under a key."""
        facts = {
            "error": fit.error, "history": fit.history, "seconds": fit.seconds, "output_error": fit.output_error,
            "saved": time.time(),
        }  # fmt: skip
        tensors = dict(fit.factors) if fit.bias is None else {**fit.factors, "bias": fit.bias}
        write_tensors(self.folder / f"{key}.safetensors", tensors, {"fit": json.dumps(facts)})


def digest(text: str, *tensors: Tensor) -> str:
    """A hash of a text, of tensors, and of the library's version."""
    total = hashlib.sha256(f"{__version__}|{text}|".encode())
    for tensor in tensors:
        total.update(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:32]
