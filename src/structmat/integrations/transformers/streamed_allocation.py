"""One budget for a transformers checkpoint that does not fit into memory, which is read block by block."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from structmat.compress.allocate import Allocation, AllocationSettings, allocated, selectors, some_batches
from structmat.compress.backward import NetworkInBlocks
from structmat.compress.store import FitStore
from structmat.compress.tasks import WorkList
from structmat.formats import LowRank
from structmat.integrations.transformers.checkpoint_files import CheckpointReader
from structmat.integrations.transformers.skeletons import skeleton
from structmat.integrations.transformers.streaming import NO_CHAIN, DiskBlocks
from structmat.network.calls import evaluating, undisturbed
from structmat.network.chain import list_of_blocks
from structmat.network.sites import Site, find_sites
from structmat.plan import Selector


def allocate_checkpoint(
    source: str | os.PathLike[str],
    batches: Iterable[Any],
    settings: AllocationSettings | None = None,
    *,
    layers: Selector | Iterable[Selector] | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Allocation:
    """Share one budget among the layers of a checkpoint, of which one block at a time is in memory.

    The result is that of ``allocate`` on the loaded model and as much data: the gradients go back through the blocks,
    one by one. What each block reads waits in memory meanwhile, for about 8,192 tokens, or twice as many as the widest
    layer has inputs.

    Args:
        source: The folder of the dense checkpoint, as for ``compress_checkpoint``.
        batches: The calibration data, as for ``allocate``.
        settings: How the budget is shared; None for the defaults.
        layers: Selectors of the layers that share the budget, all of them within the blocks; None for all there.
        cache: The folder for finished fits and findings; None for none.

    Returns:
        The plan, for ``compress_checkpoint``.

    Raises:
        FileNotFoundError: If the source lacks a file.
        ValueError: If the model is no chain of blocks, or for what ``allocate`` refuses.
    """
    settings = settings or AllocationSettings()
    given = some_batches(batches)
    model = skeleton(source)
    files = CheckpointReader(source, model)
    names = {name: site.names for name, site in find_sites(model).items() if not site.problem}
    blocks = list_of_blocks(model, names)
    if not blocks:
        raise ValueError(NO_CHAIN)

    def opened(sites: Mapping[str, Site]) -> DiskBlocks:
        plan = {name: LowRank(*site.matrix.shape, rank=1) for name, site in sites.items()}
        return DiskBlocks(model, WorkList.of(model, plan, None), files, batch=given[0])

    network = NetworkInBlocks(model, given, opened, _identity(files))
    store = None if cache is None else FitStore(cache)
    with undisturbed(), evaluating(model):
        return allocated(network, selectors(layers, blocks), settings, store)


def _identity(files: CheckpointReader) -> str:
    """A hash of the names, sizes and dates of the files, since reading all of them would take long."""
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted({*files.paths.values()})]
    return FitStore.digest(repr(facts))
