"""Which launch is fastest on this GPU: measured once, kept in a file per device.

The file is ``triton/<device>-triton-<version>.json`` in the folder that the environment variable ``STRUCTMAT_CACHE``
names, else in ``~/.cache/structmat``: one entry for each key of operation, shapes, dtype and power of two of tokens.
Nothing is measured under triton's interpreter, nor while a CUDA graph is captured: the first candidate is taken then.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
import triton
import triton.testing
from triton.runtime.errors import OutOfResources

from structmat._files import read_json

Choice = dict[str, int | str]
"""A way to launch: what ``choose`` picks from, and what the file stores."""

_tables: dict[Path, dict[str, Choice]] = {}
_lock = threading.RLock()  # a choice may hold others, and backward runs in threads of its own


def interpreted() -> bool:
    """Whether kernels run in triton's interpreter (``TRITON_INTERPRET=1`` in the environment), as the tests do."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on", "yes", "y"}


def cache_file(device: torch.device) -> Path:
    """The file with what was measured on a device.

    Args:
        device: A GPU.

    Returns:
        Its path, whether the file is there or not.
    """
    root = os.environ.get("STRUCTMAT_CACHE") or Path.home() / ".cache" / "structmat"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{_device_name(device)}-triton-{triton.__version__}")
    return Path(root) / "triton" / f"{name}.json"


def bucket(tokens: int) -> int:
    """The power of two that stands for a number of tokens: the next one up.

    Args:
        tokens: A number of at least 1.

    Returns:
        A power of two.
    """
    return 1 << (tokens - 1).bit_length()


def choose(key: str, device: torch.device, candidates: Sequence[Choice], run: Callable[[Choice], object]) -> Choice:
    """The fastest of some ways to launch, from memory, from the file, or else measured now and written to both.

    Args:
        key: The operation, shapes, dtype and bucket of tokens.
        device: The device of the tensors.
        candidates: The ways to choose from; an entry of the file that is not among them is measured anew.
        run: A function that does the work in the given way, on tensors of the shapes in question.

    Returns:
        One of the candidates.

    Raises:
        RuntimeError: If the GPU has too little shared memory or registers for every candidate.
    """
    if len(candidates) == 1 or not _measures(device):
        return candidates[0]
    path = cache_file(device)
    found = _table(path).get(key)
    if found is not None and found in candidates:
        return found
    if torch.cuda.is_current_stream_capturing():
        return candidates[0]
    with _lock:
        times = [_milliseconds(run, candidate) for candidate in candidates]
        best = min(range(len(candidates)), key=times.__getitem__)
        if times[best] == float("inf"):
            raise RuntimeError(
                f"expected a launch that fits {_device_name(device)}, none of {candidates} does for {key}"
            )
        _record(path, key, candidates[best])
    return candidates[best]


def forget() -> None:
    """Drop what is in memory, so that the file is read again."""
    with _lock:
        _tables.clear()


def _measures(device: torch.device) -> bool:
    return device.type == "cuda" and not interpreted()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _milliseconds(run: Callable[[Choice], object], candidate: Choice) -> float:
    """Median time with the L2 cache cleared, launched as a graph, so that Python's time is no part of it."""
    try:
        run(candidate)
        torch.cuda.synchronize()
    except OutOfResources:
        return float("inf")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run(candidate)
    return cast(float, triton.testing.do_bench(graph.replay, warmup=5, rep=25, return_mode="median"))


def _table(path: Path) -> dict[str, Choice]:
    with _lock:
        if path not in _tables:
            _tables[path] = _read(path)
        return _tables[path]


def _read(path: Path) -> dict[str, Choice]:
    """What the file holds; nothing if it is missing or damaged, since all of it can be measured again."""
    try:
        stored = read_json(path, "launches that were measured")
    except (OSError, ValueError):
        return {}
    if not isinstance(stored, dict):
        return {}
    return {key: choice for key, choice in stored.items() if isinstance(choice, dict)}


def _record(path: Path, key: str, choice: Choice) -> None:
    """Add an entry, beside those that other processes have written meanwhile."""
    table = _table(path)
    for other, known in _read(path).items():
        table.setdefault(other, known)
    table[key] = choice
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        warnings.warn(f"cannot keep the launches that were measured: {error}; set STRUCTMAT_CACHE", stacklevel=2)
        return
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(table, file, indent=0, sort_keys=True)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
