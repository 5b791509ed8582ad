"""The commands together, and what becomes of their errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from safetensors import SafetensorError

from structmat._version import __version__
from structmat.cli import show
from structmat.cli.bench import bench
from structmat.cli.compress import compress
from structmat.cli.demo import demo
from structmat.cli.evaluate import evaluate
from structmat.cli.plan import plan
from structmat.cli.report import report
from structmat.cli.retrain import retrain
from structmat.cli.tools import densify, generate, harden, import_blast

EXPLAINED = (ValueError, TypeError, ImportError, OSError, ArithmeticError, RuntimeError, SafetensorError)
"""Errors that a user can cause; they are shown as one line. Others are faults of the program, with a traceback."""

EXAMPLES: dict[Any, tuple[str, ...]] = {
    plan: (
        "structmat plan stories260K",
        "structmat plan meta-llama/Llama-3.2-1B --keep 0.6 --exclude '.*layers.0.*' -o plan.json",
        "structmat plan gpt2 --format low_rank --rule '.*mlp.*=blast:keep=0.4:blocks=16x16'",
    ),
    compress: (
        "structmat compress stories260K -o small --blocks 4 --calibrate 'stories.txt.xz[:500]'",
        "structmat compress MODEL -o small --plan plan.json --calibrate texts.jsonl --refine",
        "structmat compress google/vit-base-patch16-224 -o small --keep 0.5 --calibrate images/",
        "structmat compress MODEL -o learning --format gaudi_gblr --keep 0.6 --calibrate texts.txt --learn",
    ),
    retrain: (
        "structmat retrain small -o better --data 'stories.txt.xz[:2000]' --eval 'stories.txt.xz[-300:]'",
        "structmat retrain small -o better --data texts.txt --teacher MODEL --steps 1000 --set warmup_steps=50",
        "structmat retrain learning -o learned --data texts.txt --set structure_target=0.4 structure_shrinkage=0.1",
    ),
    evaluate: (
        "structmat evaluate small --dense MODEL --data 'stories.txt.xz[-300:]'",
        "structmat evaluate small better --dense MODEL --data texts.txt --tasks arc_easy piqa --json found.json",
        "structmat evaluate small-vit --dense google/vit-base-patch16-224 --data images/",
    ),
    report: (
        "structmat report small",
        "structmat report small --json",
        "structmat report learned --plot pictures",
    ),
    bench: (
        "structmat bench --formats blast low_rank --blocks 4 16 --shapes 4096x4096 4096x11008 --tokens 1 128",
        "structmat bench --formats blast:keep=0.3 --dtypes float32 bfloat16 --backward --optimize",
        "structmat bench MODEL small --prefill 512 --generate 100",
        "structmat bench small",
        "structmat bench --shape llama-7b --formats blast --blocks 16 --device cuda --mode graphs",
    ),
    generate: ("structmat generate small 'Once upon a time' --tokens 100 --seed 1",),
    densify: ("structmat densify small -o plain",),
    harden: ("structmat harden learned -o small",),
    import_blast: ("structmat import-blast blast-llama -o small",),
    demo: ("structmat demo --quick", "structmat demo --formats blast low_rank --keep 0.3 --seeds 3"),
}
"""Every command, and what its help shows."""

app = typer.Typer(
    help="Structured matrices for efficient deep learning: compress a network, retrain it, see what it costs.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"structmat {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; goes anywhere.")] = False,
) -> None:
    """The options before the command; ``run`` takes ``--debug`` away before they are read."""


for command, examples in EXAMPLES.items():
    name = command.__name__.replace("_", "-")
    app.command(name, epilog="\n\n".join(("Examples:", *(f"$ {example}" for example in examples))))(command)


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: The words after ``structmat``.

    Returns:
        The exit status, as ``main`` says.
    """
    words = [word for word in arguments if word != "--debug"]
    debug = len(words) < len(arguments)
    commands: Any = typer.main.get_command(app)
    try:
        status = commands.main(spread(commands, words), prog_name="structmat", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except Exception as error:
        told = explained(error)
        if debug or told is None:
            raise
        show.error(told)
        return getattr(error, "exit_code", 1)
    if status == 130:
        show.error("interrupted")
    return status if isinstance(status, int) else 0


def explained(error: Exception) -> str | None:
    """One line that tells the user about an error; None for one that is no fault of theirs."""
    usage: Any = getattr(error, "format_message", None)  # typer's own, whichever click it brings
    if usage is not None:
        path = getattr(getattr(error, "ctx", None), "command_path", "structmat")
        hint = ", which goes before the options" if usage().startswith("Missing argument") else ""
        return f"{usage().rstrip('.')}{hint}; see {path} --help"
    return " ".join(str(error).split()) or type(error).__name__ if isinstance(error, EXPLAINED) else None


def spread(commands: Any, words: Sequence[str]) -> list[str]:
    """Repeat an option that takes several values before each of them: ``--layers A B`` is ``--layers A --layers B``.

    Args:
        commands: The group of commands.
        words: The command line.

    Returns:
        The words as typer reads them.
    """
    chosen = next((commands.commands[word] for word in words if word in commands.commands), None)
    parameters = [] if chosen is None else chosen.params
    several = {option for parameter in parameters if getattr(parameter, "multiple", False) for option in parameter.opts}
    result: list[str] = []
    option, values = "", 0
    for word in words:
        if word.startswith("-"):
            option, values = (word if word in several else ""), 0
        elif option:
            values += 1
            if values > 1:
                result.append(option)
        result.append(word)
    return result
