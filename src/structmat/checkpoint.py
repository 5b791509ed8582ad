"""Save and load a structured network: one safetensors file with the plan inside."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structmat import _checks
from structmat._digests import check, digests, sealed
from structmat._files import parse_json, read_tensors, write_tensors
from structmat.network.fused import Holder
from structmat.network.sites import find_sites, structured_layers
from structmat.network.splitting import holders_of, split_, split_modules
from structmat.network.surgery import apply_plan_, check_layer
from structmat.plan import Plan, plan_of

SCHEMA_VERSION = 1
"""The version of the checkpoint's metadata."""


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""The dtypes that a file may have for floating-point tensors, whichever of them the network has."""


def save_model(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network to one safetensors file, atomically.

    The file holds the state dict, each shared tensor once, and in its metadata the plan, the names that share a
    tensor, a digest of every tensor, and a schema version.

    Args:
        model: The network, structured or not.
        path: The file; an existing one is replaced.

    Raises:
        ValueError: If a tensor of the network is on the meta device, or a module has extra state, which is no tensor.
    """
    owners: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"expected tensors alone in the state dict, but {name!r} is a {type(tensor).__name__}")
        if tensor.is_meta:
            raise ValueError(f"expected a model with values, but {name!r} is on the meta device; load it first")
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        key = place if tensor.numel() else (name,)
        if key in owners:
            aliases[name] = owners[key]
            continue
        owners[key] = name
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    record: dict[str, Any] = {"plan": json.loads(plan_of(model).to_json()), "aliases": aliases}
    dense = [name for name, module in split_modules(model).items() if not structured_layers(module)]
    record |= {"split": dense} if dense else {}
    seal = sealed(record, digests(tensors))
    write_tensors(path, tensors, {"structmat": json.dumps({"schema": SCHEMA_VERSION, **record, "digests": seal})})


def load_model(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Fill a network from a file that ``save_model`` wrote, replacing its layers as the file's plan says, in place.

    Everything is checked before anything changes.

    Args:
        model: The network with its dense layers, as its constructor makes it; on the meta device it takes over the
            file's tensors and their dtype, otherwise they are copied into its own dtype and device.
        path: The file.

    Returns:
        The same network.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no structmat checkpoint, is of a newer schema, its plan does not fit the network, a
            tensor is missing, is extra, or has another shape or kind of number, factors do not fit their format or are
            not finite, a tensor or the plan is not as it was saved, the network shares a tensor that the file does not,
            or a non-persistent buffer is on the meta device.
    """
    tensors, header = read_checkpoint(path)
    plan, aliases = header.plan, header.aliases
    state = {**tensors, **{alias: tensors[name] for alias, name in aliases.items() if name in tensors}}
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    with _checks.about(os.fspath(path)):
        splits = _holders(model, {*plan, *(f"{name}." for name in header.split)})
        _checks.same_shapes(got, _expected_shapes(model, plan, splits), f"the checkpoint {os.fspath(path)!r}")
        _check_values(model, plan, state)
        _check_ties(model, state, aliases)
        check(header.seal, header.record, tensors, os.fspath(path))
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in model.state_dict()]
    if lost:
        raise ValueError(
            f"expected values for the non-persistent buffers {lost}, which no checkpoint holds, but they are "
            "on the meta device; build the model on a real device, or give the buffers their values there first"
        )
    with _checks.about(os.fspath(path)):
        apply_plan_(model, plan)
    split_(model, _holders(model, {f"{name}." for name in header.split}))
    model.load_state_dict(state, assign=on_meta)
    if on_meta:  # assigning makes a new parameter for every name
        for alias, name in aliases.items():
            parent, _, child = alias.rpartition(".")
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), child, getattr(model.get_submodule(owner), own))
    return model


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of its tensors.

    Attributes:
        plan: The format of each structured layer.
        aliases: The names that share the tensor of another name, and that name.
        record: Both as they are in the file, with ``split``.
        seal: The digests; empty in files of versions that wrote none.
        split: The names of modules that are split into a layer for each matrix, though all of these are dense.
    """

    plan: Plan
    aliases: Mapping[str, str]
    record: Mapping[str, Any]
    seal: Any
    split: Sequence[str] = ()


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Header]:
    """Read a file that ``save_model`` wrote.

    Args:
        path: The file.

    Returns:
        The tensors by name, and what the file says of them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no structmat checkpoint, or is of a newer schema; the message names the file.
    """
    tensors, metadata = read_tensors(path)
    if "structmat" not in metadata:
        raise ValueError(
            f"expected a checkpoint written by structmat.save_model, got {os.fspath(path)!r} without its header"
        )
    what = "the header of a checkpoint"
    with _checks.about(os.fspath(path)):
        header = parse_json(metadata["structmat"], what)
        found = _checks.fields(header, {"schema": int, "plan": dict, "aliases": dict}, what)
        if found["schema"] != SCHEMA_VERSION:
            raise ValueError(
                f"expected a checkpoint of schema {SCHEMA_VERSION}, got {found['schema']}; update structmat"
            )
        aliases = _checks.values(found["aliases"], str, f"'aliases' of {what}")
        plan = Plan.from_data(found["plan"])
        split = _checks.typed(header.get("split", []), list, f"'split' of {what}")
    record = {key: header[key] for key in ("plan", "aliases", "split") if key in header}
    return tensors, Header(plan, aliases, record, header.get("digests", {}), split)


def _check_values(model: nn.Module, plan: Plan, state: Mapping[str, Tensor]) -> None:
    """Refuse tensors of another kind of number than the network has, and factors that do not fit their format."""
    own = model.state_dict()
    kinds = {name: own[name].dtype for name in state if name in own}
    for layer, format in plan.items():
        specs = format.factor_specs()
        factors = {factor: state[f"{layer}.{factor}"] for factor in specs if f"{layer}.{factor}" in state}
        if len(factors) < len(specs):
            continue  # the network has no such layer, which surgery tells
        for factor, spec in specs.items():
            kinds[f"{layer}.{factor}"] = spec.dtype or torch.float32
        check_layer(layer, format, factors)
    for name, tensor in state.items():
        wanted = kinds.get(name, tensor.dtype)
        if tensor.dtype != wanted and not {tensor.dtype, wanted} <= set(FLOATS):
            kind = "floating-point numbers" if wanted.is_floating_point else str(wanted).removeprefix("torch.")
            raise ValueError(f"expected {kind} in {name!r}, got {str(tensor.dtype).removeprefix('torch.')}")


def _check_ties(model: nn.Module, state: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Refuse a file with two tensors for what is one in the network: the later would overwrite the earlier."""
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        other = first.setdefault(id(tensor), name) if name in state else name
        if aliases.get(name, name) != aliases.get(other, other):
            raise ValueError(
                f"the model shares one tensor under {other!r} and {name!r}, but the file has two; untie them"
            )


def _holders(model: nn.Module, wanted: set[str]) -> list[Holder]:
    """What is to be split: by the names of its parts, or by its own with a dot behind."""
    return [
        holder
        for holder in holders_of(model)
        if any(
            name in wanted or f"{name}." in wanted
            for own in holder.names
            for name in (own, *(f"{own}.{part}" for part, _ in holder.twin.named_children()))
        )
    ]


def _expected_shapes(model: nn.Module, plan: Plan, splits: Iterable[Holder]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict that the network will have under the plan."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sites = {name: site for site in find_sites(model).values() for name in site.names}
    for holder in splits:
        for name in holder.names:
            for own in holder.module.state_dict():
                shapes.pop(f"{name}.{own}", None)
            shapes.update((f"{name}.{own}", tuple(one.shape)) for own, one in holder.twin.state_dict().items())
    for planned, format in plan.items():
        for name in sites[planned].names if planned in sites else ():
            shapes.pop(f"{name}.weight", None)
            shapes.update((f"{name}.{factor}", spec.shape) for factor, spec in format.factor_specs().items())
    return shapes
