"""Layers whose weights are structured matrices."""

from structmat.nn.linear import StructuredConv2d, StructuredLinear, StructuredModule, unfolded
from structmat.nn.sites import (
    DENSE_KINDS,
    DenseKind,
    Site,
    dense_weight,
    find_sites,
    put_module,
    unseen_weights,
)
from structmat.nn.weight import ReadOnlyWeight

__all__ = [
    "DENSE_KINDS",
    "DenseKind",
    "ReadOnlyWeight",
    "Site",
    "StructuredConv2d",
    "StructuredLinear",
    "StructuredModule",
    "dense_weight",
    "find_sites",
    "put_module",
    "unfolded",
    "unseen_weights",
]
