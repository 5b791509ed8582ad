"""What becomes of an error: one line for what a user can cause, a traceback for a fault of the program."""

from __future__ import annotations

import dis
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

PACKAGE = Path(__file__).parents[1]
"""The folder of the package."""

TOLD = (ValueError, ImportError, OSError, ArithmeticError, RuntimeError)
"""The kinds of errors that the package raises to tell a user what to change; a wrong type is a fault of a caller."""

KNOWN = {
    "OSError": "builtins",
    "UnicodeDecodeError": "builtins",
    "EOFError": "builtins",
    "LZMAError": "_lzma",
    "error": "zlib",
    "SafetensorError": "safetensors",
    "HfHubHTTPError": "huggingface_hub",
    "HFValidationError": "huggingface_hub",
    "DatasetsError": "datasets",
    "HTTPError": "httpx",
}
"""Errors that come from outside, wherever they are raised: from files that are broken or missing, or from the network.
The module that an error belongs to begins with the name beside it."""

ALLOCATOR = "DefaultCPUAllocator"
"""What the message of PyTorch's error contains where the memory of the machine is too small."""

MEMORY = "; take a smaller --batch-size, a smaller --dtype, or --stream where the command has it"

REPORT = "this is a fault of structmat; please report it with the traceback and the command"


def explained(error: Exception) -> str | None:
    """Tell the user about an error in one line.

    Args:
        error: The error, as it was caught.

    Returns:
        The line; None for a fault of the program.
    """
    usage = getattr(error, "format_message", None)  # errors of the parser have it, whichever click typer brings
    if usage is not None:
        path = getattr(getattr(error, "ctx", None), "command_path", "structmat")
        return f"{usage().rstrip('.')}; see {path} --help"
    if not is_users(error):
        return None
    line = " ".join(str(error).split()) or type(error).__name__
    return line + MEMORY if _is_of_memory(error) else line


def is_users(error: BaseException) -> bool:
    """Whether a user can cause an error: the package raised it to say so, or it comes from outside the program."""
    if _is_of_memory(error) or any(_is_known(kind) for kind in type(error).__mro__):
        return True
    if isinstance(error, ImportError):
        return _is_raised(error) or not str(error.name or "").startswith("structmat")
    return isinstance(error, TOLD) and _is_raised(error) and PACKAGE in _file_of(_last(error.__traceback__)).parents


@contextmanager
def door(package: str, expected: str) -> Iterator[None]:
    """Let input that another package refuses be an error of the user, while it is entered.

    Args:
        package: The package, whose ``raise`` statements say what is wrong with its input.
        expected: What was expected, in terms of the command line.

    Yields:
        Nothing.

    Raises:
        ValueError: If the package refuses its input.
    """
    try:
        yield
    except TOLD as error:
        if not _is_raised(error) or package not in _file_of(_last(error.__traceback__)).parts:
            raise
        raise ValueError(f"expected {expected}: {' '.join(str(error).split())}") from error


def _is_known(kind: type) -> bool:
    home = KNOWN.get(kind.__name__)
    return home is not None and re.fullmatch(rf"{home}\d*([._].*)?", kind.__module__) is not None  # httpx2 as httpx


def _is_of_memory(error: BaseException) -> bool:
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or ALLOCATOR in str(error)


def _is_raised(error: BaseException) -> bool:
    """Whether a ``raise`` statement made the error, and not an operation that failed."""
    last = _last(error.__traceback__)
    return last is not None and last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _last(trace: TracebackType | None) -> TracebackType | None:
    """The place where an error came up."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _file_of(trace: TracebackType | None) -> Path:
    return Path() if trace is None else Path(trace.tb_frame.f_code.co_filename)
