"""Labelled texts and images, for classification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from structmat.data.sources import Source, choose_column
from structmat.data.texts import STRINGS, TEXT_COLUMNS

LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label")
IMAGE_COLUMNS = ("image", "img", "pixel_values")


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and their classes.

    Attributes:
        texts: The texts.
        labels: The class of each text, counted from 0.
        classes: The names of the classes, where the source has them.
    """

    texts: list[str]
    labels: list[int]
    classes: tuple[str, ...] = ()

    def examples(self, tokenizer: Any, *, length: int) -> list[dict[str, Any]]:
        """The texts as a model takes them.

        Args:
            tokenizer: A tokenizer of transformers; it adds its own special tokens.
            length: The number of tokens at which a text is cut.

        Returns:
            The tokens of each text as the tokenizer returns them, with the class under ``"labels"``; a
            ``DataCollatorWithPadding`` makes batches of them.
        """
        encoded = (tokenizer(text, truncation=True, max_length=length) for text in self.texts)
        return [{**dict(one), "labels": label} for one, label in zip(encoded, self.labels, strict=True)]


def read_labelled_texts(
    source: str, *, split: str | None = None, column: str | None = None, label_column: str | None = None
) -> LabelledTexts:
    """Read texts with classes from a table, a folder or the Hub, with the package ``datasets``.

    Args:
        source: A table, a folder or the name of a Hub data set, as in ``read_texts``; a slice picks entries.
        split: The split, of a source with several.
        column: The column of the texts; None for one with a usual name, or the only one that holds strings.
        label_column: The column of the classes, which are integers from 0 or strings; None for one with a usual name.

    Returns:
        The texts with their classes. Classes that are strings are numbered in alphabetical order, so give every split
        the same ones.
    """
    parsed = Source.parse(source)
    table = parsed.table(split)
    label_column = choose_column(table.column_names, label_column, LABEL_COLUMNS, f"classes of {parsed.name!r}")
    strings = [
        name
        for name, feature in table.features.items()
        if getattr(feature, "dtype", None) in STRINGS and name != label_column
    ]
    column = choose_column(strings, column, TEXT_COLUMNS, f"text of {parsed.name!r}")
    labels, classes = _numbered(table, label_column, parsed.name)
    return LabelledTexts(list(table[column]), labels, classes)


class Images(Dataset[dict[str, Any]]):
    """Images as a model takes them: ``{"pixel_values": (channels, height, width), "labels": int}``.

    Each image is read, changed and processed when it is asked for, so that data loader workers share the work.

    Args:
        table: A ``datasets.Dataset`` with a column of images.
        processor: An image processor of transformers.
        column: The column of the images.
        labels: The class of each image.
        classes: The names of the classes.
        augment: A function that changes a ``PIL`` image before the processor gets it; None for no change.
    """

    def __init__(
        self,
        table: Any,
        processor: Any,
        column: str,
        labels: list[int],
        classes: tuple[str, ...] = (),
        augment: Callable[[Any], Any] | None = None,
    ) -> None:
        self.table, self.processor, self.column = table, processor, column
        self.labels, self.classes, self.augment = labels, classes, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.table[index][self.column].convert("RGB")
        if self.augment is not None:
            image = self.augment(image)
        pixels: Tensor = torch.as_tensor(self.processor(images=image, return_tensors="pt")["pixel_values"])[0]
        return {"pixel_values": pixels, "labels": self.labels[index]}


def read_images(
    source: str,
    processor: Any,
    *,
    split: str | None = None,
    column: str | None = None,
    label_column: str | None = None,
    augment: Callable[[Any], Any] | None = None,
) -> Images:
    """Read images with classes from a folder or the Hub, with the package ``datasets``.

    Args:
        source: A folder with one folder of images per class (or ``train/CLASS/…`` and so on), or the name of a Hub
            data set; a slice picks entries.
        processor: An image processor of transformers, called as ``processor(images=…, return_tensors="pt")``.
        split: The split, of a source with several.
        column: The column of the images; None for the only one.
        label_column: The column of the classes; None for one with a usual name.
        augment: A function that changes a ``PIL`` image before the processor gets it, for training.

    Returns:
        A data set for a ``DataLoader``.
    """
    parsed = Source.parse(source)
    table = parsed.table(split)
    images = [name for name, feature in table.features.items() if type(feature).__name__ == "Image"]
    column = choose_column(images, column, IMAGE_COLUMNS, f"images of {parsed.name!r}")
    others = [name for name in table.column_names if name not in images]
    label_column = choose_column(others, label_column, LABEL_COLUMNS, f"classes of {parsed.name!r}")
    labels, classes = _numbered(table, label_column, parsed.name)
    return Images(table, processor, column, labels, classes, augment)


def _numbered(table: Any, column: str, name: str) -> tuple[list[int], tuple[str, ...]]:
    """The classes in a column as integers, and their names."""
    values, feature = list(table[column]), table.features[column]
    if hasattr(feature, "names"):
        return values, tuple(feature.names)
    if all(isinstance(value, str) for value in values):  # `class_encode_column` would write all images anew
        classes = sorted(set(values))
        return [classes.index(value) for value in values], tuple(classes)
    if not all(isinstance(value, int) and value >= 0 for value in values):
        bad = next(value for value in values if not (isinstance(value, int) and value >= 0))
        raise ValueError(f"expected classes from 0 or names of classes in column {column!r} of {name!r}, got {bad!r}")
    return values, ()
