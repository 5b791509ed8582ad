"""Looking at what a network has become: the report, numbers of a learned structure, and pictures."""

from structmat.inspect.learned import StructureNumbers, effective_rank, gini, map_similarity, structure_numbers
from structmat.inspect.plots import budget_shares, couplings, heat_map, structure_maps, trade_off
from structmat.inspect.reports import Report, Row, report

__all__ = [
    "Report",
    "Row",
    "StructureNumbers",
    "budget_shares",
    "couplings",
    "effective_rank",
    "gini",
    "heat_map",
    "map_similarity",
    "report",
    "structure_maps",
    "structure_numbers",
    "trade_off",
]
