"""Which vectors of a layer are tokens that count, and which are padding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from structmat.network.calls import call, device_of, evaluating, moved, same_draws, tensors_of
from structmat.network.capture import hooked

MASK = "attention_mask"
"""How the name ends under which a batch holds a mask that is true where a token counts."""

PADDING_MASK = "key_padding_mask"
"""How the name ends under which a batch holds a mask that is true where a token is padding."""

CONTENT = ("input_ids", "inputs_embeds", "input_features", "input_values")
"""The usual names of what tokens say, after the part before the mask's ending; others count where none is there."""

NO_CONTENT = ("labels", "position_ids", "token_type_ids", "cache_position")
"""How names end under which a batch holds what belongs to tokens, but is not what they say."""

MOST = 0.5
"""The share of vectors above which most of them change."""

LEAST_SCORE = -0.05
"""A mask fits a layer's vectors if this much more of the padding changes than of the tokens.

Where a network lets padding change everything, all layers have 0, and the mask's word holds where its shape fits.
"""

Scored = dict[str, tuple[float, "Rule"]]
"""Rules by layer, each with how much more of the padding than of the tokens it is right about."""


def masks_of(batch: Any) -> dict[str, Tensor]:
    """The masks of a batch.

    Args:
        batch: The inputs of one call.

    Returns:
        Which tokens count, ``(B, T)`` of booleans, by the name under which the batch holds it.
    """
    if not isinstance(batch, Mapping):
        return {}
    found = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.ndim == 2}
    counting = {key: value.bool() for key, value in found.items() if str(key).endswith(MASK)}
    return counting | {
        key: ~value for key, value in found.items() if str(key).endswith(PADDING_MASK) and value.dtype == torch.bool
    }


Layout = Callable[[Tensor, torch.Size], Tensor | None]
"""Lays a mask ``(B, T)`` out as vectors of a shape; None where it does not fit."""


def _in_rows(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """One vector for a token, sequence by sequence: ``(B, T)``, ``(B T,)`` and the like."""
    return mask.reshape(shape) if shape.numel() == mask.numel() else None


def _in_columns(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """One vector for a token, time step by time step: ``(T, B)``, ``(T B,)``."""
    return mask.mT.reshape(shape) if shape.numel() == mask.numel() else None


def _spread(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """Several vectors for a token: ``(B, T, H)`` or ``(B, H, T)``."""
    B, T = mask.shape
    if len(shape) < 3 or shape[0] != B or T not in shape[1:]:
        return None
    axis = shape[1:].index(T) + 1
    return mask.reshape(B, *(T if k == axis else 1 for k in range(1, len(shape)))).expand(shape)


def _behind_others(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """Further vectors, which count, before the tokens: ``(B, P + T)``."""
    return _beside(mask, shape, before=True)


def _before_others(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """Further vectors, which count, after the tokens: ``(B, T + P)``."""
    return _beside(mask, shape, before=False)


def _beside(mask: Tensor, shape: torch.Size, *, before: bool) -> Tensor | None:
    B, T = mask.shape
    if len(shape) != 2 or shape[0] != B or shape[1] <= T:
        return None
    others = mask.new_ones(B, shape[1] - T)
    return torch.cat([others, mask] if before else [mask, others], 1)


LAYOUTS: tuple[Layout, ...] = (_in_rows, _in_columns, _spread, _behind_others, _before_others)
"""The layouts, the most frequent first."""


@dataclass(frozen=True)
class Rule:
    """How the vectors of a layer are told apart.

    Attributes:
        key: The name of the mask in a batch.
        layout: How the mask is laid out.
    """

    key: str
    layout: Layout


SHAPE_RULE = Rule(MASK, _in_rows)
"""What holds for a layer of a network that cannot be called to find out."""


@dataclass(frozen=True)
class BatchMasks:
    """Which vectors count in one batch.

    Attributes:
        masks: The masks ``(B, T)`` by name.
        rules: The rule of each layer by name.
        default: The rule of all other layers; None where all of their vectors count.
    """

    masks: Mapping[str, Tensor] = field(default_factory=dict)
    rules: Mapping[str, Rule] = field(default_factory=dict)
    default: Rule | None = None

    def counted(self, name: str, vectors: Tensor) -> Tensor | None:
        """Which vectors of a layer count.

        Args:
            name: The layer's name.
            vectors: What the layer reads, ``(..., N)``.

        Returns:
            ``(...)`` of booleans; None where all of them count.
        """
        rule = self.rules.get(name, self.default)
        if rule is None or rule.key not in self.masks:
            return None
        mask = rule.layout(self.masks[rule.key], vectors.shape[:-1])
        return None if mask is None else mask.to(vectors.device)


def find_masks(
    model: nn.Module, batches: Sequence[Any], inputs: Mapping[str, nn.Module], outputs: Mapping[str, nn.Module]
) -> list[BatchMasks]:
    """Find out which vectors of layers are padding, whatever their shape.

    For each mask the network is called twice on the first batch that has padding, with other content where the mask
    says padding. A layer's vectors that change are padding. Where none changes, the network may have set the padding to
    zero; a third call with other content in the place of real tokens shows this, or a fourth with a token less. A layer
    whose vectors the mask does not tell apart, such as a decoder's by the encoder's mask or an image's patches, counts
    them all. No call is made where no batch has padding.

    Args:
        model: The network, in evaluation mode.
        batches: The inputs of one call each.
        inputs: The modules whose input is looked at, by name.
        outputs: The modules whose outputs are looked at, by name; a name with ``>`` and a number is that of each tensor
            that the module returns.

    Returns:
        The masks of each batch.

    Warns:
        UserWarning: If vectors of a layer change with the content of padding, but no mask tells which they are.
    """
    masks = [masks_of(batch) for batch in batches]
    padded: dict[str, int] = {}
    for i, found in enumerate(masks):
        for key, mask in found.items():
            if not mask.all() and (key not in padded or not masks[padded[key]][key].any()):
                padded[key] = i
    if not padded:
        return [BatchMasks() for _ in batches]
    nothing = not all(masks[i][key].any() for key, i in padded.items())
    if nothing or any(parameter.is_meta for parameter in model.parameters()):
        return [BatchMasks(found, default=SHAPE_RULE) for found in masks]
    scored: dict[str, tuple[float, Rule]] = {}
    lost: set[str] = set()
    for key, i in padded.items():
        new, unclear = _Probe(model, batches[i], key, masks[i], inputs, outputs).rules()
        lost |= unclear
        for name, (score, rule) in new.items():
            if name not in scored or score > scored[name][0]:
                scored[name] = score, rule
    rules = {name: rule for name, (_, rule) in scored.items()}
    if lost := lost - set(rules):
        warnings.warn(
            f"the vectors of {sorted(lost)} depend on padding, but no mask of the batch fits their shape, so all of "
            "them count; give batches without padding to have exact moments",
            stacklevel=2,
        )
    return [BatchMasks(found, rules) for found in masks]


Rows = dict[str, list[Tensor]]
"""Two numbers for each vector, ``(..., 2)``, by name, call by call: its norm, and its product with a random vector."""


class _Probe:
    """Calls of the network on one batch with other content in places that one mask names."""

    def __init__(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        key: str,
        masks: Mapping[str, Tensor],
        inputs: Mapping[str, nn.Module],
        outputs: Mapping[str, nn.Module],
    ) -> None:
        self.model, self.batch, self.key, self.masks = model, batch, key, masks
        self.inputs, self.outputs = inputs, outputs
        self.mask = masks[key]

    def rules(self) -> tuple[Scored, set[str]]:
        """The rules of the layers that this mask tells apart, and the layers that it should, but does not."""
        content = self._content()
        if not content:
            return self._by_shape(self._rows({})), set()
        plain = self._rows({})
        other = self._attempt({name: self._other_padding(value) for name, value in content.items()})
        if other is None:
            return self._by_shape(plain), set()
        rules: Scored = {}
        unclear: set[str] = set()
        still: list[str] = []
        for name, rows in plain.items():
            changes = _changes(rows, other.get(name, []))
            if changes is None:
                unclear.add(name)
            elif any(bool((one == 1).any()) for one in changes):
                fitting = self._fitting(changes)
                rules |= {} if fitting is None else {name: fitting}
                unclear |= {name} if fitting is None else set()
            else:
                still.append(name)
        rules |= self._silenced(plain, still, content)
        return rules | self._shortened(plain, [name for name in still if name not in rules], content), unclear

    def _content(self) -> dict[str, Tensor]:
        """What the tokens say, by name in the batch."""
        own = self.key.removesuffix(MASK).removesuffix(PADDING_MASK)
        others = [key.removesuffix(MASK).removesuffix(PADDING_MASK) for key in self.masks if key != self.key]
        found: dict[str, Tensor] = {}
        for name, value in self.batch.items():
            fits = isinstance(value, Tensor) and value.shape[:2] == self.mask.shape and name not in self.masks
            if fits and value.dtype != torch.bool and not str(name).endswith(NO_CONTENT):
                found[name] = value
        named = {name: value for name, value in found.items() if name in [f"{own}{usual}" for usual in CONTENT]}
        own_prefix = {name: value for name, value in found.items() if own and name.startswith(own)}
        return named or own_prefix or {n: v for n, v in found.items() if not any(o and n.startswith(o) for o in others)}

    def _other_padding(self, value: Tensor) -> Tensor:
        """Content in which the padding is another: real tokens, the rarest ones, since no placeholder is rare."""
        mask, new = self.mask.to(value.device), value.clone()
        if value.is_floating_point():
            new[~mask] = value[mask].roll(1, 0)[:1].expand(int((~mask).sum()), *value.shape[2:]) + 1
            return new
        real, counts = value[mask].reshape(-1).unique(return_counts=True)
        for one in real[counts.argsort()].tolist():
            new[~mask] = one
            if not torch.equal(new, value):
                break
        return new

    def _other_tokens(self, value: Tensor) -> Tensor:
        """Content in which each sequence has its real tokens in another order."""
        new = value.clone()
        for row, mask in enumerate(self.mask.to(value.device)):
            new[row, mask] = value[row, mask].roll(1, 0)
        return new

    def _attempt(self, content: Mapping[str, Tensor]) -> Rows | None:
        """The rows with other content; None where the network does not take it."""
        try:
            return self._rows(content)
        except Exception:  # whatever a network raises on content that nobody chose
            return None

    def _rows(self, content: Mapping[str, Tensor]) -> Rows:
        """Call the network on the batch with this content."""
        rows: Rows = {}
        device = device_of(self.model)

        def before(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            rows.setdefault(name, []).append(_row_numbers(args[0]))

        def after(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            for j, tensor in enumerate(tensors_of(output)):
                rows.setdefault(f"{name}>{j}", []).append(_row_numbers(tensor))

        watched = hooked(self.inputs, before=before), hooked(self.outputs, after=after)
        with torch.no_grad(), evaluating(self.model), same_draws(0, device), watched[0], watched[1]:
            call(self.model, moved({**self.batch, **content}, device))
        return rows

    def _fitting(self, changes: Sequence[Tensor]) -> tuple[float, Rule] | None:
        """The rule by which the most padding changes and the fewest tokens, with how many more."""
        shares = self._shares(changes)  # in a sliding window, some padding sees one token alone and does not change
        found = [(padding - real, rule) for rule, padding, real in shares if padding > (MOST if real else 0)]
        best = max(found, key=lambda pair: pair[0], default=None)
        return best if best is not None and best[0] > LEAST_SCORE else None

    def _silenced(self, plain: Rows, names: Sequence[str], content: Mapping[str, Tensor]) -> Scored:
        """The rules of layers in which tokens change with their content, and padding changes with nothing."""
        fit = [n for n in names if any(self._shares([torch.zeros(one.shape[:-1]) for one in plain[n]]))]
        other = self._attempt({name: self._other_tokens(value) for name, value in content.items()}) if fit else None
        rules: Scored = {}
        for name in fit if other else ():
            changes = _changes(plain[name], (other or {}).get(name, []))
            for rule, padding, real in self._shares(changes or []):
                if padding < MOST < real:
                    rules.setdefault(name, (real - padding, rule))
        return rules

    def _shortened(self, plain: Rows, names: Sequence[str], content: Mapping[str, Tensor]) -> Scored:
        """The rules of layers that read one vector less for each sequence where it has one token less.

        In such layers padding may depend on nothing but the tokens, as where it attends to all of them alike.

        Args:
            plain: The rows of the layers, by name.
            names: The names of the layers that nothing else told apart.
            content: What the tokens say, by name in the batch.

        Returns:
            The rules by name.
        """
        B, T = self.mask.shape
        own = self.key.removesuffix(MASK).removesuffix(PADDING_MASK)
        beside = [self.key, *(f"{own}{one}" for one in NO_CONTENT if one != "labels")]  # which may be a decoder's
        more = {n: v for n, v in self.batch.items() if n in beside and getattr(v, "shape", None) == (B, T)}
        fit = [name for name in names if all(one.shape[:-1] == (B, T) for one in plain[name])]
        shorter = {name: value[:, :-1] for name, value in (more | {**content}).items()}
        other = (self._attempt(shorter) if fit and T > 1 else None) or {}
        cut = [name for name in fit if name in other and all(one.shape[:-1] == (B, T - 1) for one in other[name])]
        return {name: (0.0, Rule(self.key, _in_rows)) for name in cut}

    def _shares(self, changes: Sequence[Tensor]) -> list[tuple[Rule, float, float]]:
        """For each layout that fits, the share of padding that changes, and the share of tokens."""
        found: list[tuple[Rule, float, float]] = []
        for layout in LAYOUTS:
            masks = [layout(self.mask.cpu(), one.shape) for one in changes]
            pairs = [(mask, one) for mask, one in zip(masks, changes, strict=True) if mask is not None]
            if pairs:
                mask, changed = (
                    torch.cat([one.reshape(-1).float() for one in part]) for part in zip(*pairs, strict=True)
                )
                padding, real = (float(changed[mask == side].nanmean().nan_to_num(0)) for side in (0, 1))
                found.append((Rule(self.key, layout), padding, real))
        return found

    def _by_shape(self, rows: Rows) -> Scored:
        """The rules by shape alone, for a mask whose tokens cannot be given other content."""
        fits = {n: all(_in_rows(self.mask, one.shape[:-1]) is not None for one in found) for n, found in rows.items()}
        return {name: (0.0, Rule(self.key, _in_rows)) for name, fit in fits.items() if fit}


def _row_numbers(tensor: Tensor) -> Tensor:
    """Two numbers ``(..., 2)`` for each vector of ``(..., N)``: its norm, and its product with a random vector."""
    wide = tensor.detach().double()
    random = torch.randn(wide.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
    tolerance = min(eps**0.5, 100 * eps)
    return torch.stack([tolerance * torch.linalg.vector_norm(wide, dim=-1), wide @ random.to(wide.device)], -1).cpu()


def _changes(rows: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor] | None:
    """Which vectors differ, call by call: 1 or 0, and NaN for one that is zero, which says nothing of where it is from.

    Args:
        rows: Two numbers for each vector, call by call.
        others: The same of other calls.

    Returns:
        ``(...)`` for each call; None where the shapes differ, so that none corresponds to another.
    """
    if [one.shape for one in rows] != [one.shape for one in others]:
        return None
    changes: list[Tensor] = []
    for a, b in zip(rows, others, strict=True):
        size = torch.maximum(a[..., 0], b[..., 0])
        changed = ((a[..., 1] - b[..., 1]).abs() > size).float()
        changes.append(changed.where((size > 0) | (a[..., 1] != b[..., 1]), torch.nan))
    return changes
