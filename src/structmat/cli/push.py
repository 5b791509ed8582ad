"""The upload of a finished folder to the Hugging Face Hub."""

from __future__ import annotations

import importlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from structmat.cli.options import Options
from structmat.cli.show import say

HUB = "Hub"


@dataclass(frozen=True)
class PushOptions(Options):
    """Whether the result is uploaded.

    Attributes:
        push_to_hub: The repository on the Hub; None for none.
        private: Whether a repository that is created is private.
    """

    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="REPO",
            help="Upload the folder to this repository on the Hugging Face Hub, USER/NAME, once it is complete.",
            rich_help_panel=HUB,
        ),
    ] = None
    private: Annotated[
        bool,
        typer.Option(
            "--private", help="Make the repository of --push-to-hub private if it is new.", rich_help_panel=HUB
        ),
    ] = False

    def __post_init__(self) -> None:
        if self.push_to_hub is None and self.private:
            raise ValueError("expected --push-to-hub with --private")

    def check(self) -> None:
        """Check before the work begins that there can be an upload after it.

        Raises:
            ValueError: If the name is none of a repository, or there is no token.
        """
        if self.push_to_hub is None:
            return
        hub, errors = _library(), importlib.import_module("huggingface_hub.errors")
        try:
            importlib.import_module("huggingface_hub.utils").validate_repo_id(self.push_to_hub)
        except errors.HFValidationError as error:
            raise ValueError(
                f"expected --push-to-hub to name a repository, such as user/name, got {self.push_to_hub!r}"
            ) from error
        if hub.get_token() is None:
            raise ValueError("expected a token of the Hub for --push-to-hub, found none; run hf auth login")

    def upload(self, folder: Path) -> None:
        """Upload a folder, if that is wanted; the repository is created where there is none.

        Args:
            folder: The folder, which is complete.

        Raises:
            OSError: If the upload fails; the folder stays, and the message says how to upload it later.
        """
        if self.push_to_hub is None:
            return
        repository, client = self.push_to_hub, _library().HfApi()
        kinds = (OSError, ValueError, RuntimeError, importlib.import_module("huggingface_hub.errors").HTTPError)
        try:
            repository = client.create_repo(repository, private=self.private or None, exist_ok=True).repo_id
            say(f"uploading {folder} to {repository}")
            made = client.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {folder.name}")
        except kinds as error:
            private = ["--private"] if self.private else []
            later = shlex.join(["hf", "upload", repository, str(folder), ".", *private])
            causes = " ".join(f"{error} {error.__cause__ or ''}".split())
            raise OSError(
                f"expected to upload {str(folder)!r} to {repository!r}, but the upload failed: {causes}; the folder is "
                f"complete, and {later} uploads it"
            ) from error
        say(f"uploaded {folder}: {made.commit_url}")


def _library() -> Any:
    """The library of the Hub, which comes with transformers."""
    return importlib.import_module("huggingface_hub")
