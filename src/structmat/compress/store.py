"""The cache of finished fits: one file for each, under the hash of everything that the fit depends on."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from structmat import _checks
from structmat._digests import changes, digests, sealed
from structmat._files import parse_json, read_tensors, write_tensors
from structmat._ranks import current
from structmat._version import __version__
from structmat.fit import Fit
from structmat.formats import Format
from structmat.network.surgery import check_layer


class FitStore:
    """Finished fits in a folder, which all processes that work together share.

    Args:
        folder: The folder; it is made if it is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if current().leads:
            self.folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def digest(text: str, *tensors: Tensor) -> str:
        """Hash a text, tensors, and the library's version.

        Args:
            text: The settings that a fit depends on.
            *tensors: The tensors that it depends on.

        Returns:
            The hash, of 32 characters.
        """
        total = hashlib.sha256(f"{__version__}|{text}|".encode())
        for tensor in tensors:
            total.update(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
            total.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()[:32]

    def read_many(self, keys: Sequence[str], formats: Sequence[Format], device: torch.device) -> list[Fit | None]:
        """Read what ``write`` kept under keys, in the first process for all.

        Args:
            keys: The hashes; those of other processes do not matter.
            formats: The format of each fit.
            device: The device for the factors.

        Returns:
            The fits; None where there is none.
        """
        return current().of(0, lambda: [self.read(k, f, device) for k, f in zip(keys, formats, strict=True)])

    def read(self, key: str, format: Format, device: torch.device) -> Fit | None:
        """Read what ``write`` kept under a key, in this process.

        Args:
            key: The hash.
            format: The format of the fit.
            device: The device for the factors.

        Returns:
            The fit; None where there is none, or one that is damaged, of which a warning tells.
        """
        path = self.folder / f"{key}.safetensors"
        if not path.is_file():
            return None
        try:
            return _checked(*read_tensors(path), format, device)
        except ValueError as error:
            warnings.warn(f"the finished fit in {str(path)!r} is damaged and is made again: {error}", stacklevel=2)
            return None

    def read_tensors(self, key: str) -> dict[str, Tensor] | None:
        """Read what ``write_tensors`` kept under a key; None where there is nothing, or what is damaged."""
        return current().of(0, lambda: self._read_tensors(key))

    def _read_tensors(self, key: str) -> dict[str, Tensor] | None:
        path = self.folder / f"{key}.safetensors"
        if not path.is_file():
            return None
        try:
            tensors, metadata = read_tensors(path)
            texts = _checks.fields(metadata, {"digests": str}, "the metadata of statistics")
            found = changes(parse_json(texts["digests"], "the digests of statistics"), {}, digests(tensors))
            if found:
                raise ValueError("; ".join(found))
        except ValueError as error:
            warnings.warn(f"the statistics in {str(path)!r} are damaged and are made again: {error}", stacklevel=2)
            return None
        return tensors

    def write_tensors(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keep tensors under a key."""
        if current().leads:
            metadata = {"digests": json.dumps(sealed({}, digests(tensors)))}
            write_tensors(self.folder / f"{key}.safetensors", tensors, metadata)

    def write(self, key: str, fit: Fit) -> None:
        """Keep a fit under a key; the process that made it writes it at once, so that nothing finished is lost."""
        facts = {
            "error": fit.error,
            "history": fit.history,
            "seconds": fit.seconds,
            "output_error": fit.output_error,
            "loss_error": fit.loss_error,
            "saved": time.time(),
        }
        tensors = dict(fit.factors) if fit.bias is None else {**fit.factors, "bias": fit.bias}
        metadata = {"fit": json.dumps(facts), "digests": json.dumps(sealed(facts, digests(tensors)))}
        write_tensors(self.folder / f"{key}.safetensors", tensors, metadata)


FACTS = {
    "error": float,
    "history": list,
    "seconds": float,
    "output_error": (float, type(None)),
    "loss_error": (float, type(None)),
}
"""What is known of a fit beside its tensors, and of which kind it is."""


def _checked(tensors: dict[str, Tensor], metadata: dict[str, str], format: Format, device: torch.device) -> Fit:
    """The fit of a file, if everything is as it was written.

    Args:
        tensors: The tensors of the file.
        metadata: Its metadata.
        format: The format of the fit.
        device: The device for the factors.

    Returns:
        The fit.

    Raises:
        ValueError: If something is missing, or not as it was written.
    """
    texts = _checks.fields(metadata, {"fit": str, "digests": str}, "the metadata of a fit")
    record = parse_json(texts["fit"], "the facts of a fit")
    found = changes(parse_json(texts["digests"], "the digests of a fit"), record, digests(tensors))
    if found:
        raise ValueError("; ".join(found))
    facts = _checks.fields(record, FACTS, "the facts of a fit")
    factors = {name: tensor.to(device) for name, tensor in tensors.items()}
    bias = factors.pop("bias", None)
    check_layer("", format, factors)
    if bias is not None and not _checks.is_finite(bias):
        raise ValueError("expected a finite bias, got NaN or infinity")
    history = tuple(_checks.typed(one, float, "an error in the history of a fit") for one in facts["history"])
    return Fit(
        format, factors, facts["error"], history, facts["seconds"], facts["output_error"], bias, facts["loss_error"]
    )
