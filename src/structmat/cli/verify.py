"""``structmat verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from structmat.integrations.integrity import verify as verified


def verify(
    path: Annotated[
        Path, typer.Argument(help="The folder with a saved model, or a file of structmat.save_model.", metavar="PATH")
    ],
) -> None:
    """Run ``structmat verify``."""
    found = verified(path)
    if found.problems:
        raise ValueError(f"expected {str(path)!r} as it was saved: {'; '.join(found.problems)}")
    if found.has_digests:
        print(f"{found.tensors} tensors of {path} are as they were saved")
    else:
        print(f"{found.tensors} tensors of {path} are finite; no digests were saved with them, so no more is known")
