"""``structmat evaluate``."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils.data import DataLoader

from structmat import _checks
from structmat._tables import print_table
from structmat.cli import models
from structmat.cli.fingerprints import versions
from structmat.cli.models import Placement
from structmat.cli.options import DATA, Options
from structmat.cli.output import SCHEMA, write_json
from structmat.cli.reading import WHAT, Reading, length_for, measured_split
from structmat.cli.show import count, say
from structmat.data import read_images, read_labelled_texts
from structmat.data.sources import Source
from structmat.evaluate import accuracy, perplexity, relative_flops
from structmat.inspect.reports import report

WINDOW = 2048
"""The number of tokens that a model sees at once where neither user nor model says: that of published figures."""

SHOWN = {
    "parameters": count,
    "relative_parameters": lambda value: f"{value:.3f}",
    "relative_flops": lambda value: f"{value:.3f}",
}
"""How the figures that every model has are shown; others get four decimals."""


@dataclass(frozen=True)
class Measurement(Reading):
    """What to measure, and how.

    Attributes:
        data: The data to measure on; None for tasks alone.
        split: The split of the data; None where it has only one.
        tasks: The names of tasks of lm-eval.
        task_path: A folder or a file with the user's tasks; None for those of lm-eval.
        limit: The number of examples of each task, or their share below 1; None for all.
        length: The number of tokens that a language model sees at once.
        stride: The number of tokens by which the window of a language model moves.
        max_tokens: The number of tokens to score; None for all.
        truncate: Whether to score the beginning of each document alone.
        batch_size: The number of rows or images in a batch.
    """

    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help=f"Texts for a language model, texts or images with classes for a classifier: {WHAT}.",
        ),
    ] = None
    split: Annotated[
        str | None, typer.Option(help="The split of the data, where it has several.", rich_help_panel=DATA)
    ] = None
    tasks: Annotated[
        tuple[str, ...],
        typer.Option("--tasks", metavar="TASK", help="A task of lm-eval such as arc_easy, repeated for several tasks."),
    ] = ()
    task_path: Annotated[
        Path | None,
        typer.Option(
            help="A folder with tasks for lm-eval as YAML, or one such file, in place of those that lm-eval brings; "
            "without --tasks, all of them are measured."
        ),
    ] = None
    limit: Annotated[
        float | None, typer.Option(help="The number of examples of each task, or their share where it is below 1.")
    ] = None
    length: Annotated[
        int | None,
        typer.Option(
            help=f"The number of tokens that the model sees at once; by default {WINDOW}, or as many as it takes."
        ),
    ] = None
    stride: Annotated[
        int | None,
        typer.Option(
            help="The number of tokens by which the window advances; by default windows do not overlap, and a smaller "
            "number gives each token more context."
        ),
    ] = None
    max_tokens: Annotated[
        int | None, typer.Option(help="The number of tokens to score, from the first; by default all of them.")
    ] = None
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Score the first --length tokens of each document alone.")
    ] = False
    batch_size: Annotated[int, typer.Option(help="The number of rows or images in a batch.")] = 8

    def __post_init__(self) -> None:
        _checks.positive_int(self.batch_size, "--batch-size")
        if self.data is not None:
            Source.parse(self.data)  # a misspelt path fails before anything is loaded
        if self.data is None and not self.wants_tasks:
            raise ValueError("expected something to measure on, got neither --data nor --tasks")
        if self.task_path is not None and not self.task_path.exists():
            raise FileNotFoundError(f"expected a folder or a file with tasks, got --task-path {str(self.task_path)!r}")

    @property
    def wants_tasks(self) -> bool:
        """Whether tasks of lm-eval are measured."""
        return bool(self.tasks) or self.task_path is not None

    def of(self, model: Any, processor: Any) -> dict[str, float]:
        """Measure one model.

        Args:
            model: A model of transformers.
            processor: The model's tokenizer or image processor.

        Returns:
            The figures by name.

        Raises:
            ValueError: If a class of the data is none of the model's, or tasks do not go with the model.
        """
        tasks = importlib.import_module("structmat.integrations.transformers.tasks")
        task, length = tasks.task_of(model), length_for(model.config, self.length, WINDOW)
        shape = report(model)
        figures: dict[str, float] = {
            "parameters": shape.parameters,
            "relative_parameters": shape.parameters / shape.dense_parameters,
        }
        if task == "causal-lm":
            example: Any = {"input_ids": torch.zeros(1, length, dtype=torch.long, device=model.device)}
            figures["relative_flops"] = relative_flops(model, example).relative
            if self.data is not None:
                figures |= self._perplexity(model, processor, length)
        elif self.data is not None:
            loader = self._examples(task, model, processor, length)
            first = {name: value[:1].to(model.device) for name, value in next(iter(loader)).items() if name != "labels"}
            figures["relative_flops"] = relative_flops(model, first).relative
            figures["accuracy"] = accuracy(model, loader).top1
        if self.wants_tasks:
            if task != "causal-lm":
                raise ValueError(f"expected a causal language model for --tasks, got a {type(model).__name__}")
            figures |= self._tasks(model, processor, length)
        return figures

    def _perplexity(self, model: Any, tokenizer: Any, length: int) -> dict[str, float]:
        texts = self.texts(str(self.data), split=measured_split(str(self.data), self.split), tokenizer=tokenizer)
        sizes = {"length": length, "stride": self.stride, "batch_size": self.batch_size, "max_tokens": self.max_tokens}
        found = perplexity(model, tokenizer, texts, truncate=self.truncate, **sizes)
        say(str(found))
        return {"token_perplexity": found.token, "word_perplexity": found.word, "bits_per_byte": found.bits_per_byte}

    def _examples(self, task: str, model: Any, processor: Any, length: int) -> Any:
        source = str(self.data)
        collate, examples = None, None
        if task == "sequence-classification":
            texts = read_labelled_texts(source, split=self.split)
            examples, classes = texts.examples(processor, length=length), texts.classes
            labels = texts.labels
            collate = models.library().DataCollatorWithPadding(processor)
        else:
            examples = read_images(source, processor, split=self.split)
            labels, classes = examples.labels, examples.classes
        check_classes(model.config, labels, classes)
        return DataLoader(examples, batch_size=self.batch_size, collate_fn=collate)  # pyright: ignore[reportArgumentType]

    def _tasks(self, model: Any, tokenizer: Any, length: int) -> dict[str, float]:
        try:
            integration = importlib.import_module("structmat.integrations.lm_eval")
        except ImportError as error:
            raise ImportError("--tasks needs lm-eval: pip install 'structmat[evaluate]'") from error
        sizes = {"limit": self.limit, "batch_size": self.batch_size, "length": length}
        found = integration.lm_eval_tasks(model, tokenizer, self.tasks, include_path=self.task_path, **sizes)
        return {
            f"{task} {metric.partition(',')[0]}": float(value)
            for task, metrics in found.items()
            for metric, value in metrics.items()
            if "stderr" not in metric and isinstance(value, (int, float)) and "," in metric
        }


def check_classes(config: Any, labels: list[int], classes: tuple[str, ...]) -> None:
    """Check that the classes of the data are those of the model.

    Args:
        config: The configuration of the model.
        labels: The class of each example.
        classes: The names of the classes, where the data has them.

    Raises:
        ValueError: If there are too many, or they have the model's names in another order.
    """
    if max(labels) >= config.num_labels:
        raise ValueError(f"expected classes below the model's {config.num_labels}, got {max(labels)}")
    known = config.label2id or {}
    moved = next((name for k, name in enumerate(classes) if known.get(name, k) != k), None)
    if moved is not None:
        raise ValueError(
            f"expected classes in the order of the model's label2id, but {moved!r} is {classes.index(moved)} in "
            f"the data and {known[moved]} in the model; rename the folders, or write the numbers into the data"
        )


@dataclass(frozen=True)
class Comparison(Options):
    """What the models are compared with, and where the figures go.

    Attributes:
        dense: The models to compare with.
        json_file: The file for the figures; None for none.
    """

    dense: Annotated[
        tuple[str, ...],
        typer.Option("--dense", metavar="MODEL", help="A model to compare with, repeated for several models."),
    ] = ()
    json_file: Annotated[Path | None, typer.Option("--json", help="The file for the figures, as JSON.")] = None


def evaluate(
    model: Annotated[
        list[str],
        typer.Argument(help="The models to measure: folders, or names on the Hugging Face Hub.", metavar="MODEL..."),
    ],
    comparison: Comparison,
    measurement: Measurement,
    placement: Placement,
) -> None:
    """Run ``structmat evaluate``."""
    names = list(dict.fromkeys((*comparison.dense, *model)))
    for name in names:
        models.check_name(name)
    found: dict[str, dict[str, float]] = {}
    for name in names:
        say(name)
        found[name] = measurement.of(models.load(name, placement), models.processor_of(name))
    show_figures(found, comparison.dense)
    file = comparison.json_file
    if file is not None:
        facts = {"schema": SCHEMA, "command": "evaluate", "options": measurement.record(), "versions": versions()}
        write_json(file, {**facts, "models": found})
        say(f"wrote {file}")


def show_figures(found: Mapping[str, Mapping[str, float]], dense: Sequence[str]) -> None:
    """Print the figures, one to a row: the models side by side, each compressed one with its difference.

    Args:
        found: The figures by model.
        dense: The models with the first of which the others are compared; none for no comparison.
    """
    first = found[dense[0]] if dense else {}
    head, columns = ["figure"], list[list[str]]()
    names = list(dict.fromkeys(name for figures in found.values() for name in figures))
    for model, figures in found.items():
        head.append(model)
        columns.append([shown(name, figures.get(name, math.nan)) for name in names])
        if dense and model not in dense:
            head.append("difference")
            columns.append([difference(figures.get(name, math.nan), first.get(name, math.nan)) for name in names])
    rows = [(name.replace("_", " "), *cells) for name, *cells in zip(names, *columns, strict=True)]
    print_table(head, rows, right=range(1, len(head)))


def shown(name: str, value: float) -> str:
    """A figure as the text of a cell."""
    return "" if math.isnan(value) else SHOWN.get(name, "{:.4f}".format)(value)


def difference(value: float, dense: float) -> str:
    """How much a figure differs from that of the dense model, in its unit and in percent."""
    if math.isnan(value) or math.isnan(dense):
        return ""
    change = value - dense
    amount = f"{change:+,.0f}" if abs(dense) >= 10_000 else f"{change:+.4f}"
    return f"{amount} ({change / dense:+.1%})" if dense else amount
