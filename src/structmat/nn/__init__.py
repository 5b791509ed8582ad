"""Layers whose weights are structured matrices."""

from structmat.nn.attention import SplitAttention
from structmat.nn.conv import StructuredConv, StructuredConv1d, StructuredConv2d, unfolded
from structmat.nn.grouped import SplitGroups
from structmat.nn.linear import StructuredLinear, StructuredModule
from structmat.nn.recurrent import SplitRecurrent
from structmat.nn.split import SplitModule
from structmat.nn.transposed import (
    StructuredConvTranspose,
    StructuredConvTranspose1d,
    StructuredConvTranspose2d,
    unfolded_results,
)
from structmat.nn.weight import ReadOnlyWeight

__all__ = [
    "ReadOnlyWeight",
    "SplitAttention",
    "SplitGroups",
    "SplitModule",
    "SplitRecurrent",
    "StructuredConv",
    "StructuredConv1d",
    "StructuredConv2d",
    "StructuredConvTranspose",
    "StructuredConvTranspose1d",
    "StructuredConvTranspose2d",
    "StructuredLinear",
    "StructuredModule",
    "unfolded",
    "unfolded_results",
]
