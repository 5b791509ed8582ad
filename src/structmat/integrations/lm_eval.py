"""Tasks of EleutherAI's ``lm-eval`` on a model in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from structmat.integrations import doors

_lm_eval = doors.checked_module("lm_eval")
_huggingface = doors.checked_module("lm_eval.models.huggingface")
_tasks = doors.checked_module("lm_eval.tasks")


def lm_eval_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: str | os.PathLike[str] | None = None,
    limit: int | float | None = None,
    batch_size: int = 8,
    length: int | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a causal language model on tasks of ``lm-eval``.

    Args:
        model: A model of transformers, structured or not.
        tokenizer: The tokenizer of the model.
        tasks: The names of tasks, such as ``"arc_easy"``, or of groups of tasks; none for all of ``include_path``.
        include_path: A folder with the YAML files of your own tasks, or one such file; then only these are known. None
            for the tasks of the package, most of which load their data from the Hub.
        limit: The number of examples per task, or their share where it is below 1; None for all.
        batch_size: The number of examples that are scored together.
        length: The number of tokens that the model sees at once; None for the number in its configuration.

    Returns:
        The figures of each task by ``"metric,filter"``, as ``lm-eval`` names them.

    Raises:
        ValueError: If no task is given, or one is unknown.
    """
    if isinstance(tasks, str) or (not tasks and include_path is None):
        raise ValueError(f"expected a list of names of tasks, got {tasks!r}")
    path = None if include_path is None else Path(include_path)
    folder = path.parent if path is not None and path.is_file() else path
    manager = _tasks.TaskManager(include_path=folder and str(folder), include_defaults=path is None)
    if path is not None and not tasks:
        tasks = names_in(path) if path.is_file() else sorted(manager.all_tasks)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        known = sorted(manager.all_tasks)
        shown = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        raise ValueError(f"expected tasks that lm-eval knows, got {unknown}; there are: {shown or 'none'}")
    training = model.training
    try:
        results = _lm_eval.simple_evaluate(
            model=_huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=length),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
        )
    finally:
        model.train(training)
    return {name: dict(figures) for name, figures in results["results"].items()}


def names_in(file: Path) -> list[str]:
    """The names of the tasks, or the group of tasks, that a YAML file of lm-eval defines.

    Args:
        file: The file.

    Returns:
        The names.

    Raises:
        ValueError: If there is none.
    """
    names = re.findall(r"^(?:task|group):[ \t]*([\w.-]+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    if not names:
        raise ValueError(
            f"expected a task of lm-eval as YAML, got {str(file)!r}, which has no line such as 'task: name'"
        )
    return names
