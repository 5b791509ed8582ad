"""The program: its commands, and what it says when one of them ends with an error."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from structmat._version import __version__
from structmat.cli import show
from structmat.cli.errors import REPORT, explained
from structmat.cli.options import DebugOption
from structmat.cli.parser import Commands, Entry

COMMANDS = {
    "plan": Entry(
        "plan:plan",
        "Show which layers would get which format; no weights are read.",
        (
            "structmat plan stories260K",
            "structmat plan meta-llama/Llama-3.2-1B --keep 0.6 --exclude '.*layers.0.*' -o plan.json",
            "structmat plan gpt2 --format low_rank --rule '.*mlp.*=blast:keep=0.4:blocks=8x16'",
            "structmat plan --layers '.*up_proj' --layers '.*down_proj' --format monarch:permute_output=true MODEL",
        ),
    ),
    "allocate": Entry(
        "allocate:allocate_plan",
        "Share one budget among all layers by what each does to the output, on data; the plan is for compress.",
        (
            "structmat allocate MODEL -o plan.json --keep 0.8 --calibrate 'texts.txt[:500]'",
            "structmat allocate MODEL -o plan.json --keep 0.6 --unit multiplications --calibrate images/ --effort best",
        ),
    ),
    "compress": Entry(
        "compress:compress",
        "Replace the layers of a pretrained model by structured ones; an interrupted run resumes when it is run again.",
        (
            "structmat compress stories260K -o small --blocks 4 --calibrate 'stories.txt.xz[:500]'",
            "structmat compress MODEL -o small --plan plan.json --calibrate texts.jsonl --refine",
            "structmat compress google/vit-base-patch16-224 -o small --keep 0.5 --calibrate images/",
            "structmat compress MODEL -o learning --format gaudi_gblr --keep 0.6 --calibrate texts.txt --learn",
        ),
    ),
    "retrain": Entry(
        "retrain:retrain",
        "Train a structured model further; an interrupted run resumes from its last checkpoint when it is run again.",
        (
            "structmat retrain small -o better --data 'stories.txt.xz[:2000]' --eval 'stories.txt.xz[-300:]'",
            "structmat retrain small -o better --data texts.txt --teacher MODEL --steps 1000 --set optim=adafactor",
            "structmat retrain learning -o learned --data texts.txt --set structure_target=0.4 "
            "--set structure_shrinkage=0.1",
        ),
    ),
    "evaluate": Entry(
        "evaluate:evaluate",
        "Measure models side by side: perplexity or accuracy, operations and parameters.",
        (
            "structmat evaluate small --dense MODEL --data 'stories.txt.xz[-300:]'",
            "structmat evaluate small better --dense MODEL --tasks arc_easy --tasks piqa --json found.json",
            "structmat evaluate small-vit --dense google/vit-base-patch16-224 --data images/",
        ),
    ),
    "run": Entry(
        "run:run",
        "Run a recipe: commands one after the other, from one file; an interrupted run resumes when it is run again.",
        (
            "structmat run recipe.yaml -o small",
            "structmat run quick MODEL -o small --set keep=0.8 --set 'calibrate=stories.txt[:1500]'",
            "structmat run best MODEL -o small --set keep=0.8 --set calibrate=texts.jsonl --dry-run",
            "structmat run small/compress/recipe.yaml -o again",
        ),
    ),
    "report": Entry(
        "report:report",
        "Show what each layer of a model is and costs, and its error if compress made it.",
        (
            "structmat report small",
            "structmat report small --json",
            "structmat report small --html report.html",
            "structmat report learned --plot pictures",
        ),
    ),
    "verify": Entry(
        "verify:verify",
        "Check that a saved model is as it was written: every tensor against its digest, and that all are finite.",
        ("structmat verify small", "structmat verify compressed.safetensors"),
    ),
    "bench": Entry(
        "bench:bench",
        "Time structured layers or whole language models against dense ones, once they are checked to be right.",
        (
            "structmat bench --formats blast --formats low_rank --blocks 4 --blocks 16 --shapes 4096x11008 --tokens 1",
            "structmat bench --formats blast:keep=0.3 --dtypes float32 --dtypes bfloat16 --backward --autotune",
            "structmat bench MODEL small --prefill 512 --generate 100",
            "structmat bench small",
            "structmat bench --shape llama-7b --formats blast --blocks 16 --device cuda --mode graphs",
        ),
    ),
    "generate": Entry(
        "tools:generate",
        "Let a language model continue a text.",
        ("structmat generate small 'Once upon a time' --tokens 100 --seed 1",),
    ),
    "densify": Entry(
        "tools:densify",
        "Write a structured model as a plain dense one, which any program loads.",
        ("structmat densify small -o plain",),
    ),
    "harden": Entry(
        "tools:harden",
        "Write a model that has learned its structure with what the structure keeps alone: Gaudi-GBLR becomes GBLR.",
        ("structmat harden learned -o small",),
    ),
    "quantize": Entry(
        "tools:quantize",
        "Write a model with its weights in integers of 8 or 4 bits, which is loaded like any other.",
        ("structmat quantize small -o smaller", "structmat quantize small -o smallest --to int4"),
    ),
    "export": Entry(
        "export:export",
        "Write a model for a runtime outside of PyTorch, such as onnxruntime, once it is checked to compute the same.",
        (
            "structmat export small -o small.onnx",
            "structmat export small -o small.onnx --dtype float16 --overwrite",
            "structmat export small -o small.pte --to executorch --int8",
        ),
    ),
    "import-blast": Entry(
        "tools:import_blast",
        "Convert a Llama that the authors of BLAST compressed.",
        ("structmat import-blast blast-llama -o small",),
    ),
    "demo": Entry(
        "demo:demo",
        "Train a small Vision Transformer on digits and compress it with every structure.",
        ("structmat demo --quick", "structmat demo --formats blast --formats low_rank --keep 0.3 --seeds 3"),
    ),
}
"""Every command by name. Their modules are imported when they run, so the texts of the list stand here."""


class Program(Commands):
    """The commands of the program."""

    entries = COMMANDS


app = typer.Typer(
    cls=Program,
    help="Structured matrices for efficient deep learning: compress a network, retrain it, see what it costs.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"structmat {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
    debug: DebugOption = False,
) -> None:
    """The options before the name of a command."""


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: The words after ``structmat``.

    Returns:
        The exit status, as ``main`` says.
    """
    told: dict[str, Any] = {}
    commands: Any = typer.main.get_command(app)
    try:
        with show.plain_warnings():
            status = commands.main(list(arguments), prog_name="structmat", standalone_mode=False, obj=told)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except Exception as error:
        if isinstance(error, getattr(sys.modules.get("structmat._ranks"), "AbandonedError", ())):
            return 1  # another process tells
        line = explained(error)
        if line is None:
            show.error(REPORT)
        if line is None or told.get("debug"):
            raise
        show.error(line + hint(line, told.get("loose", {})))
        return getattr(error, "exit_code", 1)
    if status == 130:
        show.error("interrupted")
    return status if isinstance(status, int) else 0


def hint(line: str, loose: dict[str, str]) -> str:
    """A remedy where an error names a word that was meant as a further value of an option.

    Args:
        line: The error.
        loose: Such words, and how they are spelled as values.

    Returns:
        What to add to the line; mostly nothing.
    """
    if not any(re.search(rf"(?<![\w./-]){re.escape(word)}(?!\w)", line) for word in loose):
        return ""
    return f"; an option is repeated for each of its values: {' '.join(loose.values())}"
