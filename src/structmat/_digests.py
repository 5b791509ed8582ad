"""Digests: how a tensor, or a record about tensors, is recognised as the one that was saved.

The digest of a tensor covers its dtype, its shape and every bit of its values. Its words of eight bytes, folded so that
no bit is the last one alone, are multiplied with fixed odd numbers and summed modulo ``2^64``, chunk by chunk, which
runs at the speed of the memory; the sums of all chunks are hashed. That finds damage and mistakes, and is no protection
against somebody who writes digests himself. ``benchmarks/digests.py`` measures the time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**15
"""The words of one sum: a quarter of a MiB, which stays in the cache of a core."""

FOLD = 29
"""How far words are folded. A changed last bit alone would be lost in a sum, as even numbers of them cancel; 29 is no
distance between the signs of numbers of any dtype, which a change of all signs would lose too."""

OPT_OUT = "STRUCTMAT_VERIFY"
"""The environment variable that switches the check on loading off, where it is ``0``."""

_ODD = np.random.PCG64(20250).random_raw(CHUNK) | np.uint64(1)


def digest(tensor: Tensor) -> str:
    """The digest of one tensor, of 16 characters."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return _of_bytes(f"{tensor.dtype}|{tuple(tensor.shape)}|", data)


def digest_of_file(path: Path) -> str:
    """The digest of the contents of a file, of 16 characters."""
    return _of_bytes("", np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8))


def _of_bytes(kind: str, data: Any) -> str:
    """The digest of bytes in an array, and of a text that says what they are."""
    total = hashlib.blake2b(kind.encode(), digest_size=8)
    words = data[: len(data) // 8 * 8].view("<u8")
    folded = np.empty(min(CHUNK, len(words)), np.uint64)
    sums = np.empty(-(-len(words) // CHUNK), "<u8")
    for k in range(len(sums)):
        chunk = words[k * CHUNK : (k + 1) * CHUNK]
        part = folded[: len(chunk)]
        np.right_shift(chunk, FOLD, out=part)
        np.bitwise_xor(chunk, part, out=part)
        sums[k] = np.dot(part, _ODD[: len(chunk)])
    total.update(sums.tobytes())
    total.update(data[len(words) * 8 :].tobytes())
    return total.hexdigest()


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Find the digest of every tensor.

    Args:
        state: The tensors by name.

    Returns:
        The digests by name.
    """
    return dict(zip(state, side_by_side(digest, state.values()), strict=True))


def side_by_side(function: Callable[[Any], str], values: Iterable[Any]) -> list[str]:
    """The results of a function of each value, computed in as many threads as PyTorch uses."""
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        return list(pool.map(function, values))


def sealed(record: Mapping[str, Any], tensors: Mapping[str, str]) -> dict[str, Any]:
    """Make what is stored beside a record, so that changes of it and of its tensors are found.

    Args:
        record: What a file says of its tensors, as JSON-compatible data.
        tensors: The digest of every tensor.

    Returns:
        JSON-compatible data, for ``changes``.
    """
    return {"tensors": dict(tensors), "record": _of_record(record, tensors)}


def _of_record(record: Mapping[str, Any], tensors: Mapping[str, str]) -> str:
    text = json.dumps([record, tensors], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def changes(seal: Any, record: Mapping[str, Any], found: Mapping[str, str]) -> list[str]:
    """Say what is not as it was saved.

    Args:
        seal: What ``sealed`` made.
        record: What the file says of its tensors now.
        found: The digests of the tensors as they are now.

    Returns:
        One text for each change, beginning with the quoted name of a tensor or with ``the record``.

    Raises:
        ValueError: If the digests are none.
    """
    expected = seal.get("tensors") if isinstance(seal, Mapping) else None
    if not isinstance(seal, Mapping) or not isinstance(expected, Mapping):
        raise ValueError("expected digests with 'tensors' and 'record', got something else")
    by_digest = {value: name for name, value in expected.items() if isinstance(value, str)}
    said = [f"{name!r} is missing" for name in expected if name not in found]
    for name, value in found.items():
        if name not in expected:
            said.append(f"{name!r} was not saved with the others")
        elif value != expected[name]:
            other = by_digest.get(value)
            said.append(f"{name!r} has other values" + ("" if other is None else f", those of {other!r}"))
    if seal.get("record") != _of_record(record, expected):
        said.append("the record of formats and names differs")
    return said


def check(seal: Any, record: Mapping[str, Any], state: Mapping[str, Tensor], place: str) -> None:
    """Refuse tensors that are not as they were saved, unless ``STRUCTMAT_VERIFY=0`` switches this off.

    Args:
        seal: What ``sealed`` made; empty where a file has none.
        record: What the file says of its tensors.
        state: The tensors by name.
        place: The file or folder, for the message.

    Raises:
        ValueError: If something changed; every tensor is named.
    """
    if seal == {} or os.environ.get(OPT_OUT) == "0":
        return
    found = changes(seal, record, digests(state))
    if found:
        more = f", and {len(found) - 20} more" if len(found) > 20 else ""
        raise ValueError(
            f"expected {place!r} as it was saved, but {'; '.join(found[:20])}{more}: restore the file from a copy, or "
            f"set {OPT_OUT}=0 to load it if you changed it on purpose, and save it again"
        )
