"""The processes of one run on ``torch.distributed``: who does what, and how results come together.

The one owner of ranks. Every process runs the same program on the same data, calls the functions here in the same
order, and holds the same results after each; what lies between two calls is done by one process each. Sums over data
have one order for any number of processes: batches belong to ``SHARES`` shares, the shares are added in a fixed tree,
and each process owns a range of them.
"""

from structmat._ranks.group import SHARES, AbandonedError, Ranks, current, launched, together
from structmat._ranks.sums import Sums

__all__ = ["SHARES", "AbandonedError", "Ranks", "Sums", "current", "launched", "together"]
