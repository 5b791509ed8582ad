"""What a result depends on beside options: the contents of files, and the versions of the libraries that compute."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from structmat._digests import digest_of_file, side_by_side
from structmat._version import __version__
from structmat.data.sources import Source


def fingerprint(source: str | os.PathLike[str] | Source | None, *, named: bool = True) -> str | None:
    """Hash the names and the contents of a file or of the files of a folder; a new date alone changes nothing.

    Args:
        source: A path, the name of something on the Hub, or a source of data, which may be a pattern.
        named: Whether the name of the file or folder itself counts, beside the names within the folder.

    Returns:
        The hash; None where there is no such file or folder.
    """
    if source is None:
        return None
    parsed = source if isinstance(source, Source) else Source(os.fspath(source), slice(None))
    files = parsed.files
    if not files and not Path(parsed.name).exists():
        return None
    top = Path(parsed.name) if Path(parsed.name).exists() else Path(os.path.commonpath(files))
    parent = top.parent if named else top
    total = hashlib.sha256()
    for file, content in zip(files, side_by_side(digest_of_file, files), strict=True):
        total.update(f"{file.relative_to(parent)}|{content}|".encode())
    return total.hexdigest()[:16]


def versions() -> dict[str, str]:
    """The versions of the libraries that compute."""
    found = {"structmat": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
