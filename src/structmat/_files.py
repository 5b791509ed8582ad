"""Files: written so that they are either whole or not there, and read with limits, whatever is in them."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

LARGEST_JSON = 32 * 2**20
"""The most bytes of a JSON file that is read."""

MOST_PARTS = 10**6
"""The most commas, colons and opening brackets of a JSON text that is read: each costs memory and time."""

MOST_DIGITS = 40
"""The most digits of an integer in a JSON text that is read: no size or count is as large, and more take long."""

DEEPEST_JSON = 32
"""How deeply lists and objects may lie within each other in a JSON text that is read."""

TOO_DEEP = f"lists and objects lie more than {DEEPEST_JSON} deep"


def read_json(path: str | os.PathLike[str], what: str, *, scale: int = 1) -> Any:
    """Read a JSON file, in limited time and memory.

    Args:
        path: The file.
        what: What the file should hold, for messages, such as ``"a plan"``.
        scale: How many times larger than others the file may be.

    Returns:
        The data; lists and objects lie at most ``DEEPEST_JSON`` deep.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON, or is beyond a limit; the message names the file.
    """
    what = f"{what} in {os.fspath(path)!r}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected {what}, found no file")
    with Path(path).open("rb") as file:
        content = file.read(scale * LARGEST_JSON + 1)
    return parse_json(content, what, scale=scale)


def parse_json(text: str | bytes, what: str, *, scale: int = 1) -> Any:
    """Parse JSON text, in limited time and memory.

    Args:
        text: The text; bytes are UTF-8.
        what: What the text should be, for messages.
        scale: How many times larger than others the text may be.

    Returns:
        The data; lists and objects lie at most ``DEEPEST_JSON`` deep.

    Raises:
        ValueError: If it is not JSON, names a field twice, or is beyond a limit.
    """
    try:
        if len(text) > scale * LARGEST_JSON:
            raise ValueError(f"it has more than {scale * LARGEST_JSON // 2**20} MiB")
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        if sum(map(text.count, ",:[{")) > scale * MOST_PARTS:
            raise ValueError(f"it has more than {scale * MOST_PARTS} parts")
        data = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
        _check_depth(data)
    except (ValueError, RecursionError) as error:
        why = TOO_DEEP if isinstance(error, RecursionError) else error
        raise ValueError(f"expected {what} as JSON, got something else: {why}") from error
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; a name that comes twice is refused, since programs differ in which of the two they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the name {twice[:100]!r} comes twice in one object")
    return found


def _integer(digits: str) -> int:
    """An integer of bounded length."""
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"expected integers of at most {MOST_DIGITS} digits, got one of {len(digits)}")
    return int(digits)


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(DEEPEST_JSON + 1):
        nested = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list)))
        level = [value for values in nested for value in values]
        if not level:
            return
    raise ValueError(TOO_DEEP)


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata))


@contextmanager
def opened_tensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open a safetensors file.

    Args:
        path: The file.

    Yields:
        What ``safetensors.safe_open`` gives.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a safetensors file, or lacks a tensor that is read while it is open.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a safetensors file at {os.fspath(path)!r}, found none")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"expected a safetensors file at {os.fspath(path)!r}: {error}") from error


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Args:
        path: The file.

    Returns:
        The tensors and the metadata, each by name.
    """
    with opened_tensors(path) as file:
        names = file.keys()  # an open file is no mapping
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
