"""The model card of a folder that a command wrote: what became of which layers, what that costs, and how good it is."""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from structmat._files import write_atomically
from structmat._names import alike
from structmat._tables import markdown_table, share
from structmat.cli import models
from structmat.cli.options import unrooted
from structmat.cli.show import count, megabytes, root_mean_square, warn
from structmat.evaluate.held_out import UNITS
from structmat.inspect.reports import report
from structmat.plan import Plan, plan_of

CARD = "README.md"
"""The file that the Hub shows."""

MARKER = (
    "<!-- structmat wrote this card and replaces it with the model. Remove this line to keep a card of your own. -->"
)
"""The line that tells a card of this module from one that a user wrote."""

PIPELINES = {
    "causal-lm": "text-generation",
    "sequence-classification": "text-classification",
    "image-classification": "image-classification",
}
"""The name of each task on the Hub."""

PROCESSORS = {"tokenizer_config.json": "AutoTokenizer", "preprocessor_config.json": "AutoImageProcessor"}
"""The class that loads what makes a model's inputs, by the file that it needs."""

FIGURES = {
    "eval_perplexity": "perplexity",
    "eval_word_perplexity": "perplexity per word",
    "eval_bits_per_byte": "bits per byte",
    "eval_accuracy": "accuracy",
    "eval_loss": "loss",
}
"""What a training measures, in the order of a card; the first that there is goes into the metadata."""

LICENCE = ("license", "license_name", "license_link")
"""The fields of the metadata that a card takes over from that of the model before."""


@dataclass(frozen=True)
class Figure:
    """A figure that was measured on what is held out.

    Attributes:
        name: What was measured.
        before: The value of the model before; None where that was not measured.
        after: The value of the model in the folder.
    """

    name: str
    before: float | None
    after: float


def write_card(folder: Path, record: Mapping[str, Any], there: Path) -> None:
    """Write the card of a model into its folder; a card that a user wrote by hand stays.

    Args:
        folder: The folder of the model, which is complete but for the card and the record.
        record: The record that is written into it.
        there: The folder that is at the place of the output until now, which may hold a user's card.
    """
    mine = next((path for path in (folder / CARD, there / CARD) if is_by_hand(path)), None)
    if mine is None:
        text = card_text(folder, record)
        write_atomically(folder / CARD, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    elif mine.parent != folder:
        write_atomically(folder / CARD, lambda temporary: shutil.copyfile(mine, temporary))


def is_by_hand(card: Path) -> bool:
    """Whether there is a card without the line that says that it was written here."""
    return card.is_file() and MARKER.encode() not in card.read_bytes()


def card_text(folder: Path, record: Mapping[str, Any]) -> str:
    """The text of a card.

    Args:
        folder: The folder of the model.
        record: Its record.

    Returns:
        The metadata and the sections.
    """
    model = models.skeleton(str(folder))
    tasks = importlib.import_module("structmat.integrations.transformers.tasks")
    task = tasks.known_task(model)
    made, found = plan_of(model), figures(record)
    loader = tasks.TASKS[task].loader.__name__ if task else type(model).__name__
    title = f"{record['origin']}, {', '.join(labels(made)) or 'dense'}"
    sections = [
        f"# {title}",
        MARKER,
        introduction(record, made),
        *layer_section(record, made),
        *size_section(folder, record, model),
        *quality_section(record, found),
        *how_section(record),
        *loading_section(folder, loader, structured=bool(made)),
    ]
    data = metadata(record, title, labels(made), PIPELINES.get(task or ""), found)
    hub = importlib.import_module("huggingface_hub")
    return str(hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def labels(made: Plan) -> list[str]:
    """The names of the formats, each once."""
    return sorted({format.kind.split(",")[0] for format in made.values()})


def metadata(
    record: Mapping[str, Any], title: str, formats: Sequence[str], pipeline: str | None, found: Sequence[Figure]
) -> Any:
    """The metadata of a card.

    Args:
        record: The record of the folder.
        title: The title of the card.
        formats: The names of the formats.
        pipeline: The task as the Hub names it; None where it is not known.
        found: The figures, of which the first one is named.

    Returns:
        A ``ModelCardData``.
    """
    hub = importlib.import_module("huggingface_hub")
    before, base = base_card(str(record["options"]["model"]))
    results = None
    if found:
        source = source_of(record)
        results = hub.EvalResult(
            task_type=pipeline or "other",
            dataset_type=re.sub(r"\[[^]]*\]$", "", source),
            dataset_name=f"rows of {source} that were held out",
            metric_type=found[0].name.replace(" ", "_"),
            metric_name=found[0].name,
            metric_value=round(found[0].after, 6),
        )
    return hub.ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag=pipeline,
        tags=["structmat", *(re.sub(r"\W+", "-", name.lower()) for name in formats)],
        model_name=title,
        eval_results=None if results is None else [results],
        **{name: before[name] for name in LICENCE if isinstance(before.get(name), str)},
    )


def base_card(model: str) -> tuple[dict[str, Any], str | None]:
    """The metadata of the card of the model that a command began with, and its base on the Hub.

    Args:
        model: A folder, or a name on the Hub.

    Returns:
        The metadata, empty where there is no card, or none that can be read, of which the user is warned; and the name
        on the Hub, for a folder that from a card which was written here; None where it is not known.
    """
    hub = importlib.import_module("huggingface_hub")
    is_folder = Path(model).is_dir()
    found: dict[str, Any] = {}
    ours = False
    try:
        path = models.file_of(model, CARD)
        text = "" if path is None else path.read_text(encoding="utf-8-sig")
        ours = MARKER in text
        found = hub.ModelCard(text, ignore_metadata_errors=True).data.to_dict() if text.startswith("---") else {}
    except (OSError, ValueError, importlib.import_module("yaml").YAMLError) as error:
        warn(f"the new card names no licence, since that of {model!r} cannot be read: {' '.join(str(error).split())}")
    base = (found.get("base_model") if ours else None) if is_folder else model
    return found, base if isinstance(base, str) else None


def figures(record: Mapping[str, Any]) -> list[Figure]:
    """What was measured, the figure that matters most first."""
    if "measured" in record:
        name, before = record["measured"], record["measured_before"]
        return [Figure(name, None if name == UNITS[-1] else before, record["measured_after"])]
    found = record.get("figures", {})
    known = [(name, text) for name, text in FIGURES.items() if name in found]
    return [Figure(text, found.get(f"{name}_before"), found[name]) for name, text in known]


def source_of(record: Mapping[str, Any]) -> str:
    """The data of which rows are held out, as the user named it."""
    options = record["options"]
    return unrooted(next(options[name] for name in ("eval", "data", "calibrate") if options.get(name) is not None))


def introduction(record: Mapping[str, Any], made: Plan) -> str:
    """What the model is, in a few sentences."""
    options, origin = record["options"], f"`{record['origin']}`"
    version = record["versions"]["structmat"]
    first = f"All layers of this model, which was made from {origin} with structmat {version}, are dense."
    if made:
        first = (
            f"The weights of {len(made)} layers of {origin} are structured matrices here, which have fewer parameters "
            f"and need fewer multiplications than dense ones. The model was made with structmat {version}."
        )
    return " ".join((first, *_steps(record["command"], options, record)))


def _steps(command: str, options: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[str]:
    """What a command did, as sentences."""
    if command == "compress" and options.get("calibrate") is not None:
        yield (
            f"The matrices were fitted so that the outputs of the layers on `{unrooted(options['calibrate'])}` change "
            "as little as possible. The other layers keep the weights of the pretrained model."
        )
    elif command == "compress":
        yield "The matrices were fitted to the pretrained weights, without data. The other layers keep theirs."
    elif command == "retrain":
        teacher = options.get("teacher")
        taught = "" if teacher is None else f", with `{unrooted(teacher)}` as the teacher"
        yield f"It was trained further on `{unrooted(options['data'])}`{taught}."
    elif command == "harden":
        yield "The structure that its layers had learned is fixed."
    elif command == "densify":
        yield f"It was saved after the structured matrices of {record['layers']} layers had been multiplied out."
    integers = options.get("to") if command == "quantize" else record.get("integers")
    if integers is not None:
        yield f"The weights of its linear layers are stored in {integers}."


def layer_section(record: Mapping[str, Any], made: Plan) -> Iterator[str]:
    """What the layers are, those of one kind in one row."""
    rows = [
        (f"`{name}`", str(len(members)), made[members[0]].kind, _keeps(made, members), *_errors(record, members))
        for name, members in alike((name, format.kind) for name, format in made.items()).items()
    ]
    skipped = record.get("skipped", {})
    rows += [
        (f"`{name}`", str(len(members)), f"dense: {skipped[members[0]]}", "", "", "")
        for name, members in alike(skipped.items()).items()
    ]
    if not rows:
        return
    yield "## Layers"
    head = ("layers", "number", "format", "share of the parameters kept", "output error", "weight error")
    columns = [k for k in range(len(head)) if k < 4 or any(row[k] for row in rows)]
    yield markdown_table([head[k] for k in columns], [[row[k] for k in columns] for row in rows], right=columns[3:])
    if len(columns) > 4:
        yield "Errors are relative to the layer before, and are root mean squares over the layers of a row."


def _keeps(made: Plan, names: Sequence[str]) -> str:
    """The shares that layers keep of their parameters; empty where that is not known yet."""
    if any(made[name].counted_by for name in names):
        return ""
    keeps = sorted(made[name].keep for name in names)
    least, most = f"{keeps[0]:.2f}", f"{keeps[-1]:.2f}"
    return least if least == most else f"{least} to {most}"


def _errors(record: Mapping[str, Any], names: Sequence[str]) -> tuple[str, str]:
    """The errors of the outputs and of the weights of some layers, where the command found them."""
    layers = record.get("layers")
    known = layers if isinstance(layers, Mapping) else {}
    facts = [fact for name in names if isinstance(fact := known.get(name), Mapping)]
    if not facts:  # a change of the matrix, which hardening and rounding tell
        changes = [float(known[name]) for name in names if name in known]
        return "", f"{root_mean_square(changes):.1e}" if changes else ""
    outputs = [fact["output_error"] for fact in facts if fact["output_error"] is not None]
    weights = f"{root_mean_square([fact['error'] for fact in facts]):.3f}"
    return f"{root_mean_square(outputs):.3f}" if outputs else "", weights


def size_section(folder: Path, record: Mapping[str, Any], model: Any) -> Iterator[str]:
    """The number of parameters and bytes of the model, and of the same model with dense layers."""
    dtype = getattr(model.config, "dtype", None) or torch.float32
    name, size = str(dtype).removeprefix("torch."), torch.empty(0, dtype=dtype).element_size()
    parameters, dense = record.get("parameters"), record.get("dense_parameters")
    if parameters is None and not any(format.counted_by for format in plan_of(model).values()):
        found = report(model)
        parameters, dense = found.parameters, found.dense_parameters
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    rows = []
    if parameters is not None and dense is not None:
        rows += [("parameters", count(dense), count(parameters), share(parameters, dense))]
        rows += [(f"weights, dense in {name}", megabytes(dense * size), megabytes(stored), share(stored, dense * size))]
    else:
        rows += [("weights", "", megabytes(stored), "")]
    yield "## Size"
    yield markdown_table(("", "dense", "here", "share"), rows, right=(1, 2, 3))


def quality_section(record: Mapping[str, Any], found: Sequence[Figure]) -> Iterator[str]:
    """What was measured on what is held out."""
    if not found:
        return
    yield "## Quality"
    rows = [(one.name, "" if one.before is None else f"{one.before:.4g}", f"{one.after:.4g}") for one in found]
    yield markdown_table(("", "before", "after"), rows, right=(1, 2))
    own = record["options"].get("eval") is not None
    which = f"`{source_of(record)}`" if own else f"rows of `{source_of(record)}` that were held out"
    yield f"The figures were measured on {which}, before and after the last of the commands below."


def how_section(record: Mapping[str, Any]) -> Iterator[str]:
    """The commands that made the model."""
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    yield "## How it was made"
    yield "```sh\n" + "\n".join(record["commands"]) + "\n```"
    yield f"`structmat.json` has the figures of every layer. The versions were {versions}."


def loading_section(folder: Path, loader: str, *, structured: bool) -> Iterator[str]:
    """How to load the model."""
    processors = [name for file, name in PROCESSORS.items() if (folder / file).is_file()]
    lines = [f"from transformers import {', '.join(sorted((loader, *processors)))}", ""]
    yield "## How to load it"
    if structured:
        yield (
            "It needs `pip install structmat` and no remote code. A program imports `structmat` before it loads the "
            "model, so that transformers knows the structured layers."
        )
        lines.insert(0, "import structmat  # which registers the layers")
    else:
        yield "It is an ordinary model of transformers."
    lines += [f'model = {loader}.from_pretrained("REPO")  # or the folder']
    lines += [f'{_variable(name)} = {name}.from_pretrained("REPO")' for name in processors]
    yield "```python\n" + "\n".join(lines) + "\n```"


def _variable(processor: str) -> str:
    return "tokenizer" if processor == "AutoTokenizer" else "processor"
