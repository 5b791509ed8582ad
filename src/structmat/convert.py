"""Surgery: put structured layers into a network, fit them to its weights, take them out again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from structmat import _checks
from structmat._files import read_tensors, write_tensors
from structmat._version import __version__
from structmat.fit import Fit, Method, default_method
from structmat.formats import Dense, Format
from structmat.nn import DENSE_KINDS, Site, StructuredConv2d, StructuredModule, find_sites, put_module

BATCH_BYTES = 64 * 2**20
"""Weights of one shape are fitted together up to this much memory for a copy of them."""


def apply_plan_(
    model: nn.Module,
    plan: Mapping[str, Format],
    *,
    factors: Mapping[str, Mapping[str, Tensor]] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replace the planned layers of a network, in place.

    Biases, training mode, ``requires_grad`` of the weight, dtype and device carry over; a weight that several modules
    share stays shared. The network is checked against the whole plan before anything changes. A layer that already
    has the planned format stays as it is, and so does one planned as ``Dense``.

    Args:
        model: The network; it may live on the meta device.
        plan: Format of each layer by name.
        factors: Factors of each layer by name; None, or a missing layer, for a random init.
        generator: Source of randomness for the init, on the CPU.

    Returns:
        The same network.

    Raises:
        ValueError: If the plan names layers that are not there or cannot be replaced, a shape differs, a format would
            not save parameters, or factors do not fit their format.
    """
    sites = _planned_sites(model, plan)
    factors = factors or {}
    unknown = [name for name in factors if name not in sites]
    if unknown:
        raise ValueError(f"expected factors only of layers that the plan replaces, got some of {unknown}")
    for name, given in factors.items():
        plan[name].check_factors(given)
    replacements: dict[str, StructuredModule] = {}
    for name, site in sites.items():
        replacements |= _structured(model, site, plan[name], factors.get(name), generator)
    for name, module in replacements.items():  # nothing that can fail is left to do
        put_module(model, name, module)
    return model


def _planned_sites(model: nn.Module, plan: Mapping[str, Format]) -> dict[str, Site]:
    """The sites that the plan wants replaced, in its order, after checking all of it."""
    by_name = {name: site for site in find_sites(model).values() for name in site.names}
    present = dict(model.named_modules(remove_duplicate=False))
    planned: dict[str, Site] = {}
    for name, format in plan.items():
        if not isinstance(format, Format):
            raise TypeError(f"expected a format for layer {name!r}, got {format!r}")
        if name not in present:
            raise ValueError(f"expected a module named {name!r}, which the plan wants as {format}; the model has none")
        module = present[name]
        if isinstance(module, StructuredModule):
            if module.format != format:
                raise ValueError(f"expected {name!r} dense or already {format}, got {module.format}; densify_ it first")
            continue
        if isinstance(format, Dense):
            continue
        site = by_name.get(name)
        if site is None or site.problem:
            reason = site.problem if site else f"it is of type {type(module).__name__}"
            raise ValueError(f"layer {name!r} cannot be structured: {reason}")
        if tuple(site.matrix.shape) != format.shape:
            raise ValueError(f"layer {name!r} has shape {tuple(site.matrix.shape)}, but the plan says {format}")
        twice = next((other for other, used in planned.items() if used is site), None)
        if twice is not None:
            raise ValueError(f"the plan names {twice!r} and {name!r}, which share one weight; keep one of them")
        try:
            format.check_saves()
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        planned[name] = site
    return planned


def _structured(
    model: nn.Module,
    site: Site,
    format: Format,
    factors: Mapping[str, Tensor] | None,
    generator: torch.Generator | None,
) -> dict[str, StructuredModule]:
    """The structured modules of a site by the names under which they are to hang."""
    hung: dict[int, list[str]] = {id(module): [] for module in site.modules}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in hung:
            hung[id(module)].append(name)
    replacements: dict[str, StructuredModule] = {}
    first: StructuredModule | None = None
    for old in site.modules:
        new = DENSE_KINDS[type(old)].structured(old, format, factors, generator)
        if new.bias is not None:
            new.bias = old._parameters["bias"]
        for name in format.factor_specs():
            if first is not None:
                setattr(new, name, getattr(first, name))
            elif isinstance(getattr(new, name), nn.Parameter):
                getattr(new, name).requires_grad_(old.get_parameter("weight").requires_grad)
        first = first or new
        new.train(old.training)
        replacements |= dict.fromkeys(hung[id(old)], new)
    return replacements


def compress_(
    model: nn.Module,
    plan: Mapping[str, Format],
    *,
    method: Method[Any] | Callable[[Format], Method[Any] | None] | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, Fit]:
    """Fit the planned layers to their dense weights and replace them, in place.

    Every weight is checked first, then all are fitted, weights of one shape together, then all are replaced: an
    interrupt or an error leaves the network as it was. With ``cache``, finished fits are kept in that folder and a
    second call with the same weights, formats and methods takes them from there, so that it goes on where the first
    one stopped.

    Args:
        model: The network.
        plan: Format of each layer by name; layers planned as ``Dense`` stay.
        method: How to fit: one method for all, or a function of the format; None, also from that
            function, for ``default_method``.
        cache: Folder for finished fits; None for none.
        progress: Whether to show a progress bar.

    Returns:
        The fit of each replaced layer by name.

    Raises:
        ValueError: If the plan does not fit the network, or a weight contains NaN or infinity; named by layer.
        TypeError: If the method cannot fit a format.
    """
    sites = _planned_sites(model, plan)
    for name, site in sites.items():
        _checks.matrix(site.matrix, plan[name].shape, f"the weight of layer {name!r}")
    methods = {name: _method_for(plan[name], method) for name in sites}
    store = _Store(cache) if cache is not None else None

    fits: dict[str, Fit] = {}
    with tqdm(total=len(sites), desc="compress", unit="layer", miniters=0, disable=not progress) as bar:
        for names in _batches(sites, plan, methods):
            weights = [sites[name].matrix for name in names]
            format, how = plan[names[0]], methods[names[0]]
            found = [store.get(weight, format, how) if store else None for weight in weights]
            missing = [index for index, fit in enumerate(found) if fit is None]
            bar.set_postfix_str(names[0], refresh=True)

            def show(step: int, steps: int, errors: tuple[float, ...], first: str = names[0]) -> None:
                bar.set_postfix_str(f"{first}, {step}/{steps}, error {max(errors):.3f}", refresh=False)
                bar.update(0)  # draws, at most ten times a second

            fitted = how.fit_many(
                [weights[index] for index in missing], format, names=[names[index] for index in missing], progress=show
            )
            for index, fit in zip(missing, fitted, strict=True):
                found[index] = fit
                if store:
                    store.put(weights[index], how, fit)
            fits.update((name, fit) for name, fit in zip(names, found, strict=True) if fit is not None)
            bar.update(len(names))
    fits = {name: fits[name] for name in sites}
    apply_plan_(model, {n: plan[n] for n in sites}, factors={n: fit.factors for n, fit in fits.items()})
    return fits


def _method_for(format: Format, method: Method[Any] | Callable[[Format], Method[Any] | None] | None) -> Method[Any]:
    """The method that the caller means for this format."""
    if callable(method) and not isinstance(method, (Method, type)):
        method = method(format)
    if method is None:
        return default_method(format)
    if not isinstance(method, Method):
        raise TypeError(
            f"expected a method such as TruncatedSvd(), or a function that gives one for a format, got {method!r}"
        )
    return method


def _batches(
    sites: Mapping[str, Site], plan: Mapping[str, Format], methods: Mapping[str, Method[Any]]
) -> Iterable[list[str]]:
    """Names of layers with one format, method, dtype and device, in groups of bounded memory."""
    groups: dict[tuple[Format, Method[Any], torch.dtype, torch.device], list[str]] = {}
    for name, site in sites.items():
        groups.setdefault((plan[name], methods[name], site.matrix.dtype, site.matrix.device), []).append(name)
    for (format, *_), names in groups.items():
        size = max(1, BATCH_BYTES // (4 * format.M * format.N))
        yield from (names[k : k + size] for k in range(0, len(names), size))


class _Store:
    """Finished fits in a folder, each under the hash of everything that it depends on."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, weight: Tensor, format: Format, method: Method[Any]) -> Path:
        digest = hashlib.sha256(f"{__version__}|{format!r}|{method!r}|{weight.dtype}|{tuple(weight.shape)}|".encode())
        digest.update(weight.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
        return self.folder / f"{digest.hexdigest()[:32]}.safetensors"

    def get(self, weight: Tensor, format: Format, method: Method[Any]) -> Fit | None:
        path = self._path(weight, format, method)
        if not path.exists():
            return None
        factors, metadata = read_tensors(path)
        format.check_factors(factors)
        facts = json.loads(metadata["fit"])
        factors = {name: factor.to(weight.device) for name, factor in factors.items()}
        return Fit(format, factors, facts["error"], tuple(facts["history"]), facts["seconds"])

    def put(self, weight: Tensor, method: Method[Any], fit: Fit) -> None:
        facts = {"error": fit.error, "history": fit.history, "seconds": fit.seconds, "saved": time.time()}
        write_tensors(self._path(weight, fit.format, method), dict(fit.factors), {"fit": json.dumps(facts)})


def densify_(model: nn.Module, names: Iterable[str] | None = None) -> nn.Module:
    """Turn structured layers back into dense ones, in place: their matrices become real parameters.

    Args:
        model: The network.
        names: Which layers; None for all. Layers that share the factors of one of them come along.

    Returns:
        The same network.

    Raises:
        ValueError: If a name is not that of a structured layer, or it is the whole model.
    """
    hung: dict[int, list[str]] = {}
    layers: dict[str, StructuredModule] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, StructuredModule):
            hung.setdefault(id(module), []).append(name)
            layers[name] = module
    wanted = list(names) if names is not None else list(layers)
    unknown = [name for name in wanted if name not in layers]
    if unknown:
        raise ValueError(
            f"expected names of structured layers, got {unknown}; there are: {', '.join(layers) or 'none'}"
        )
    if "" in wanted:
        raise ValueError("expected layers inside the model, but it is one layer itself; use its to_dense()")
    ties = {_tie(layers[name]) for name in wanted}
    wanted = [name for name, layer in layers.items() if _tie(layer) in ties]
    weights: dict[tuple[int, ...], nn.Parameter] = {}
    for old in {id(layers[name]): layers[name] for name in wanted}.values():
        new = _dense_layer(old)
        shared = _tie(old)
        if shared not in weights:
            learns = any(factor.requires_grad for factor in old.factors.values())
            weight = old.to_dense().detach().clone().view(new.weight.shape)
            weights[shared] = nn.Parameter(weight, requires_grad=learns)
        new.weight = weights[shared]
        new.register_parameter("bias", old.bias)
        new.train(old.training)
        for name in hung[id(old)]:
            put_module(model, name, new)
    return model


def _tie(layer: StructuredModule) -> tuple[int, ...]:
    """What layers that share their factors have in common."""
    return tuple(id(factor) for factor in layer.factors.values())


def _dense_layer(old: StructuredModule) -> nn.Linear | nn.Conv2d:
    """The dense layer that ``old`` stands in for, on the meta device."""
    if not isinstance(old, StructuredConv2d):
        return nn.Linear(old.format.N, old.format.M, device="meta")
    return nn.Conv2d(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        old.stride,
        old.padding,
        old.dilation,
        padding_mode=old.padding_mode,
        device="meta",
    )
