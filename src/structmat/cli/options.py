"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PLAN, DATA, OUTPUT = "Plan", "Data", "Output"

Model = Annotated[
    str, typer.Argument(help="Folder with the model, or its name on the Hugging Face Hub.", metavar="MODEL")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it appears when it is complete.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a result of structmat that is there already.")]
Dtype = Annotated[
    str, typer.Option(help="Of the weights: float32, bfloat16, float16, or auto for that of the checkpoint.")
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, …; auto for a GPU if there is one.")]
Split = Annotated[str | None, typer.Option(help="Of the data, where it has several splits.", rich_help_panel=DATA)]

FormatName = Annotated[
    str,
    typer.Option("--format", help="blast, low_rank, monarch, block_diagonal or block_sparse.", rich_help_panel=PLAN),
]
Keep = Annotated[float, typer.Option(help="Share of each layer's parameters to keep, at most.", rich_help_panel=PLAN)]
Blocks = Annotated[str, typer.Option(help="Block counts: 16, or 8x16 for rows x columns.", rich_help_panel=PLAN)]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layers",
        metavar="REGEX ...",
        help="Layers to compress, by whole names; by default every linear layer but the output head and classifiers.",
        rich_help_panel=PLAN,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="REGEX ...", help="Layers to leave alone.", rich_help_panel=PLAN),
]
Rules = Annotated[
    list[str] | None,
    typer.Option(
        "--rule",
        metavar="REGEX=FORMAT[:keep=0.3][:blocks=8x16] ...",
        help="Layers that are to differ from --format, --keep and --blocks; the first rule that matches decides.",
        rich_help_panel=PLAN,
    ),
]
SkipMisfits = Annotated[
    bool,
    typer.Option("--skip-misfits", help="Leave layers dense that the format does not fit.", rich_help_panel=PLAN),
]
