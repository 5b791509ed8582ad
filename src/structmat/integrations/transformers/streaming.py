"""Compression of a transformers checkpoint that does not fit into memory: block by block, from file to file."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from structmat import _checks
from structmat._files import write_atomically, write_tensors
from structmat.compress.api import MethodChoice, method_for
from structmat.compress.refinement import Refinement
from structmat.compress.sequential import Sequence
from structmat.compress.tasks import FitBar, FitStore, Task, fit_tasks
from structmat.fit import Fit
from structmat.formats import Dense, Format
from structmat.integrations.transformers.quantizer import write_down
from structmat.network.calls import evaluating
from structmat.network.chain import Chain, find_chain
from structmat.network.sites import Site
from structmat.network.surgery import apply_plan_, planned_sites
from structmat.nn import StructuredModule

INDEX = "model.safetensors.index.json"

NO_CHAIN = (
    "expected every planned layer inside the blocks of a chain, as in decoders; load this model into memory and use "
    "compress_"
)


def skeleton(source: str | os.PathLike[str]) -> Any:
    """The model of a checkpoint without its weights: what to make a plan for.

    Args:
        source: Folder with ``config.json`` that names the model's class.

    Returns:
        The model on the meta device, in the checkpoint's dtype.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If the configuration names no class of transformers.
    """
    if not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(f"expected a folder with config.json, got {os.fspath(source)!r}")
    config = transformers.AutoConfig.from_pretrained(source)
    named = (config.architectures or [None])[0]
    kind = getattr(transformers, str(named), None)
    if kind is None:
        raise ValueError(f"expected config.json to name a class of transformers under 'architectures', got {named!r}")
    with torch.device("meta"):
        return kind._from_config(config, dtype=config.dtype or torch.float32).eval()


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
        source: Folder of the dense checkpoint, in safetensors files whose tensors bear the modules' names.
        out: Folder to write; it appears when everything is there.
        plan: Format of each layer by name; all within the blocks of the model.
        method: As for ``compress_``.
        batches: As for ``compress_``.
        refine: As for ``compress_``.
        cache: As for ``compress_``.
        progress: Whether to show a progress bar, with a time estimate.

    Returns:
        The fit of each layer, its factors on the meta device: their values are in the files.

    Raises:
        FileExistsError: If ``out`` is there already.
        FileNotFoundError: If the source lacks a file.
        ValueError: If names in the files are not those of the model, the plan does not fit it, or reaches beyond its
            blocks.
    """
    if Path(out).exists():
        raise FileExistsError(f"expected a new folder, but {os.fspath(out)!r} is there; remove it or choose another")
    if refine is not None and batches is None:
        raise ValueError("expected batches to refine on, got none; pass batches=, a list of the network's inputs")
    model = skeleton(source)
    plan = {name: format for name, format in plan.items() if not isinstance(format, Dense)}
    files = _Files(source, model)
    partial = Path(f"{os.fspath(out)}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        sequence = _Streamed(model, plan, files, partial, method, batches, refine, FitStore(cache) if cache else None)
        with FitBar(sequence.cost, progress) as bar, torch.no_grad():
            fits = sequence.run(bar) if batches is not None else sequence.run_without_data(bar)
        sequence.finish(Path(source))
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {name: fits[name] for name in plan}


class _Files:
    """The tensors of a checkpoint by name, read when they are asked for."""

    def __init__(self, source: str | os.PathLike[str], model: nn.Module) -> None:
        folder = Path(source)
        if (folder / INDEX).is_file():
            where = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        elif (folder / "model.safetensors").is_file():
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                where = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise FileNotFoundError(f"expected model.safetensors or {INDEX} in {os.fspath(source)!r}, found neither")
        self.paths = {name: folder / file for name, file in where.items()}
        tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        missing = [name for name in model.state_dict() if name not in self.paths and name not in tied]
        if missing:
            raise ValueError(
                f"expected tensors under the modules' names in {os.fspath(source)!r}, but {missing[0]!r} and "
                f"{len(missing) - 1} others are not there; load this model into memory and use compress_"
            )

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        by_path: dict[Path, list[str]] = {}
        for name in names:
            if name in self.paths:
                by_path.setdefault(self.paths[name], []).append(name)
        tensors: dict[str, Tensor] = {}
        for path, wanted in by_path.items():
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in wanted}
        return tensors


def _with_two_blocks(model: Any) -> Any:
    """A small random model of the same kind, whose embedding holds the special tokens and few others."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    specials = [getattr(text, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
    text.vocab_size = 1 + max([63, *(token for token in specials if isinstance(token, int))])
    text.num_hidden_layers = 2
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:2]
    return type(model)(config)


def _chain_of(model: Any, small: nn.Module, sites: Mapping[str, Site]) -> Chain:
    """The blocks of the model, found by calling the small one."""
    present = {name for name, _ in small.named_modules()}
    planned = {name: site.names for name, site in sites.items() if name in present}
    with evaluating(small):
        chain = find_chain(small, planned, {"input_ids": torch.zeros(1, 4, dtype=torch.long)})
    if chain is None:
        raise ValueError(NO_CHAIN)
    parent = chain.names[0].rpartition(".")[0]
    blocks = tuple(f"{parent}.{child}" for child, _ in model.get_submodule(parent).named_children())
    return dataclasses.replace(chain, names=blocks)


class _Streamed(Sequence):
    """A run whose blocks are read when their turn comes, and written when it is over."""

    model: Any

    def __init__(
        self,
        model: Any,
        plan: Mapping[str, Format],
        files: _Files,
        folder: Path,
        method: MethodChoice,
        batches: Iterable[Any] | None,
        refine: Refinement | None,
        store: FitStore | None,
    ) -> None:
        self.files, self.folder, self.weight_map = files, folder, dict[str, str]()
        sites = planned_sites(model, plan)
        methods = {name: method_for(plan[name], method) for name in sites}
        small = _with_two_blocks(model)
        self.blocks = _chain_of(model, small, sites)
        if any(self.blocks.outside(list(sites))):
            raise ValueError(NO_CHAIN)
        self._load_outside(model, small)
        super().__init__(model, plan, sites, methods, [{}] if batches is None else list(batches), refine, store)

    def _find_chain(self) -> Chain:
        return self.blocks

    def _load_outside(self, model: Any, small: nn.Module) -> None:
        """Give everything outside the blocks its values, non-persistent buffers included."""
        names = [name for name in model.state_dict() if not self._in_block(name)]
        model.load_state_dict(self.files.read(names), strict=False, assign=True)
        buffers = dict(small.named_buffers())  # some are in no file
        for name, buffer in list(model.named_buffers()):
            if buffer.is_meta and not self._in_block(name):
                owner, _, own = name.rpartition(".")
                model.get_submodule(owner).register_buffer(own, buffers[name], persistent=False)
        model.tie_weights()

    def _in_block(self, name: str) -> bool:
        return any(name.startswith(f"{block}.") for block in self.blocks.names)

    @contextmanager
    def _loaded(self, name: str) -> Iterator[nn.Module]:
        block = copy.deepcopy(self.model.get_submodule(name))
        lost = [own for own, buffer in block.named_buffers() if own not in block.state_dict()]
        if lost:
            raise ValueError(f"the buffers {lost} of {name!r} are in no file; load this model into memory")
        tensors = self.files.read(f"{name}.{own}" for own in block.state_dict())
        block.load_state_dict({own.removeprefix(f"{name}."): t for own, t in tensors.items()}, assign=True)
        for own, format in self.plan.items():
            if own.startswith(f"{name}."):
                weight = self.sites[own].matrix_of(block.get_submodule(own.removeprefix(f"{name}.")))
                _checks.matrix(weight, format.shape, f"the weight of layer {own!r}")
        yield block

    def _finished(self, name: str, working: nn.Module, fits: dict[str, Fit]) -> dict[str, Fit]:
        state = {f"{name}.{own}": tensor for own, tensor in working.state_dict().items()}
        for own, module in working.named_modules():
            if isinstance(module, StructuredModule):
                state[f"{name}.{own}.weight"] = torch.zeros(1, dtype=torch.uint8)
        self._write(f"block-{len(self.weight_map):08d}.safetensors", state)
        return {
            own: dataclasses.replace(fit, factors={key: factor.to("meta") for key, factor in fit.factors.items()})
            for own, fit in fits.items()
        }

    def _write(self, file: str, state: Mapping[str, Tensor]) -> None:
        write_tensors(self.folder / file, state, {"format": "pt"})
        self.weight_map |= dict.fromkeys(state, file)

    def run_without_data(self, bar: FitBar) -> dict[str, Fit]:
        """Fit every block's weights as they are."""
        fits: dict[str, Fit] = {}
        for name in self.blocks.names:
            with self._loaded(name) as block:
                own = {n.removeprefix(f"{name}."): n for n in self.plan if n.startswith(f"{name}.")}
                tasks = []
                for key, full in own.items():
                    weight = self.sites[full].matrix_of(block.get_submodule(key)).detach()
                    tasks.append(Task(full, weight, self.plan[full], self.methods[full], weight))
                new = fit_tasks(tasks, bar, self.store)
                formats = {key: self.plan[full] for key, full in own.items()}
                apply_plan_(block, formats, factors={key: new[full].factors for key, full in own.items()})
                fits |= self._finished(name, block, new)
        return fits

    def finish(self, source: Path) -> None:
        """Write what lies outside the blocks, the index, and the configuration; copy the tokenizer's files."""
        names = [name for name in self.model.state_dict() if not self._in_block(name)]
        self._write("outside.safetensors", self.files.read(names))
        size = sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        index = {"metadata": {"total_size": size}, "weight_map": self.weight_map}
        write_atomically(self.folder / INDEX, lambda path: path.write_text(json.dumps(index, indent=1)))
        apply_plan_(self.model, self.plan)
        write_down(self.model)
        self.model.config.save_pretrained(self.folder)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(self.folder)
        for path in source.iterdir():
            known = path.suffix in {".json", ".model", ".txt", ".jinja"} and not path.name.endswith("index.json")
            if path.is_file() and known and not (self.folder / path.name).exists():
                shutil.copy(path, self.folder / path.name)
