"""Data for calibration, training and evaluation: texts, tokens, and labelled texts and images."""

from structmat.data.labelled import Images, LabelledTexts, read_images, read_labelled_texts
from structmat.data.texts import read_texts
from structmat.data.tokens import token_batches, token_rows

__all__ = [
    "Images",
    "LabelledTexts",
    "read_images",
    "read_labelled_texts",
    "read_texts",
    "token_batches",
    "token_rows",
]
