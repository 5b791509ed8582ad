"""Looking at a network: its layers, its chain of blocks, what flows through it, and surgery on it."""

from structmat.network.adapters import Adapter, register_adapter
from structmat.network.chain import Chain, find_chain
from structmat.network.sites import Site, find_sites, structured_layers
from structmat.network.staying import unseen_weights, what_stays
from structmat.network.surgery import apply_plan_, densify_, harden_, put_fits_, tile_

__all__ = [
    "Adapter",
    "Chain",
    "Site",
    "apply_plan_",
    "densify_",
    "find_chain",
    "find_sites",
    "harden_",
    "put_fits_",
    "register_adapter",
    "structured_layers",
    "tile_",
    "unseen_weights",
    "what_stays",
]
