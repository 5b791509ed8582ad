"""What ``structmat compress`` and ``structmat run`` do, in Python."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints


def compress_pretrained(
    model: str | os.PathLike[str], out: str | os.PathLike[str], *, overwrite: bool = False, **options: Any
) -> dict[str, Any]:
    """Compress a pretrained model of transformers, and write it into a folder: ``structmat compress`` as a function.

    It does what the command does, with the same names of options, and says the same on standard error. The folder
    appears when it is complete; a call that was interrupted resumes when it is made again.

    Args:
        model: The folder with the model, or its name on the Hugging Face Hub.
        out: The folder to write.
        overwrite: Whether to replace a result of structmat that is there.
        **options: The options of the command, with ``_`` for ``-``: ``keep``, ``keep_total``, ``format``, ``blocks``,
            ``layers``, ``exclude``, ``rules``, ``skip_misfits`` and ``plan`` (a file) for the plan; ``calibrate``,
            ``samples``, ``length``, ``batch_size``, ``packed``, ``split``, ``separator`` and ``column`` for the data;
            ``refine``, ``refine_steps``, ``refine_rate``, ``effort``, ``method``, ``learn``, ``uniform``,
            ``two_sided``, ``quantize`` and ``stream`` for the fits; ``dtype`` and ``device``; ``push_to_hub`` and
            ``private`` for the upload; ``report_to`` for trackers. An option that is repeated on the command line is a
            list.

    Returns:
        The record, as in ``structmat.json`` in the folder: the options, the errors of the layers, the numbers of
        parameters, and what was measured before and after.

    Raises:
        TypeError: If there is no such option.
        ValueError: If an option has a value that it cannot have.
        FileNotFoundError: If the model or the data is not there.

    Example:
        >>> record = compress_pretrained("MODEL", "small", keep=0.8, calibrate="texts/*.txt")  # doctest: +SKIP
        >>> record["measured"], record["measured_before"], record["measured_after"]  # doctest: +SKIP
        ('perplexity', 3.87, 5.1)
    """
    command = importlib.import_module("structmat.cli.compress")
    kinds = {
        name: kind
        for name, kind in get_type_hints(command.Compression).items()
        if dataclasses.is_dataclass(kind) and isinstance(kind, type)
    }
    left = {name: _plain(value) for name, value in options.items()}
    groups = {name: _group(kind, left) for name, kind in kinds.items()}
    if left:
        known = sorted(field.name for kind in kinds.values() for field in dataclasses.fields(kind))
        raise TypeError(f"expected options among {', '.join(known)}, got {', '.join(left)}")
    target = importlib.import_module("structmat.cli.options").Target(Path(out), overwrite)
    return command.Compression(os.fspath(model), **groups).run(target)


def run_recipe(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run the steps of a recipe: ``structmat run`` as a function.

    Steps that are finished are not run again, and one that was interrupted resumes.

    Args:
        recipe: The file with the recipe, the name of one (``"quick"``, ``"default"``, ``"best"``), or what the file
            would hold: ``model``, ``seed`` and ``steps``.
        out: The folder for what all steps write.
        model: The model in place of the one that the recipe names; None for that one.
        overwrite: Whether to replace the results of steps whose options or files changed.

    Returns:
        The record of the run, as in ``structmat.json`` in the folder.

    Raises:
        FileNotFoundError: If the recipe, the model or the data is not there.
        ValueError: If the recipe has a step, an option or a value that there is not.

    Example:
        >>> step = {"compress": {"keep": 0.8, "calibrate": "texts/*.txt"}}
        >>> record = run_recipe({"model": "MODEL", "steps": [step]}, "out")  # doctest: +SKIP
        >>> record["steps"]["compress"]["finished"]  # doctest: +SKIP
        True
    """
    given = recipe
    if not isinstance(given, Mapping):
        given = importlib.import_module("structmat.cli.recipe").read_recipe(os.fspath(given))
    run = importlib.import_module("structmat.cli.run").Run
    return run.of(given, None if model is None else os.fspath(model), Path(out), overwrite=overwrite).go()


def _plain(value: Any) -> Any:
    """The value of an option as the command line has it: lists are tuples."""
    return tuple(value) if isinstance(value, list) else value


def _group(kind: type[Any], options: dict[str, Any]) -> Any:
    """A set of options, whose values are taken out of those given."""
    given = {field.name: options.pop(field.name) for field in dataclasses.fields(kind) if field.name in options}
    repeated = {field.name for field in dataclasses.fields(kind) if isinstance(field.default, tuple)}
    for name in given:
        if name in repeated and isinstance(given[name], str):
            given[name] = (given[name],)
    if "blocks" in given and not isinstance(given["blocks"], str):
        blocks = given["blocks"]
        given["blocks"] = "x".join(map(str, blocks)) if isinstance(blocks, tuple) else str(blocks)
    if isinstance(given.get("plan"), (str, os.PathLike)):
        given["plan"] = Path(given["plan"])
    return kind(**given)
