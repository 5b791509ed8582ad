"""What the operators share: autocast, and how much a CPU works on at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

MIB = 2**20

TRITON = "triton"
"""Name of the algorithms that are kernels of our own; they run on a GPU, and on a CPU in triton's interpreter."""

MOST_KEPT = 64
"""MiB that a thread keeps for intermediates, at most, for each dtype."""

FEWEST_KEPT = 33
"""Tokens from which on a product on a CPU keeps intermediates for its backward; it has faster ways for fewer."""

ROW_SPLITS = 8
"""Into how many parts the rows of a matrix go for a product with few vectors on a CPU."""


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast wants the operands of a product; unchanged outside of it."""
    device = tensors[0].device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)
    return tensors


class _Workspace(threading.local):
    """Memory of a thread for intermediates on a CPU, by dtype: fresh pages cost more than the products in them."""

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}


_WORKSPACE = _Workspace()


def workspace(x: Tensor, *counts: int) -> list[Tensor]:
    """Flat uninitialised tensors of these lengths, valid until the next call in this thread.

    Args:
        x: Whose dtype and device they have; on other devices than a CPU the memory is new.
        counts: Lengths.

    Returns:
        The tensors.
    """
    if x.device.type != "cpu" or sum(counts) * x.element_size() > MOST_KEPT * MIB:
        return [x.new_empty(count) for count in counts]
    buffer = _WORKSPACE.buffers.get(x.dtype)
    if buffer is None or len(buffer) < sum(counts):
        with torch.inference_mode(False):  # or nothing but inference could write to it later
            buffer = _WORKSPACE.buffers[x.dtype] = torch.empty(sum(counts), dtype=x.dtype)
    return list(buffer[: sum(counts)].split(list(counts)))


def side_by_side(*tensors: Tensor) -> list[Tensor]:
    """The tensors, contiguous."""
    return [tensor.contiguous() for tensor in tensors]


def plain() -> bool:
    """Whether PyTorch's own operators alone can be used: for other runtimes, in ``torch.func`` and forward mode."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
    return transformed or forward_ad._current_level >= 0


def keeps_intermediates(x: Tensor, *factors: Tensor) -> bool:
    """Whether what a product computes on the way is kept for its backward: on a CPU, where factors learn."""
    learning = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
    return learning and x.device.type == "cpu" and x.shape[0] >= FEWEST_KEPT


def save_with_kept(ctx: Any, kept: Tensor, *tensors: Tensor) -> None:
    """Save tensors for a backward product, the last of them an output that is kept for it alone and has no gradient."""
    ctx.mark_non_differentiable(kept)
    ctx.set_materialize_grads(False)  # or zeros as large as what is kept would be made for it
    ctx.save_for_backward(*tensors, kept)


def is_half(x: Tensor) -> bool:
    """Whether sums must not be rounded to this dtype on the way."""
    return x.dtype in (torch.float16, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, algorithm: str = "") -> Tensor:
    """``x @ weight.T``, on a CPU in the form that is fastest for the number of vectors.

    ``F.linear`` in float32 reads the weight at half of the memory's speed for few vectors; a batch of its rows goes at
    full speed, and for some more vectors, so does the transposed product.

    Args:
        x: ``(T, N)``.
        weight: ``(M, N)``.
        algorithm: One of ``LINEAR``; empty for the automatic choice.

    Returns:
        ``(T, M)``.
    """
    return LINEAR[algorithm or _automatic(x, weight)](x, weight)


def _automatic(x: Tensor, weight: Tensor) -> str:
    T = x.shape[0]
    if x.device.type == "cpu" and 0 < T <= 8 and not is_half(x) and len(weight) >= 2 * ROW_SPLITS:
        return "split"
    return "transposed" if x.device.type == "cpu" and not is_half(x) and 8 < T <= 64 else "linear"


def _split(x: Tensor, weight: Tensor) -> Tensor:
    T, (M, N) = x.shape[0], weight.shape
    height = M // ROW_SPLITS
    split = height * ROW_SPLITS
    rows = weight[:split].unflatten(0, (ROW_SPLITS, height))
    y = torch.bmm(x.expand(ROW_SPLITS, T, N), rows.mT).transpose(0, 1).reshape(T, split)
    return y if split == M else torch.cat([y, x @ weight[split:].mT], 1)


def _transposed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(weight, x.mT).mT.contiguous()


LINEAR: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "split": _split,
    "transposed": _transposed,
}
"""Ways to multiply vectors with a matrix, all of them right for every shape, dtype and device."""


def tokens_within(mebibytes: float, numbers: int, x: Tensor) -> int:
    """How many tokens to take at a time so that ``numbers`` each stay within a size, in steps of 16."""
    return max(16, int(mebibytes * MIB) // (x.element_size() * max(numbers, 1)) // 16 * 16)
