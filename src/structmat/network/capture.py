"""What the layers of a network read while it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from structmat.network.sites import Site
from structmat.nn import unfolded


def mask_of(batch: Any) -> Tensor | None:
    """The attention mask of a batch, ``(batch, tokens)`` of booleans, where it has one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def shared_inputs(sites: Mapping[str, Site], run: Callable[[], object]) -> tuple[dict[str, str], set[str]]:
    """For each site, in the order in which they are called, the first one that reads the same input.

    Args:
        sites: By name.
        run: Calls the network once.

    Returns:
        The leader's name by name, and the names of the sites that are called once.

    Raises:
        ValueError: If a site is not called.
    """
    calls: dict[str, list[tuple[Tensor, int]]] = {}  # with how often it had been changed in place

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            version = 0 if inputs[0].is_inference() else inputs[0]._version
            calls.setdefault(name, []).append((inputs[0], version))

        return hook

    _with_hooks(sites, note, run)
    missing = [site.name for name, site in sites.items() if name not in calls]
    if missing:
        raise ValueError(
            f"the calibration data never reaches {missing}; give data that does, or exclude these layers from the plan"
        )
    leaders: dict[str, str] = {}
    for name, tensors in calls.items():
        same = (
            other
            for other in leaders.values()
            if len(calls[other]) == len(tensors)
            and type(sites[other].module) is type(sites[name].module) is not nn.Conv2d
            and all(a is b and m == n for (a, m), (b, n) in zip(calls[other], tensors, strict=True))
        )
        leaders[name] = next(same, name)
    return leaders, {name for name, tensors in calls.items() if len(tensors) == 1}


class Captured(BaseException):
    """Ends a call once the input that was wanted is there."""


class capturing:
    """While it is entered, the inputs of sites are collected as vectors ``(T, N)``.

    Args:
        sites: By name.
        captured: Where to put them, by name.
        mask: Which tokens count ``(batch, tokens)``; None for all.
        stop: Whether the first input ends the call, by a ``Captured`` that leaving the context catches.
    """

    def __init__(
        self, sites: Mapping[str, Site], captured: dict[str, list[Tensor]], mask: Tensor | None, stop: bool = False
    ) -> None:
        self._sites, self._captured, self._mask, self._stop = sites, captured, mask, stop
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
                vectors = _vectors(self._sites[name].name, module, inputs[0], self._mask)
                self._captured.setdefault(name, []).append(vectors)
                if self._stop:
                    raise Captured

            return hook

        self._handles = _hooked(self._sites, note)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        for handle in self._handles:
            handle.remove()
        return kind is Captured


def _hooked(sites: Mapping[str, Site], note: Callable[[str], Callable[..., None]]) -> list[Any]:
    return [module.register_forward_pre_hook(note(name)) for name, site in sites.items() for module in site.modules]


def _with_hooks(
    sites: Mapping[str, Site], note: Callable[[str], Callable[..., None]], run: Callable[[], object]
) -> None:
    handles = _hooked(sites, note)
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


def _vectors(name: str, module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """What the layer's matrix multiplies, ``(T, N)``, without the tokens that the mask leaves out; a copy."""
    if isinstance(module, nn.Conv2d):
        x = unfolded(module, x if x.ndim == 4 else x[None])[0]
    vectors = x[mask] if mask is not None and mask.shape == x.shape[:-1] else x.reshape(-1, x.shape[-1]).clone()
    if not torch.isfinite(vectors).all():
        raise FloatingPointError(f"the input of layer {name!r} is not finite; check the calibration data and the dtype")
    return vectors
