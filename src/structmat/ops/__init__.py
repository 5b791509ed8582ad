"""Products with structured matrices: tensors in, tensors out (each file one structure)."""

from structmat.ops.blast import blast_matmul
from structmat.ops.block_diagonal import block_diagonal_matmul
from structmat.ops.block_sparse import block_sparse_matmul
from structmat.ops.gaudi import gaudi_mask
from structmat.ops.gblr import gblr_matmul
from structmat.ops.low_rank import low_rank_matmul
from structmat.ops.monarch import monarch_matmul

__all__ = [
    "blast_matmul",
    "block_diagonal_matmul",
    "block_sparse_matmul",
    "gaudi_mask",
    "gblr_matmul",
    "low_rank_matmul",
    "monarch_matmul",
]
