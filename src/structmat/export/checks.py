"""What an exporter made, and the check that a runtime computes the same as PyTorch before it appears."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structmat.network.signatures import Signature, with_sums

TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-2, torch.int8: 1e-1}
"""The largest difference between a runtime and PyTorch, relative to the largest output, by dtype of the weights."""

OTHER_SIZES = (1, 5, 7)
"""The lengths of axes that vary in the inputs with which a runtime is checked, beside those of the example."""


class ExportError(RuntimeError):
    """An exporter cannot write a network, or what it wrote computes something else."""


@dataclass(frozen=True)
class Exported:
    """What an exporter wrote.

    Attributes:
        path: The file.
        files: All files: the weights of large ONNX models are beside the model.
        size: The bytes of all files.
        inputs: The shape of each input by name; axes that vary have a name.
        outputs: The shape of each output by name.
        difference: The largest difference between the runtime and PyTorch, relative to the largest output.
        checked: What the check ran.
        hardened: How far each hardened matrix is from the one that learned, by name; empty where none learned.
        delegates: The number of parts that a backend of the runtime took over; None where there is no backend.
    """

    path: Path
    files: tuple[Path, ...]
    size: int
    inputs: Mapping[str, tuple[int | str, ...]]
    outputs: Mapping[str, tuple[int | str, ...]]
    difference: float
    checked: str
    hardened: Mapping[str, float]
    delegates: int | None = None

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.size:,} bytes in {len(self.files)} file{'s'[: len(self.files) > 1]}"]
        for kind, shapes in (("input", self.inputs), ("output", self.outputs)):
            shown = list(shapes.items())
            for name, shape in shown[:4]:
                lines.append(f"{kind} {name}: {' x '.join(map(str, shape)) or 'one number'}")
            if len(shown) > 4:
                lines.append(f"{len(shown) - 4} more {kind}s, up to {shown[-1][0]}")
        if self.hardened:
            worst = max(self.hardened.values())
            lines.append(
                f"{len(self.hardened)} layers were hardened for this; their matrices changed by {worst:.1e} at most"
            )
        if self.delegates is not None:
            lines.append(f"{self.delegates} parts run in the backend")
        lines.append(f"checked with {self.checked}: the largest difference from PyTorch is {self.difference:.1e}")
        return "\n".join(lines)


def runtime(name: str, extra: str) -> Any:
    """Import a module of an optional package.

    Args:
        name: The module.
        extra: The extra of structmat that installs the package.

    Returns:
        The module.

    Raises:
        ImportError: If the package is not installed.
    """
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"expected {package} to be installed for this export; run: pip install 'structmat[{extra}]'")
    return importlib.import_module(name)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Let the files that are written into a temporary folder appear beside a path, once all went well.

    Args:
        path: The file to write; the folder above it is made.

    Yields:
        The path in the temporary folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield folder / path.name
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):  # the model itself comes last
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def largest_difference(
    signature: Signature,
    run: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    dtype: torch.dtype,
    what: str,
    *,
    seed: int = 0,
    vary: bool = True,
) -> float:
    """Run a runtime and PyTorch on random inputs of several sizes.

    Args:
        signature: The network.
        run: Runs the runtime.
        dtype: The dtype of the weights, which decides how large a difference may be.
        what: The runtime, for messages.
        seed: The seed of the inputs.
        vary: Whether the sizes vary.

    Returns:
        The largest difference, relative to the largest output.

    Raises:
        ExportError: If it is too large, or the runtime fails.
    """
    generator = torch.Generator().manual_seed(seed)
    worst, tolerance = 0.0, TOLERANCES.get(dtype, TOLERANCES[torch.float32])
    for sizes in _sizes(signature, vary):
        inputs = signature.draw(sizes, generator)
        with torch.no_grad():
            expected = signature.module(*(tensor.clone() for tensor in inputs))
        try:
            got = run(inputs)
        except Exception as error:
            line = " ".join(str(error).split())[:300]
            raise ExportError(f"{what} fails on inputs with {sizes}: {line}; nothing was written") from error
        for name, mine, theirs in zip(signature.outputs, expected, got, strict=True):
            difference = _difference(theirs, mine)
            if not difference <= tolerance:
                raise ExportError(
                    f"expected {what} to compute what PyTorch does, within {tolerance:.0e} of the largest value of "
                    f"{name!r}, got a difference of {difference:.1e} for inputs with {sizes}; nothing was written"
                )
            worst = max(worst, difference)
    return worst


def _sizes(signature: Signature, vary: bool) -> list[dict[str, int]]:
    """The lengths of the axes in each check, within their limits."""
    found = [dict(signature.sizes)]
    free = [name for name in signature.sizes if "+" not in name]
    for k in range(len(OTHER_SIZES) if vary and free else 0):
        chosen = {name: OTHER_SIZES[(k + place) % len(OTHER_SIZES)] for place, name in enumerate(free)}
        chosen |= signature.smallest if k == 0 else {}
        within = {name: min(size, signature.limits.get(name, size)) for name, size in chosen.items()}
        found.append(with_sums(signature.sizes, within))
    return found


def dtype_of(model: nn.Module) -> torch.dtype:
    """The narrowest floating-point dtype of the weights of a network."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return min(dtypes, key=lambda dtype: torch.finfo(dtype).bits, default=torch.float32)


def _difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value; infinite where shapes differ or only one is finite."""
    if got.shape != expected.shape:
        return float("inf")
    if got.numel() == 0:
        return 0.0
    a, b = got.double(), expected.double()
    same = (a == b) | (a.isnan() & b.isnan())
    gap = torch.where(same, 0.0, (a - b).abs())
    if not bool(gap.isfinite().all()):
        return float("inf")
    finite = b[b.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 1.0
    return float(gap.max()) / max(scale, 1e-6)
