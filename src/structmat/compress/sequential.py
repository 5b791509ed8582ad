"""Compression in sequence: block by block, each on what the compressed blocks before it give it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn

from structmat._ranks import current
from structmat.compress.block import BlockFits
from structmat.compress.calibration import warn_of_few
from structmat.compress.refinement import Refinement, refined
from structmat.compress.states import Block, Forward, States, count_tokens
from structmat.compress.store import FitStore
from structmat.compress.tasks import FitBar, WorkList, with_error
from structmat.fit import Fit
from structmat.network.calls import call, copied, device_of, evaluating, moved
from structmat.network.chain import Chain, Extras, Relay, find_chain
from structmat.network.masks import BatchMasks, find_masks
from structmat.network.surgery import put_fits_, with_fits

FORWARD_COST = 4
"""About how many forward passes of a block its calibration takes: one dense, and parts of four compressed."""


class BlockReader(Protocol):
    """Where the blocks of a network are."""

    @property
    def chain(self) -> Chain | None:
        """The chain of blocks; None where the network is no chain, so that the whole of it is one block."""
        ...

    def whole(self) -> AbstractContextManager[object]:
        """Make sure that the network can be called as a whole, while the context is entered."""
        ...

    def block(self, name: str) -> AbstractContextManager[nn.Module]:
        """Hold a dense block with its weights in memory, while the context is entered."""
        ...


class BlockSource(BlockReader, Protocol):
    """Where the blocks of a network are, and what becomes of them once they are compressed."""

    def finish(self, name: str, compressed: nn.Module, fits: dict[str, Fit]) -> dict[str, Fit]:
        """Take over a compressed block with the fits of its layers by full name; return what to keep of the fits."""
        ...


class InMemory:
    """The blocks of a network that is in memory as a whole.

    Args:
        model: The dense network, in evaluation mode.
        work: The work list.
        batch: The inputs of one call, by which the chain of blocks is found.
    """

    def __init__(self, model: nn.Module, work: WorkList, batch: Any) -> None:
        self.model = model
        with evaluating(model):
            names = {name: site.names for name, site in work.sites.items()}
            self.chain = find_chain(model, names, moved(batch, device_of(model)))

    def whole(self) -> AbstractContextManager[object]:
        """Do nothing: all of the network is in memory."""
        return nullcontext()

    @contextmanager
    def block(self, name: str) -> Iterator[nn.Module]:
        """Hold a block of the network."""
        yield self.model.get_submodule(name)

    def finish(self, name: str, compressed: nn.Module, fits: dict[str, Fit]) -> dict[str, Fit]:
        """Keep the fits; the compressed block is not needed any more."""
        return fits


class SequentialRun:
    """One run over the blocks of a network, which does not change; one block at a time is worked on, in a copy.

    Where the network is no chain of blocks, the whole of it is one block, and a copy of all of it is in memory.

    Args:
        model: The dense network.
        work: The work list.
        batches: The calibration data.
        blocks: Where the blocks are.
        refinement: How each block is tuned; None for not at all.
        store: Where finished fits are kept; None for nowhere.
    """

    def __init__(
        self,
        model: nn.Module,
        work: WorkList,
        batches: list[Any],
        blocks: BlockSource,
        *,
        refinement: Refinement | None = None,
        store: FitStore | None = None,
    ) -> None:
        self.model, self.work, self.batches, self.blocks = model, work, batches, blocks
        self.refinement, self.store = refinement, store
        self.masks: list[BatchMasks] = []
        self.vectors: dict[str, int] = {}
        self.overhead: dict[str, float] = {}
        self.refining: dict[str, float] = {}
        tokens = sum(count_tokens(batch) for batch in batches)
        passes = 0 if refinement is None else refinement.passes(len(batches))
        for block, names in self._homes().items():
            entries = sum(parameter.numel() for parameter in model.get_submodule(block).parameters())
            for name in names:
                M, N = work.formats[name].shape
                self.overhead[name] = tokens * (FORWARD_COST * entries / len(names) + 2 * N * N)
                self.refining[name] = tokens * passes * M * N

    def _homes(self) -> dict[str, list[str]]:
        """The planned layers of each block, by its name; that of the whole network is empty."""
        chain, homes = self.blocks.chain, dict[str, list[str]]()
        for name in self.work.sites:
            inside = (one for one in (chain.names if chain else ()) if name.startswith(f"{one}."))
            homes.setdefault(next(inside, ""), []).append(name)
        return homes

    @property
    def costs(self) -> dict[str, float]:
        """About how many multiplications the run takes, by the kind of work."""
        fits = sum(self.work.cost(name, aware=True) for name in self.work.sites)
        return {"fits": fits, "passes": sum(self.overhead.values()), "refinement": sum(self.refining.values())}

    def run(self, bar: FitBar) -> dict[str, Fit]:
        """Fit everything.

        Args:
            bar: The progress bar.

        Returns:
            The fits by name.
        """
        planned = list(self.work.sites)
        with evaluating(self.model):
            self.masks = self._find_masks()
            if self.blocks.chain is not None:
                fits = self._run_chain(self.blocks.chain, bar)
            else:
                block = self._block("", self.model, self._inputs(), _call_model)
                block.ends = True
                fits = self._fit(block, planned, bar, keep_outputs=self.refinement is not None)[0]
        warn_of_few(self.vectors, {name: format.N for name, format in self.work.formats.items()})
        return fits

    def _find_masks(self) -> list[BatchMasks]:
        """Find out which vectors of layers and of the blocks' outputs count."""
        inputs = {name: site.module for site in self.work.sites.values() for name in site.names}
        chain = self.blocks.chain
        names = () if self.refinement is None else ("",) if chain is None else chain.names
        outputs = {name: self.model.get_submodule(name) for name in names}
        with self.blocks.whole():
            return find_masks(self.model, self.batches, inputs, outputs)

    def _run_chain(self, chain: Chain, bar: FitBar) -> dict[str, Fit]:
        """Fit the layers before the blocks, those in the blocks, and those after the blocks."""
        before, after = chain.outside(list(self.work.sites))
        fits: dict[str, Fit] = {}
        if before:
            fits |= self._fit_outside(chain, before, self._inputs(), bar, deliver=False)
        mine = current().mine(len(self.batches))
        hidden, extras = chain.enter(self.model, self.batches, mine)
        states = States(hidden, hidden, self.masks)
        if before:
            with with_fits(self.model, fits):
                states.compressed = chain.enter(self.model, self.batches, mine)[0]
        last = len(chain.names) - 1 if after else self._last_planned(chain)
        for k, name in enumerate(chain.names):
            with self.blocks.block(name) as dense:
                block = self._block(name, dense, states, _block_call(extras[k]))
                fits |= self._pass_block(block, bar) if k <= last else self.blocks.finish(name, dense, {})
        if after:
            fits |= self._fit_outside(chain, after, states, bar, deliver=True)
        return fits

    def _last_planned(self, chain: Chain) -> int:
        """The number of the last block with planned layers, behind which no data needs to flow."""
        planned = self.work.sites
        homes = (k for k, one in enumerate(chain.names) if any(name.startswith(f"{one}.") for name in planned))
        return max(homes, default=-1)

    def _listed(self, known: Mapping[int, Tensor]) -> list[Any]:
        """States batch by batch, where those of other processes are None."""
        return [known.get(i) for i in range(len(self.batches))]

    def _inputs(self) -> States:
        """The network's own inputs as states."""
        return States(self.batches, self.batches, self.masks)

    def _block(self, name: str, dense: nn.Module, states: States, forward: Forward) -> Block:
        """A block that is not copied yet."""
        return Block(name, dense, dense, states, forward)

    def _fit_outside(
        self, chain: Chain, planned: list[str], states: States, bar: FitBar, *, deliver: bool
    ) -> dict[str, Fit]:
        """Fit layers outside the chain, in the network without its blocks."""
        relay = Relay(self.model, chain, self.batches, deliver)
        with relay.hung():
            return self._fit(self._block("", self.model, states, relay.call), planned, bar, keep_outputs=False)[0]

    def _pass_block(self, block: Block, bar: FitBar) -> dict[str, Fit]:
        """Fit the layers of one block of the chain, and move the states past it; return its fits."""
        states = block.states
        planned = [name for name in self.work.sites if name.startswith(f"{block.name}.")]
        if planned:
            fits, returned = self._fit(block, planned, bar, keep_outputs=True)
            outputs = self._listed({i: tensors[0] for i, tensors in returned.items()})
        else:
            fits, outputs = {}, self._listed(block.outputs(dense=True))
        same = block.working is block.dense and not states.differ
        new = outputs if same else self._listed(block.trusted(lambda: block.outputs(dense=False)))
        states.compressed, states.dense = new, outputs
        return self.blocks.finish(block.name, block.working, fits)

    def _fit(
        self, block: Block, planned: list[str], bar: FitBar, *, keep_outputs: bool
    ) -> tuple[dict[str, Fit], dict[int, list[Tensor]]]:
        """Fit layers of a block in a copy of it, which becomes the block's working one.

        Args:
            block: The block.
            planned: The full names of the layers.
            bar: The progress bar.
            keep_outputs: Whether the dense block's outputs are wanted; without them nothing is refined.

        Returns:
            The fits by full name, and the outputs.
        """
        block.working = copied(block.dense)
        run = BlockFits(block, planned, self.work, self.store, bar, self.overhead)
        outputs = run.run(keep_outputs=keep_outputs)
        self.vectors |= run.vectors
        cost = sum(self.refining[name] for name in planned)
        if keep_outputs and self.refinement is not None:
            fits = refined(block, run.fits, outputs, self.refinement, self.store, bar, cost)
            run.fits = {name: with_error(fit, run.sites[name].matrix) for name, fit in fits.items()}
            put_fits_(block.working, run.fits)
            block.replay.clear()
        return run.by_full_name(), outputs


def _call_model(model: nn.Module, batch: Any, i: int) -> Any:
    """Call the whole network on its own inputs."""
    return call(model, moved(batch, device_of(model)))


def _block_call(extras: Mapping[int, Extras]) -> Forward:
    """Make the function that calls one block of the chain."""
    return lambda block, state, i: extras[i].call(block, state)
