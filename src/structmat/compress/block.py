"""The fits of one block's layers, each on what the compressed layers before it give it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from structmat._ranks import current
from structmat.compress.replay import Replay
from structmat.compress.states import Block
from structmat.compress.store import FitStore
from structmat.compress.tasks import FitBar, WorkList, fit_tasks, with_bias
from structmat.fit import Fit
from structmat.fit.moments import Moments, MomentSums
from structmat.network.calls import HOST, device_of
from structmat.network.capture import capturing, shared_inputs
from structmat.network.sites import Site, find_sites
from structmat.network.surgery import put_fits_

KEPT_BYTES = 4 * 2**30
"""The most memory in bytes for what a dense block's layers read; where it takes more, it is computed again for each."""

DENSE_SHARE = 0.25
"""About what share of the passes through a block is that through the dense one, which comes first."""


class BlockFits:
    """The run over the layers of one block, in the order in which they are called.

    Layers that read the same input are fitted at the same time, each by itself.

    Args:
        block: The block, with a copy of it for the fits.
        planned: The full names of its layers.
        work: The work list.
        store: Where finished fits are kept; None for nowhere.
        bar: The progress bar.
        overhead: The multiplications that each layer costs beside its fit, by full name.
    """

    def __init__(
        self,
        block: Block,
        planned: list[str],
        work: WorkList,
        store: FitStore | None,
        bar: FitBar,
        overhead: Mapping[str, float],
    ) -> None:
        self.block, self.work, self.store, self.bar, self.overhead = block, work, store, bar, overhead
        self.full = {block.own_name(name): name for name in planned}
        self.sites = sites_in(block.dense, self.full)
        self.fits: dict[str, Fit] = {}
        block.replay = Replay([one for site in self.sites.values() for one in site.names])
        self.vectors: dict[str, int] = {}  # that each layer saw, by full name
        states = block.states
        self.leaders, self.once = shared_inputs(
            self.sites, (functools.partial(block.call, block.dense, state, i) for i, state in enumerate(states.dense))
        )

    def run(self, *, keep_outputs: bool) -> dict[int, list[Tensor]]:
        """Fit every layer, and put the fits into the copy of the block.

        Args:
            keep_outputs: Whether the outputs of the dense block are wanted, to go on with or to refine towards.

        Returns:
            The tensors that matter in each output, by the number of each batch of this process; none where they are
            not wanted.
        """
        reads = dict.fromkeys(self.leaders.values())
        self._say(next(iter(self.full.values())))
        kept, outputs = self._dense_pass({leader: self.sites[leader] for leader in reads}, keep_outputs)
        self._count_passes(list(self.full), DENSE_SHARE)
        for leader in reads:
            self._say(self.full[leader])
            moments = self._moments(leader, kept.pop(leader, None))
            names = [name for name in self.leaders if self.leaders[name] == leader]
            self._count_passes(names, 1 - DENSE_SHARE)
            self._fit(names, moments)
        self.block.replay.keeping = False
        return outputs

    def by_full_name(self) -> dict[str, Fit]:
        """The fits by the layers' full names."""
        return {self.full[name]: fit for name, fit in self.fits.items()}

    def _count_passes(self, names: list[str], share: float) -> None:
        """Count a share of the passes for layers as done."""
        self.bar.advance(share * sum(self.overhead[self.full[name]] for name in names), "passes")

    def _say(self, name: str) -> None:
        self.bar.say(f"{name}, calibrating, states {self.block.states.nbytes / 2**20:.0f} MiB")

    def _dense_pass(
        self, reads: Mapping[str, Site], keep_outputs: bool
    ) -> tuple[dict[str, dict[int, Tensor]], dict[int, list[Tensor]]]:
        """Call the dense block on every batch of this process.

        Args:
            reads: The layers whose inputs are to be kept.
            keep_outputs: Whether the outputs are to be kept.

        Returns:
            What the layers read, by the batch's number, or nothing if that is too much; and the outputs.
        """
        block, kept = self.block, {name: dict[int, Tensor]() for name in reads}
        outputs: dict[int, list[Tensor]] = {}
        for i in block.states.mine:
            with capturing(reads if kept else {}, block.states.masks[i].counted) as captured:
                returned = block.call(block.dense, block.states.dense[i], i)
                if keep_outputs:
                    outputs[i] = [tensor.to(HOST) for tensor in block.matters(returned)]
            for name, found in kept.items():
                found[i] = torch.cat(captured[name]).to(HOST) if name in captured else torch.empty(0, self._width(name))
            first = i == block.states.mine[0]
            if first and sum(one[i].nbytes for one in kept.values()) * len(block.states.mine) > KEPT_BYTES:
                kept = {}
            if not kept and not keep_outputs:
                break
        return kept, outputs

    def _moments(self, leader: str, kept: dict[int, Tensor] | None) -> Moments:
        """Gather the moments of what a layer reads in the compressed block, and of what it reads in the dense one."""
        sums = self.block.trusted(functools.partial(self._sums, leader, kept))
        alone = current().any(sums is None)
        return self._moments_alone(leader) if alone or sums is None else sums.moments()

    def _sums(self, leader: str, kept: dict[int, Tensor] | None) -> MomentSums | None:
        """The sums over the batches of this process; None where the two blocks give a layer other vectors."""
        block, sums, width = self.block, MomentSums(), self._width(leader)
        crossed = bool(self.fits) or block.states.differ
        now = sites_in(block.working, {leader: self.full[leader]})[leader]
        device, stop = device_of(block.dense), leader in self.once
        for i in block.states.mine:
            ahead = None if kept is None else kept[i].to(device)
            dense = block.captured(self.sites[leader], width, i, dense=True, stop=stop) if ahead is None else ahead
            if not crossed:
                sums.add(dense, number=i)
                continue
            found = block.captured(now, width, i, dense=False, stop=stop)
            if len(found) != len(dense):
                return None
            sums.add(found, dense, number=i)
        return sums

    def _moments_alone(self, leader: str) -> Moments:
        """Gather the moments of what a layer reads in the compressed block alone.

        Once earlier layers are compressed, other tokens may be routed to an expert than in the dense network. Then no
        vector of the one corresponds to one of the other, and the target is the dense layer's output on the new ones.

        Args:
            leader: The layer's name within the block.

        Returns:
            The moments; those in the dense block if no token is routed to the expert any more.
        """
        now = sites_in(self.block.working, {leader: self.full[leader]})[leader]
        sums = self.block.trusted(lambda: self._sums_alone(leader, now, dense=False))
        return (sums if sums.tokens else self._sums_alone(leader, self.sites[leader], dense=True)).moments()

    def _sums_alone(self, leader: str, site: Site, *, dense: bool) -> MomentSums:
        """The sums over the batches of this process of what a layer reads in one of the two blocks."""
        sums, width = MomentSums(), self._width(leader)
        for i in self.block.states.mine:
            sums.add(self.block.captured(site, width, i, dense=dense, stop=False), number=i)
        return sums

    def _width(self, name: str) -> int:
        """The number of inputs of a layer."""
        return self.work.formats[self.full[name]].N

    def _fit(self, names: list[str], moments: Moments) -> None:
        """Fit layers that read the same input, and put the fits into the copy of the block."""
        self.vectors |= {self.full[name]: moments.tokens for name in names}
        tasks = [self.work.task(self.full[name], self.sites[name], moments) for name in names]
        fitted = fit_tasks(tasks, self.bar, self.store, apart=True)
        new = {name: with_bias(fitted[self.full[name]], self.sites[name], moments) for name in names}
        put_fits_(self.block.working, new)
        self.block.replay.complete([one for name in new for one in self.sites[name].names])
        self.fits |= new


def sites_in(block: nn.Module, names: Mapping[str, str]) -> dict[str, Site]:
    """Find layers of a block.

    Args:
        block: The block.
        names: The full names of the layers by the names within the block.

    Returns:
        The layers by the names within the block, each called by its full name.
    """
    by_name = {name: site for site in find_sites(block).values() for name in site.names}
    return {name: dataclasses.replace(by_name[name], name=full) for name, full in names.items()}
