"""What flows from block to block while a network is compressed in sequence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from structmat._ranks import current
from structmat.compress.replay import Replay
from structmat.network.calls import HOST, device_of, same_draws, tensor_of, tensors_of
from structmat.network.capture import capturing
from structmat.network.masks import BatchMasks, masks_of
from structmat.network.sites import Site

T = TypeVar("T")

Forward = Callable[[nn.Module, Any, int], Any]
"""Calls a block, or the network, on the state of one batch, given with the batch's number."""


@dataclass
class States:
    """What the next block reads, batch by batch: hidden states ``(B, T, N)``, or the network's own inputs.

    They wait in the host's memory, and each goes to the device of the block when its turn comes.

    Attributes:
        dense: The states in the dense network.
        compressed: The states in the compressed one; the same list while nothing differs.
        masks: Which vectors of layers and of outputs count.
    """

    dense: list[Any]
    compressed: list[Any]
    masks: list[BatchMasks]

    @property
    def mine(self) -> list[int]:
        """The numbers of the batches of this process; the states of others are not here."""
        return current().mine(len(self.masks))

    @property
    def differ(self) -> bool:
        """Whether the compressed network has states of its own."""
        return self.compressed is not self.dense

    @property
    def nbytes(self) -> int:
        """The memory of the hidden states, in bytes."""
        lists = (self.dense, self.compressed) if self.differ else (self.dense,)
        return sum(state.nbytes for states in lists for state in states if isinstance(state, Tensor))


@dataclass
class Block:
    """A block of the network whose layers are fitted, and what flows through it.

    Attributes:
        name: The block's name in the network; empty for the whole network.
        dense: The dense block, which does not change.
        working: A copy of it, in which the fits are put; it may be the dense block itself where nothing is fitted.
        states: What the block reads.
        forward: Calls the dense block or the copy.
        ends: Whether the block is the end of the network, so that all tensors that it returns matter, not the first.
        replay: What parts of the copy return that are complete.
    """

    name: str
    dense: nn.Module
    working: nn.Module
    states: States
    forward: Forward
    ends: bool = False
    replay: Replay = field(default_factory=Replay)

    def own_name(self, full: str) -> str:
        """The name within the block of a layer with this full name."""
        return full.removeprefix(f"{self.name}.") if self.name else full

    def call(self, module: nn.Module, state: Any, i: int) -> Any:
        """Call the dense block or a copy of it on a state of batch ``i``, with the same random draws each time."""
        replayed = module is self.working and module is not self.dense
        with same_draws(i, device_of(module)), self.replay.of(module, i) if replayed else nullcontext():
            return self.forward(module, state, i)

    def _checked(self, i: int, compute: Callable[[], Tensor]) -> Tensor:
        """Call the copy on batch ``i``; for the first batch with and without replay, which ends if that differs."""
        if i or not self.replay.knows(i):
            return compute()
        with self.replay.paused():
            plain = compute()
        try:
            same = torch.equal(compute(), plain)
        except Exception:  # of the network's own code, which may miss what a part does beside returning something
            same = False
        if not same:
            self.replay.disable()
        return plain

    def trusted(self, compute: Callable[[], T]) -> T:
        """Call the copy on the batches of this process, again without replay where another process found it wrong.

        Args:
            compute: The function that calls the copy, in the order of the batches, and no other process.

        Returns:
            What it returned.
        """
        before = self.replay.disabled
        found = compute()
        if not before and current().any(self.replay.disabled) and not self.replay.disabled:
            self.replay.disable()
            found = compute()
        return found

    def matters(self, returned: Any) -> list[Tensor]:
        """The tensors that matter in what the block returned."""
        return tensors_of(returned) if self.ends else [tensor_of(returned)]

    def output(self, i: int, *, dense: bool) -> Tensor:
        """Call the block on the state of batch ``i``.

        Args:
            i: The batch's number.
            dense: Whether to call the dense block on the dense state, or the copy on the compressed one.

        Returns:
            The next state, in the host's memory.
        """
        if dense:
            return tensor_of(self.call(self.dense, self.states.dense[i], i)).to(HOST)
        return self._checked(i, lambda: tensor_of(self.call(self.working, self.states.compressed[i], i)).to(HOST))

    def outputs(self, *, dense: bool) -> dict[int, Tensor]:
        """The next states of the batches of this process, by number."""
        return {i: self.output(i, dense=dense) for i in self.states.mine}

    def captured(self, site: Site, width: int, i: int, *, dense: bool, stop: bool) -> Tensor:
        """Find what one layer reads when the block is called on the state of batch ``i``.

        Args:
            site: The layer, of the dense block or of the copy.
            width: The number of inputs of the layer, ``N``.
            i: The batch's number.
            dense: Whether to call the dense block on the dense state, or the copy on the compressed one.
            stop: Whether the layer is called once, so that the call can end there.

        Returns:
            The vectors ``(T, N)``, on the layer's device; none where the call does not reach the layer.
        """
        block, states = (self.dense, self.states.dense) if dense else (self.working, self.states.compressed)

        def vectors() -> Tensor:
            with capturing({site.name: site}, self.states.masks[i].counted, stop=stop) as captured:
                self.call(block, states[i], i)
            if site.name in captured:
                return torch.cat(captured[site.name])
            return next(self.dense.parameters()).new_empty(0, width)

        return vectors() if dense else self._checked(i, vectors)

    def counted_output(self, i: int, number: int, output: Tensor) -> Tensor | None:
        """Which vectors of a tensor that the block returns for batch ``i`` count; None for all of them.

        Args:
            i: The batch's number.
            number: The tensor's number among those that matter.
            output: The tensor ``(..., N)``.

        Returns:
            ``(...)`` of booleans, or None.
        """
        return self.states.masks[i].counted(f"{self.name}>{number}", output)


def count_tokens(batch: Any, example: int = 64) -> int:
    """Estimate how many tokens a batch has, to weigh work by it.

    Args:
        batch: The inputs of one call.
        example: What an example counts whose input is no text, such as an image.

    Returns:
        The number.
    """
    masks = masks_of(batch)
    if masks:
        return max(int(mask.sum()) for mask in masks.values())
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    first = next((value for value in values if isinstance(value, Tensor)), None)
    return 0 if first is None else first.numel() if not first.is_floating_point() else example * len(first)
