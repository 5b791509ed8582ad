"""The statistics of a network that is read block by block: forward through its blocks, then backward through them.

Between the two, the states that each block reads wait in the host's memory; a block is read twice, and nothing of it is
kept but the spectra of its layers. The gradients are those of the whole network, to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structmat._progress import progress_bar
from structmat._ranks import current
from structmat.compress.block import sites_in
from structmat.compress.effects import Effect, OutputEffect
from structmat.compress.efforts import Effort
from structmat.compress.gradients import Gradients, GradientSums, frozen, loss_of, some_of, tensors_in
from structmat.compress.sequential import BlockReader
from structmat.compress.spectra import Spectrum, decomposed
from structmat.compress.store import FitStore
from structmat.compress.survey import Statistics
from structmat.fit.moments import MomentSums
from structmat.network.calls import HOST, device_of, evaluating, same_draws, tensor_of, undisturbed
from structmat.network.capture import capturing, capturing_gradients, shared_inputs
from structmat.network.chain import Chain, Relay
from structmat.network.masks import BatchMasks, find_masks
from structmat.network.sites import Site


@dataclass(frozen=True)
class NetworkInBlocks:
    """A network of which one block at a time is in memory.

    Attributes:
        model: The network, with what lies outside its blocks.
        batches: The calibration data.
        opened: A function of the layers by name that tells where the blocks are, which are a chain.
        weights: A hash of the weights.
    """

    model: nn.Module
    batches: Sequence[Any]
    opened: Callable[[Mapping[str, Site]], BlockReader]
    weights: str

    def key(self) -> str:
        """The hash of the weights and the data."""
        return FitStore.digest(f"in blocks|{self.weights}", *tensors_in(self.batches))

    def statistics(
        self,
        sites: Mapping[str, Site],
        standing: frozenset[str],
        effect: Effect,
        seed: int,
        *,
        effort: Effort,
        progress: bool,
    ) -> Statistics:
        """Gather them block by block, on as many tokens as gradients take, or the widest layer has inputs twice."""
        blocks = self.opened(sites)
        if blocks.chain is None:
            raise ValueError("expected the blocks of the network to be a chain; load it into memory and use allocate")
        widest = max(site.matrix.shape[1] for site in sites.values())
        given = some_of(self.batches, max(effort.gradients, 2 * widest))
        bar = progress_bar(desc="statistics", unit="block", total=2 * len(blocks.chain.names), show=progress)
        with undisturbed(), evaluating(self.model), frozen(self.model), bar:
            with blocks.whole():
                output = OutputEffect(self.model, given, effect, references=False)
                inside = {own: site.module for site in sites.values() for own in site.names}
                masks = find_masks(self.model, given, inside, {})
            run = _Run(self.model, blocks, blocks.chain, given, masks)
            run.forward(bar.update)
            above, outputs = run.losses(output, seed)
            return run.backward(sites, standing, above, outputs, output.name, bar.update)


class _Run:
    """One run forward and backward.

    Args:
        model: The network.
        blocks: Where its blocks are.
        chain: Their chain.
        batches: The calibration data that is used.
        masks: Which vectors of layers count, batch by batch.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: BlockReader,
        chain: Chain,
        batches: Sequence[Any],
        masks: Sequence[BatchMasks],
    ) -> None:
        self.model, self.blocks, self.chain, self.batches, self.masks = model, blocks, chain, batches, masks
        self.mine = current().mine(len(batches))
        entered, self.extras = chain.enter(model, batches, self.mine)
        self.states = [{i: entered[i] for i in self.mine}]

    def _call(self, block: nn.Module, k: int, i: int, state: Any) -> Tensor:
        """Call block ``k`` on a state of batch ``i``."""
        with same_draws(i, device_of(block)):
            return tensor_of(self.extras[k][i].call(block, state))

    def forward(self, step: Any) -> None:
        """Find what each block reads, and what the last one returns."""
        for k, name in enumerate(self.chain.names):
            with self.blocks.block(name) as block, torch.no_grad():
                self.states.append({i: self._call(block, k, i, state).to(HOST) for i, state in self.states[k].items()})
            step()

    def losses(self, output: OutputEffect, seed: int) -> tuple[dict[int, Tensor], dict[int, int]]:
        """The gradients of the losses with respect to what the last block returns, and how many outputs count."""
        relay = Relay(self.model, self.chain, self.batches)
        gradients: dict[int, Tensor] = {}
        outputs: dict[int, int] = {}
        with relay.hung(), torch.enable_grad():
            for i, state in self.states.pop().items():
                state.requires_grad_()
                with same_draws(i, device_of(self.model)):
                    returned = relay.call(self.model, state, i)
                loss, outputs[i] = loss_of(self.batches[i], returned, output, i, seed)
                gradients[i] = torch.autograd.grad(loss, state)[0]
        return gradients, outputs

    def backward(
        self,
        sites: Mapping[str, Site],
        standing: frozenset[str],
        above: dict[int, Tensor],
        outputs: Mapping[int, int],
        effect: str,
        step: Any,
    ) -> Statistics:
        """Go back through the blocks, and gather what is wanted of the layers of each.

        Args:
            sites: The layers by name; their weights may be on the meta device.
            standing: The names of the layers that stand for others.
            above: The gradients at what the last block returns, by the batch's number; they are used up.
            outputs: How many vectors of the network's output count, by the batch's number.
            effect: What is measured at the output, for people.
            step: Called after each block.

        Returns:
            The statistics.
        """
        spectra: dict[str, Spectrum] = {}
        moments: dict[str, Tensor] = {}
        vectors: dict[str, float] = {}
        held: dict[str, Site] = {}
        for k in reversed(range(len(self.chain.names))):
            name = self.chain.names[k]
            with self.blocks.block(name) as block, frozen(block):
                full = {one.removeprefix(f"{name}."): one for one in sites if one.startswith(f"{name}.")}
                own = {site.name: site for site in sites_in(block, full).values()}
                inputs, gradients = self._pass(block, k, own, above, outputs, effect)
                spectra |= decomposed(list(own), own, inputs, gradients, standing, lambda: None)
                vectors |= gradients.vectors
                kept = [layer for layer in own if layer in standing]
                held |= {layer: own[layer] for layer in kept}
                moments |= {layer: gradients.moments[layer] for layer in kept if layer in gradients.moments}
            step()
        return Statistics(Gradients(moments, vectors, effect), {name: spectra[name] for name in sites}, held)

    def _pass(
        self,
        block: nn.Module,
        k: int,
        own: Mapping[str, Site],
        above: dict[int, Tensor],
        outputs: Mapping[int, int],
        effect: str,
    ) -> tuple[dict[str, Any], Gradients]:
        """Call block ``k`` forward and backward on all batches: the moments of inputs by layer, and of gradients."""
        states, sums = self.states.pop(), GradientSums()
        runs = (functools.partial(self._call, block, k, i, states.get(i)) for i in range(len(self.batches)))
        leaders = shared_inputs(own, runs)[0] if own else {}
        read = {leader: own[leader] for leader in leaders.values()}
        inputs = {leader: MomentSums() for leader in read}
        for i, state in states.items():
            counted = self.masks[i].counted
            with capturing_gradients(own, counted) as captured, capturing(read, counted) as seen, torch.enable_grad():
                found = self._call(block, k, i, state.requires_grad_())
                above[i] = torch.autograd.grad(found, state, above[i].to(found))[0]
            sums.add(i, captured, outputs[i])
            for leader, parts in seen.items():
                inputs[leader].add(torch.cat(parts).detach(), number=i)
        moments = {leader: one.moments() for leader, one in inputs.items()}
        return {layer: moments[leader] for layer, leader in leaders.items()}, sums.gradients(effect)
