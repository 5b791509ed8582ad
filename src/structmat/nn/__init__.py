"""Layers whose weights are structured matrices."""

from structmat.nn.conv import StructuredConv2d, unfolded
from structmat.nn.linear import StructuredLinear, StructuredModule
from structmat.nn.weight import ReadOnlyWeight

__all__ = ["ReadOnlyWeight", "StructuredConv2d", "StructuredLinear", "StructuredModule", "unfolded"]
