"""The cache of finished fits: one file for each, under the hash of everything that the fit depends on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from structmat._files import read_tensors, write_tensors
from structmat._version import __version__
from structmat.fit import Fit
from structmat.formats import Format


class FitStore:
    """Finished fits in a folder.

    Args:
        folder: The folder; it is made if it is not there.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
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

    def read(self, key: str, format: Format, device: torch.device) -> Fit | None:
        """Read what ``write`` kept under a key.

        Args:
            key: The hash.
            format: The format of the fit.
            device: The device for the factors.

        Returns:
            The fit, or None where there is none.
        """
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
            "error": fit.error,
            "history": fit.history,
            "seconds": fit.seconds,
            "output_error": fit.output_error,
            "saved": time.time(),
        }
        tensors = dict(fit.factors) if fit.bias is None else {**fit.factors, "bias": fit.bias}
        write_tensors(self.folder / f"{key}.safetensors", tensors, {"fit": json.dumps(facts)})
