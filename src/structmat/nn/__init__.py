"""Layers whose weights are structured matrices."""

from structmat.nn.linear import StructuredConv2d, StructuredLinear, StructuredModule
from structmat.nn.sites import DENSE_KINDS, DenseKind, Site, dense_weight, find_sites, put_module

__all__ = [
    "DENSE_KINDS",
    "DenseKind",
    "Site",
    "StructuredConv2d",
    "StructuredLinear",
    "StructuredModule",
    "dense_weight",
    "find_sites",
    "put_module",
]
