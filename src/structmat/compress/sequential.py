"""Compression in sequence: block by block, each on what the compressed blocks before it give it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structmat.compress.refinement import Refinement, refined
from structmat.compress.tasks import FitBar, FitStore, Task, fit_tasks, with_error
from structmat.fit import Fit, Method
from structmat.fit.moments import Moments, MomentSums
from structmat.formats import Format
from structmat.network.adapters import record
from structmat.network.calls import call, device_of, evaluating, moved, tensor_of
from structmat.network.capture import capturing, mask_of, shared_inputs
from structmat.network.chain import Chain, Extras, Relay, find_chain
from structmat.network.sites import Site, find_sites
from structmat.network.surgery import apply_plan_, put_module

FORWARD_COST = 4
"""Forward passes of a block that its calibration takes, about: one dense, and parts of four compressed."""

KEPT_BYTES = 4 * 2**30
"""Up to this much memory, what a dense block's layers read is kept; beyond, it is computed for each of them again."""


def biased(fit: Fit, site: Site, moments: Moments) -> Fit:
    """The fit with the bias that makes the mean of the layer's output right, where the layer has one of its own."""
    bias = site.own_bias
    if bias is None:
        return fit
    return dataclasses.replace(fit, bias=moments.bias(bias, site.matrix, fit.format.to_dense(fit.factors)).detach())


@dataclass
class States:
    """What the next block reads, batch by batch: hidden states ``(B, T, N)``, or the network's own inputs.

    Attributes:
        dense: In the dense network.
        compressed: In the compressed one; the same list while nothing differs.
        masks: Which tokens count, ``(B, T)`` or None.
    """

    dense: list[Any]
    compressed: list[Any]
    masks: list[Tensor | None]

    @property
    def nbytes(self) -> int:
        """Memory of the hidden states, in bytes."""
        lists = (self.dense,) if self.compressed is self.dense else (self.dense, self.compressed)
        return sum(state.nbytes for states in lists for state in states if isinstance(state, Tensor))


Forward = Callable[[nn.Module, Any, int], Any]
"""Calls a block, or the network, on the state of one batch, given with the batch's number."""


class Sequence:
    """One run over the blocks of a network, which stays as it is; at any time one block is worked on, in a copy.

    Where the network is no chain of blocks, the whole of it is one block, and a copy of all of it is in memory.

    Args:
        model: The dense network.
        plan: Format of each layer.
        sites: The planned sites by name.
        methods: How to fit each of them.
        batches: The calibration data.
        refine: How to tune each block; None for not at all.
        store: Where finished fits are kept; None for nowhere.

    Raises:
        ValueError: If there are no batches, or too few of them to refine.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Mapping[str, Format],
        sites: Mapping[str, Site],
        methods: Mapping[str, Method[Any]],
        batches: list[Any],
        refine: Refinement | None,
        store: FitStore | None,
    ) -> None:
        if not batches:
            raise ValueError("expected at least one batch of calibration data, got none")
        if refine is not None:
            refine.check_batches(len(batches))
        self.model, self.plan, self.sites, self.methods = model, plan, sites, methods
        self.refine, self.store = refine, store
        self.batches = [moved(batch, device_of(model)) for batch in batches]
        self.masks = [mask_of(batch) for batch in self.batches]
        self.chain = self._find_chain()
        self._tokens = sum(_tokens(batch) for batch in self.batches)

    def _find_chain(self) -> Chain | None:
        with evaluating(self.model):
            return find_chain(self.model, {name: site.names for name, site in self.sites.items()}, self.batches[0])

    @contextmanager
    def _loaded(self, name: str) -> Iterator[nn.Module]:
        """A block with its weights in memory, while it is entered."""
        yield self.model.get_submodule(name)

    def _finished(self, name: str, working: nn.Module, fits: dict[str, Fit]) -> dict[str, Fit]:
        """Told of each block, compressed, and the fits of its layers by full name; returns what to keep of those."""
        return fits

    @property
    def cost(self) -> float:
        """About how many multiplications the run takes."""
        return sum(self._layer_cost(name) for name in self.sites)

    def _layer_cost(self, name: str) -> float:
        M, N = self.plan[name].shape
        passes = FORWARD_COST + (0 if self.refine is None else 3 * self.refine.steps / len(self.batches))
        return self.methods[name].cost(self.plan[name], aware=True) + self._tokens * (passes * M * N + 2 * N * N)

    def run(self, bar: FitBar) -> dict[str, Fit]:
        """Fit everything.

        Args:
            bar: The progress bar.

        Returns:
            The fits by name.
        """
        with evaluating(self.model):
            if self.chain is None:
                states = States(self.batches, self.batches, self.masks)
                refine = self.refine is not None
                return self._fit_block("", self.model, list(self.sites), states, _call_model, bar, outputs=refine)[0]
            return self._run_chain(self.chain, bar)

    def _run_chain(self, chain: Chain, bar: FitBar) -> dict[str, Fit]:
        before, after = chain.outside(list(self.sites))
        fits: dict[str, Fit] = {}
        if before:
            relay = Relay(self.model, chain, self.batches, deliver=False)
            with relay.hung():
                states = States(self.batches, self.batches, self.masks)
                fits |= self._fit_block("", self.model, before, states, relay.call, bar)[0]
        hidden, extras = chain.enter(self.model, self.batches)
        states = States(hidden, hidden, self.masks)
        if before:
            with _with_fits(self.model, fits):
                states.compressed = chain.enter(self.model, self.batches)[0]
        for k, name in enumerate(chain.names):
            with self._loaded(name) as block:
                fits |= self._pass_block(name, block, states, _block_call(extras[k]), bar)
        if after:
            relay = Relay(self.model, chain, self.batches)
            with relay.hung():
                fits |= self._fit_block("", self.model, after, states, relay.call, bar)[0]
        return fits

    def _pass_block(self, name: str, block: nn.Module, states: States, forward: Forward, bar: FitBar) -> dict[str, Fit]:
        """Fit one block of the chain, and move the states past it; returns its fits."""
        planned = [site for site in self.sites if site.startswith(f"{name}.")]
        if planned:
            fits, working, outputs = self._fit_block(name, block, planned, states, forward, bar, outputs=True)
        else:
            fits, working = {}, block
            outputs = [tensor_of(forward(block, x, i)) for i, x in enumerate(states.dense)]
        same = working is block and states.compressed is states.dense
        states.compressed = (
            outputs if same else [tensor_of(forward(working, x, i)) for i, x in enumerate(states.compressed)]
        )
        states.dense = outputs
        return self._finished(name, working, fits)

    def _fit_block(
        self,
        prefix: str,
        block: nn.Module,
        planned: list[str],
        states: States,
        forward: Forward,
        bar: FitBar,
        outputs: bool = False,
    ) -> tuple[dict[str, Fit], nn.Module, list[Tensor]]:
        """Fit a block's layers.

        Args:
            prefix: Name of the block.
            block: The dense block.
            planned: Full names of its layers.
            states: What it reads.
            forward: Calls it.
            bar: The progress bar.
            outputs: Whether its outputs are wanted, to go on with or to refine towards.

        Returns:
            The fits by full name, a copy of the block with them, and the dense block's outputs.
        """
        full = {name.removeprefix(f"{prefix}.") if prefix else name: name for name in planned}
        dense_sites = _sites(block, full)
        working = copy.deepcopy(block)
        leaders, once = shared_inputs(dense_sites, lambda: forward(block, states.dense[0], 0))
        bar.say(f"{planned[0]}, calibrating, states {states.nbytes / 2**20:.0f} MiB")
        reads = {leader: dense_sites[leader] for leader in dict.fromkeys(leaders.values())}
        kept, targets = self._dense_pass(block, reads, states, forward, outputs)
        fits: dict[str, Fit] = {}
        for leader in reads:
            names = [name for name in leaders if leaders[name] == leader]
            bar.say(f"{full[leader]}, calibrating, states {states.nbytes / 2**20:.0f} MiB")
            sums = MomentSums()
            crossed = bool(fits) or states.compressed is not states.dense
            now = _sites(working, {leader: full[leader]})
            for i, mask in enumerate(self.masks):
                stop = leader in once
                dense = kept[leader][i] if kept else None
                if dense is None:
                    dense = _captured(reads[leader], block, forward, states.dense[i], i, mask, stop)
                if crossed:
                    sums.add(_captured(now[leader], working, forward, states.compressed[i], i, mask, stop), dense)
                else:
                    sums.add(dense)
            if kept:
                del kept[leader]
            moments = sums.moments()
            tasks = []
            for name in names:
                key, weight = full[name], dense_sites[name].matrix.detach()
                target, gram = moments.problem(weight, centred=dense_sites[name].own_bias is not None)
                tasks.append(Task(key, weight, self.plan[key], self.methods[key], target, gram))
            fitted = fit_tasks(tasks, bar, self.store)
            bar.advance(sum(self._layer_cost(full[name]) for name in names) - sum(task.cost for task in tasks))
            new = {name: biased(fitted[full[name]], dense_sites[name], moments) for name in names}
            _put_fits_(working, new)
            fits |= new
        if outputs and self.refine is not None:
            fits = refined(working, fits, states.compressed, targets, self.masks, forward, self.refine, self.store, bar)
            fits = {name: with_error(fit, dense_sites[name].matrix) for name, fit in fits.items()}
            _put_fits_(working, fits)
        return {full[name]: fit for name, fit in fits.items()}, working, targets

    def _dense_pass(
        self, block: nn.Module, reads: Mapping[str, Site], states: States, forward: Forward, keep_outputs: bool
    ) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
        """What the dense block's layers read, for every batch, if that is not too much; and the block's outputs."""
        kept: dict[str, list[Tensor]] = {name: [] for name in reads}
        outputs: list[Tensor] = []
        for i, mask in enumerate(self.masks):
            captured: dict[str, list[Tensor]] = {}
            with capturing(reads if kept else {}, captured, mask):
                returned = [forward(block, states.dense[i], i)]
                outputs += [tensor_of(returned[0])] if keep_outputs else []
            for name, vectors in captured.items():
                kept[name].append(torch.cat(vectors))
            if i == 0 and sum(one[0].nbytes for one in kept.values()) * len(self.masks) > KEPT_BYTES:
                kept = {}
            if not kept and not keep_outputs:
                break
        return kept, outputs


def _tokens(batch: Any) -> int:
    """About how many vectors a batch makes."""
    mask = mask_of(batch)
    if mask is not None:
        return int(mask.sum())
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    first = next((value for value in values if isinstance(value, Tensor)), None)
    return 0 if first is None else first.numel() if not first.is_floating_point() else 64 * len(first)


def _call_model(model: nn.Module, batch: Any, i: int) -> Any:
    return call(model, batch)


def _block_call(extras: list[Extras]) -> Forward:
    return lambda block, state, i: extras[i].call(block, state)


def _sites(block: nn.Module, names: Mapping[str, str]) -> dict[str, Site]:
    """The sites of a block by the wanted ones of their names, each called by its full name."""
    by_name = {name: site for site in find_sites(block).values() for name in site.names}
    return {name: dataclasses.replace(by_name[name], name=full) for name, full in names.items()}


def _captured(
    site: Site, block: nn.Module, forward: Forward, state: Any, i: int, mask: Tensor | None, stop: bool
) -> Tensor:
    """What one layer of the block reads in one call, ``(T, N)``; the call ends there if it reads but once."""
    captured: dict[str, list[Tensor]] = {}
    with capturing({site.name: site}, captured, mask, stop):
        forward(block, state, i)
    return torch.cat(captured[site.name])


def _put_fits_(block: nn.Module, fits: Mapping[str, Fit]) -> None:
    """Put fits into a copy of a block: new structured layers, or new values for those that are there."""
    missing = {name: fit for name, fit in fits.items() if not hasattr(block.get_submodule(name), "format")}
    formats = {name: fit.format for name, fit in missing.items()}
    apply_plan_(block, formats, factors={name: fit.factors for name, fit in missing.items()})
    for name, fit in fits.items():
        module = block.get_submodule(name)
        for factor, value in fit.factors.items():
            getattr(module, factor).data.copy_(value)
        if fit.bias is not None:
            module.get_parameter("bias").data = fit.bias.clone()


@contextmanager
def _with_fits(model: nn.Module, fits: Mapping[str, Fit]) -> Iterator[None]:
    """The network with some layers replaced, for a while."""
    sites = _sites(model, {name: name for name in fits})
    modules = {n: module for site in sites.values() for n, module in _hung(model, site).items()}
    try:
        apply_plan_(model, {n: f.format for n, f in fits.items()}, factors={n: f.factors for n, f in fits.items()})
        for name, fit in fits.items():
            if fit.bias is not None:
                model.get_submodule(name).bias = nn.Parameter(fit.bias)  # the old one is the dense layer's
        yield
    finally:
        for name, module in modules.items():
            put_module(model, name, module)
        record(model)


def _hung(model: nn.Module, site: Site) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name) for name in site.names}
