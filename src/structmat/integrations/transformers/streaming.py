"""Compression of a transformers checkpoint that does not fit into memory: block by block, from file to file."""

from __future__ import annotations

import copy
import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat._ranks import current
from structmat.compress.api import checked_batches
from structmat.compress.block import sites_in
from structmat.compress.refinement import Refinement
from structmat.compress.sequential import SequentialRun
from structmat.compress.store import FitStore
from structmat.compress.tasks import FitBar, MethodChoice, WorkList, fit_tasks
from structmat.fit import Fit
from structmat.formats import Format
from structmat.integrations.integrity import record_digests
from structmat.integrations.transformers.checkpoint_files import CheckpointReader, CheckpointWriter
from structmat.integrations.transformers.quantizer import placeholders, write_down
from structmat.integrations.transformers.skeletons import skeleton
from structmat.network.calls import evaluating
from structmat.network.capture import hooked
from structmat.network.chain import Chain, find_chain, list_of_blocks
from structmat.network.surgery import apply_plan_, put_fits_

NO_CHAIN = (
    "expected every planned layer inside the blocks of a chain, as in decoders; load this model into memory and use "
    "compress_"
)

COPIED = frozenset({".json", ".model", ".txt", ".jinja"})
"""The suffixes of the files of tokenizers and the like, which are copied."""


def compress_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    plan: Mapping[str, Format],
    *,
    method: MethodChoice = None,
    batches: Iterable[Any] | None = None,
    refine: Refinement | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Fit]:
    """Compress a checkpoint without ever holding more of it than one block and what lies outside the blocks.

    The result is what ``compress_`` on the loaded model and ``save_pretrained`` would give: a folder for plain
    ``from_pretrained``, one file for each block.

    Args:
        source: The folder of the dense checkpoint, in safetensors files whose tensors bear the modules' names.
        out: The folder to write; it appears when everything is there.
        plan: The format of each layer by name; all layers lie within the blocks of the model.
        method: The method, as for ``compress_``.
        batches: The calibration data, as for ``compress_``.
        refine: The refinement, as for ``compress_``.
        cache: The folder for finished fits, as for ``compress_``.
        progress: Whether to show a progress bar, with a time estimate.

    Returns:
        The fit of each layer, its factors on the meta device: their values are in the files.

    Raises:
        FileExistsError: If ``out`` is there already.
        FileNotFoundError: If the source lacks a file.
        ValueError: If names in the files are not those of the model, the plan does not fit it, or reaches beyond its
            blocks.
    """
    current().of(0, lambda: _check_new(Path(out)))
    given = checked_batches(batches, refine)
    model = skeleton(source)
    wanted = {name: format for name, format in plan.items() if format.replaces}
    files = CheckpointReader(source, model)
    partial = current().of(0, lambda: partial_folder(Path(out)))
    try:
        work = WorkList.of(model, wanted, method)
        blocks = OnDisk(model, work, files, CheckpointWriter(partial), None if given is None else given[0])
        store = FitStore(cache) if cache else None
        with torch.no_grad():
            if given is None:
                fits = _fit_weights(work, blocks, store, progress)
            else:
                run = SequentialRun(model, work, given, blocks, refinement=refine, store=store)
                with FitBar(run.costs, progress) as bar:
                    fits = run.run(bar)
        current().of(0, lambda: _finish(model, wanted, blocks, Path(source), partial, Path(out)))
    finally:
        if current().leads and partial.is_dir():
            _remove(partial)
    return {name: fits[name] for name in wanted}


MARKER = ".structmat-partial"
"""The file that marks a folder as one that was made here, so that it may be removed."""


def _check_new(out: Path) -> None:
    if out.exists():
        raise FileExistsError(f"expected a new folder, but {str(out)!r} is there; remove it or choose another")


def partial_folder(out: Path) -> Path:
    """Make the folder beside ``out`` in which the checkpoint grows; one that an earlier run left is removed.

    Args:
        out: The folder that will appear.

    Returns:
        The partial folder, which is empty but for the marker.

    Raises:
        FileExistsError: If something is there that was not made here.
    """
    partial = out.with_name(f"{out.name}.partial")
    if os.path.lexists(partial):
        if partial.is_symlink() or not _is_ours(partial):
            raise FileExistsError(
                f"expected {str(partial)!r} to be free for what is unfinished, but something is there that structmat "
                "did not make; move it away or choose another folder"
            )
        _remove(partial)
    partial.mkdir(parents=True)
    (partial / MARKER).touch()
    return partial


def _is_ours(partial: Path) -> bool:
    """Whether there is the marker, or a folder without anything, as before the marker is written."""
    return (partial / MARKER).is_file() or (partial.is_dir() and next(partial.iterdir(), None) is None)


def _remove(partial: Path) -> None:
    """Remove a partial folder; its marker goes last, so that what a process leaves that is killed here has it."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARKER:
            path.unlink()
    (partial / MARKER).unlink(missing_ok=True)
    partial.rmdir()


class DiskBlocks:
    """The blocks of a checkpoint: each is read when its turn comes.

    Args:
        model: The model on the meta device; what lies outside its blocks gets its values here.
        work: The work list.
        files: The dense checkpoint.
        batch: The inputs of a call, in which the blocks are to be a chain; None where the model is not called.

    Attributes:
        chain: The blocks: a chain if there is a batch.

    Raises:
        ValueError: If a planned layer lies outside the blocks or is a part of a module, or the blocks are no chain.
    """

    def __init__(self, model: Any, work: WorkList, files: CheckpointReader, batch: Any = None) -> None:
        self.model, self.work, self.files = model, work, files
        planned = {name: site.names for name, site in work.sites.items()}
        held = next((site for site in work.sites.values() if site.holder is not None), None)
        if held is not None and held.holder is not None:
            raise ValueError(
                f"expected layers that are whole in the files, but {held.name!r} is a part of a "
                f"{type(held.holder.module).__name__}; leave it out of the plan, or compress_ the model in memory"
            )
        self.chain = Chain(tuple(list_of_blocks(model, planned)), False, ())
        if any(self.chain.outside(list(planned))):
            raise ValueError(NO_CHAIN)
        model.load_state_dict(files.read(self.names_outside()), strict=False, assign=True)
        model.tie_weights()
        if batch is not None:
            with evaluating(model), self.whole():
                chain = find_chain(model, planned, _one_example(batch))
            if chain is None:
                raise ValueError(NO_CHAIN)
            self.chain = chain

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While it is entered, the model can be called: each block is read for its call, and let go after it."""
        blocks = {name: self.model.get_submodule(name) for name in self.chain.names}
        parts = [part for block in blocks.values() for part in block.modules()]
        before = {part: part._parameters for part in parts}

        def read(name: str, block: nn.Module, *_: Any) -> None:
            for part in block.modules():
                part._parameters = before[part]  # on the meta device, so that a copy takes no memory
            filled = self._filled(name)
            for part, other in zip(block.modules(), filled.modules(), strict=True):
                part._parameters = other._parameters

        def let_go(name: str, block: nn.Module, *_: Any) -> None:
            for part in block.modules():
                part._parameters = hollow[part]

        hollow = {part: _hollow(parameters) for part, parameters in before.items()}
        try:
            for name, block in blocks.items():
                let_go(name, block)
            with hooked(blocks, before=read, after=let_go):
                yield
        finally:
            for part, parameters in before.items():
                part._parameters = parameters

    def names_outside(self) -> list[str]:
        """The names of the tensors outside the blocks."""
        begins = tuple(f"{block}." for block in self.chain.names)
        return [name for name in self.model.state_dict() if not name.startswith(begins)]

    def planned(self, block: str) -> list[str]:
        """The full names of the planned layers in a block."""
        return [name for name in self.work.sites if name.startswith(f"{block}.")]

    @contextmanager
    def block(self, name: str) -> Iterator[nn.Module]:
        """Read a block, and hold it while the context is entered."""
        block = self._filled(name)
        for full in self.planned(name):
            weight = self.work.sites[full].matrix_of(block.get_submodule(full.removeprefix(f"{name}.")))
            _checks.matrix(weight, self.work.formats[full].shape, f"the weight of layer {full!r}")
        yield block

    def _filled(self, name: str) -> nn.Module:
        """A copy of a block, with its values from the files."""
        block = copy.deepcopy(self.model.get_submodule(name))
        stored = {own: self.files.stored_as(f"{name}.{own}") for own in block.state_dict()}
        tensors = self.files.read(dict.fromkeys(stored.values()))
        block.load_state_dict({own: tensors[at] for own, at in stored.items() if at in tensors}, assign=True)
        return block


class OnDisk(DiskBlocks):
    """The blocks of a checkpoint that is compressed: each is written when that is done.

    Args:
        model: The model on the meta device, as for ``DiskBlocks``.
        work: The work list.
        files: The dense checkpoint.
        output: The new one.
        batch: The inputs of a call; None where the model is not called.
    """

    def __init__(
        self, model: Any, work: WorkList, files: CheckpointReader, output: CheckpointWriter, batch: Any = None
    ) -> None:
        super().__init__(model, work, files, batch)
        self.output = output

    def finish(self, name: str, compressed: nn.Module, fits: dict[str, Fit]) -> dict[str, Fit]:
        """Write a compressed block; the factors of the fits that are returned are on the meta device."""
        state = {f"{name}.{own}": tensor for own, tensor in compressed.state_dict().items()}
        state = {full: tensor for full, tensor in state.items() if self.files.stored_as(full) == full}
        state |= {f"{name}.{own}": byte for own, byte in placeholders(compressed).items()}
        self.output.write(f"block-{len(self.output.weight_map):08d}.safetensors", state)
        return {
            own: dataclasses.replace(fit, factors={key: factor.to("meta") for key, factor in fit.factors.items()})
            for own, fit in fits.items()
        }


def _hollow(parameters: Mapping[str, nn.Parameter | None]) -> dict[str, nn.Parameter | None]:
    """Parameters of the same shapes and dtypes on the CPU, each of one number in memory."""
    return {
        name: None if one is None else nn.Parameter(one.new_zeros((), device="cpu").expand(one.shape), False)
        for name, one in parameters.items()
    }


def _fit_weights(work: WorkList, blocks: OnDisk, store: FitStore | None, progress: bool) -> dict[str, Fit]:
    """Fit the weights of every block as they are, without data."""
    fits: dict[str, Fit] = {}
    with FitBar({"fits": sum(work.cost(name, aware=False) for name in work.sites)}, progress) as bar:
        for name in blocks.chain.names:
            with blocks.block(name) as block:
                own = {full.removeprefix(f"{name}."): full for full in blocks.planned(name)}
                tasks = [work.task(site.name, site) for site in sites_in(block, own).values()]
                new = fit_tasks(tasks, bar, store)
                put_fits_(block, {key: new[full] for key, full in own.items()})
                fits |= blocks.finish(name, block, new)
    return fits


def _finish(model: Any, plan: Mapping[str, Format], blocks: OnDisk, source: Path, folder: Path, out: Path) -> None:
    """Write what lies outside the blocks, the index, and the configuration; copy the tokenizer's files; move it all."""
    blocks.output.write("outside.safetensors", blocks.files.read(blocks.names_outside()))
    blocks.output.write_index()
    apply_plan_(model, plan)
    write_down(model)
    model.config.save_pretrained(folder)
    record_digests(folder, blocks.output.digests)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    for path in source.iterdir():
        known = path.suffix in COPIED and not path.name.endswith("index.json")
        if path.is_file() and known and not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)
    os.replace(folder, out)
    (out / MARKER).unlink()


def _one_example(batch: Any) -> Any:
    """The first example of a batch, whose states take less memory; the whole batch where that is not plain to see."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    lengths = {len(value) if isinstance(value, Tensor) and value.ndim else None for value in values}
    if len(lengths) > 1 or None in lengths:
        return batch
    if isinstance(batch, Mapping):
        return {name: value[:1] for name, value in batch.items()}
    return batch[:1] if isinstance(batch, Tensor) else type(batch)(value[:1] for value in batch)
