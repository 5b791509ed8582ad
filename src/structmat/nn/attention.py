"""The attention of ``nn.MultiheadAttention`` with a layer for each projection."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from structmat.nn.split import SplitModule, joined_parameter, linear_over, with_parameters


class SplitAttention(SplitModule):
    """``nn.MultiheadAttention`` whose projections are the layers ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``.

    Args:
        attention: The attention that this one stands in for; its parameters, or parts of them, become the layers'.

    Attributes:
        q_proj: The projection of the queries; this one and the others are dense or structured linear layers.
        k_proj: The projection of the keys.
        v_proj: The projection of the values.
        out_proj: The projection of the output.
    """

    in_proj_weight = None
    in_proj_bias = None
    _qkv_same_embed_dim = False
    # All three keep the fused paths of nn.TransformerEncoderLayer, which read dense weights, away.

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.kdim, self.vdim = attention.embed_dim, attention.kdim, attention.vdim
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.dropout, self.batch_first = attention.dropout, attention.batch_first
        self.add_zero_attn = attention.add_zero_attn
        if attention._qkv_same_embed_dim:
            weights = _thirds(attention.in_proj_weight)
        else:
            weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        biases = (None, None, None) if attention.in_proj_bias is None else _thirds(attention.in_proj_bias)
        self.q_proj, self.k_proj, self.v_proj = map(linear_over, weights, biases)
        self.out_proj = linear_over(attention.out_proj.weight, attention.out_proj.bias)
        self.register_parameter("bias_k", attention.bias_k)  # pyright: ignore[reportArgumentType]
        self.register_parameter("bias_v", attention.bias_v)  # pyright: ignore[reportArgumentType]
        self.train(attention.training)

    def _added(self) -> tuple[Tensor, Tensor]:
        """The key and the value that the module itself adds."""
        return self.get_parameter("bias_k"), self.get_parameter("bias_v")

    def joined(self) -> nn.MultiheadAttention:
        """PyTorch's own attention with the same weights; every projection must be dense."""
        inputs = [self.q_proj, self.k_proj, self.v_proj]
        weights: list[Tensor] = [layer.weight for layer in inputs]
        biases: list[Tensor] = [layer.bias for layer in inputs if layer.bias is not None]
        attention = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            bool(biases),
            self.bias_k is not None,
            self.add_zero_attn,
            self.kdim,
            self.vdim,
            self.batch_first,
            device="meta",
        )
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        found: dict[str, Any] = dict(zip(names, weights, strict=True))
        if attention._qkv_same_embed_dim:
            found = {"in_proj_weight": joined_parameter(weights)}
        found |= {"in_proj_bias": joined_parameter(biases) if biases else None}
        found |= {"bias_k": self.bias_k, "bias_v": self.bias_v}
        found |= {"out_proj.weight": self.out_proj.weight, "out_proj.bias": self.out_proj.bias}
        return with_parameters(attention, found, self.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as ``nn.MultiheadAttention`` does.

        Args:
            query: ``(L, B, E)``, ``(B, L, E)`` with ``batch_first``, or ``(L, E)``.
            key: ``(S, B, kdim)``, ``(B, S, kdim)`` with ``batch_first``, or ``(S, kdim)``.
            value: ``(S, B, vdim)``, ``(B, S, vdim)`` with ``batch_first``, or ``(S, vdim)``.
            key_padding_mask: ``(B, S)`` or ``(S,)``: true where a key is padding, or what is added to the scores.
            need_weights: Whether the weights are returned too.
            attn_mask: ``(L, S)`` or ``(B heads, L, S)``: true where a query does not see a key, or what is added.
            average_attn_weights: Whether the weights are averaged over the heads.
            is_causal: Whether ``attn_mask`` is the causal mask, which is a hint.

        Returns:
            The output in the layout of the query, and the weights ``(B, L, S)``, with an axis of heads after the batch
            where they are not averaged; None where they are not needed.

        Raises:
            ValueError: If a shape is wrong, or ``is_causal`` comes without a mask.
        """
        batched = query.ndim == 3
        self._check(query, key, value, is_causal and attn_mask is None)
        if not batched:
            query, key, value = (one[None] for one in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        swap = batched and not self.batch_first
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        q, k, v = (self._heads(one.transpose(0, 1) if swap else one) for one in (q, k, v))  # (B, heads, L or S, d)
        k, v, extra = self._extended(k, v)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else _merged(q, k.shape[2], extra, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            if dropout:
                weights = nn.functional.dropout(weights, dropout)
            y = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            y = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        y = y.transpose(1, 2).flatten(2)  # (B, L, E)
        y = self.out_proj(y.transpose(0, 1) if swap else y)
        if batched:
            return y, weights
        return y[0], None if weights is None else weights[0]

    def _check(self, query: Tensor, key: Tensor, value: Tensor, lacks_mask: bool) -> None:
        if any(one.is_nested for one in (query, key, value)):
            raise ValueError("expected plain tensors, got a nested one; pad the sequences and give a key_padding_mask")
        if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim:
            shapes = ", ".join(str(tuple(one.shape)) for one in (query, key, value))
            raise ValueError(f"expected query, key and value with 3 axes each, or 2 without a batch, got {shapes}")
        if lacks_mask:
            raise ValueError("expected an attn_mask with is_causal=True, which is a hint about it, got none")

    def _heads(self, x: Tensor) -> Tensor:
        """``(B, L, E)`` as ``(B, heads, L, d)``."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _extended(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Keys and values with those that the module itself adds, and how many these are."""
        extra = 0
        if self.bias_k is not None:
            more = [self._heads(one.expand(k.shape[0], 1, -1).to(k.dtype)) for one in self._added()]
            k, v, extra = torch.cat([k, more[0]], 2), torch.cat([v, more[1]], 2), extra + 1
        if self.add_zero_attn:
            k, v = (
                torch.cat([one, one.new_zeros(one.shape[0], self.num_heads, 1, self.head_dim)], 2) for one in (k, v)
            )
            extra += 1
        return k, v, extra

    def extra_repr(self) -> str:
        """The sizes."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


def _thirds(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The parts of a fused parameter, on its memory."""
    q, k, v = tensor.chunk(3)
    return q, k, v


def _merged(q: Tensor, keys: int, extra: int, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """What is added to the scores ``(B, heads, L, S)``; keys that the module adds are always seen."""
    found: Tensor | None = None
    B, heads, L, _ = q.shape
    for one, what in ((mask, "attn_mask"), (padding, "key_padding_mask")):
        if one is None:
            continue
        wanted = {
            "attn_mask": [(L, keys - extra), (B * heads, L, keys - extra)],
            "key_padding_mask": [(B, keys - extra)],
        }
        if tuple(one.shape) not in wanted[what]:
            shapes = " or ".join(map(str, wanted[what]))
            raise ValueError(f"expected {what} of shape {shapes}, got {tuple(one.shape)}")
        added = _as_added(one, q.dtype)
        if extra:
            added = nn.functional.pad(added, (0, extra))
        if what == "key_padding_mask":
            added = added[:, None, None]
        elif added.ndim == 3:
            added = added.unflatten(0, (B, heads))
        found = added if found is None else found + added
    return found


def _as_added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of booleans as minus infinity where it is true, or a mask that is added already."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise ValueError(f"expected a mask of booleans or of floating-point numbers, got {mask.dtype}")
    return mask.to(dtype)
