"""What the operators share: autocast, gradients, and how much a CPU works on at a time.

The numbers were tuned by measurement on a CPU; ``benchmarks/cpu.py`` times the layers in which a change of them shows.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

MIB = 2**20

TRITON = "triton"
"""The name of the algorithms that are kernels of our own; they run on a GPU, and on a CPU in triton's interpreter."""

MOST_KEPT = 64
"""The most MiB that a thread keeps for intermediates, for each dtype (tuned with ``benchmarks/cpu.py``)."""

FEWEST_KEPT = 33
"""From this many tokens on, a product on a CPU keeps intermediates for its backward; it has faster ways for fewer
(tuned with ``benchmarks/cpu.py``)."""

ROW_SPLITS = 8
"""The number of parts into which the rows of a matrix go for a product with few vectors on a CPU."""

SPLIT_TOKENS = 8
"""Up to this many vectors a CPU multiplies in such parts in float32 (tuned with ``benchmarks/cpu.py``)."""

TRANSPOSED_TOKENS = 64
"""Up to this many vectors a CPU computes the transposed product in float32 (tuned with ``benchmarks/cpu.py``)."""


def triton_kernels(name: str) -> Any:
    """Import a module of triton kernels, which happens when a product asks for them and not before.

    Args:
        name: The module's name in ``structmat.ops.triton``.

    Returns:
        The module.
    """
    return importlib.import_module(f"structmat.ops.triton.{name}")


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
        x: A tensor whose dtype and device they have; on other devices than a CPU the memory is new.
        counts: The lengths.

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


def traced() -> bool:
    """Whether ``torch.jit.trace`` looks on, for which sizes are tensors: what hangs on them would be a constant."""
    return torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def plain() -> bool:
    """Whether PyTorch's own operators alone can be used: in graphs for elsewhere, ``torch.func`` and forward mode."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
    return transformed or forward_ad._current_level >= 0 or traced()


def unwatched(*tensors: Tensor) -> bool:
    """Whether an operator's code can be called at once: nobody derives, records or compiles the call.

    PyTorch's dispatcher, which finds those who do, costs more than the product of few vectors with a small matrix.

    Args:
        tensors: The input and the factors.

    Returns:
        Whether it can.
    """
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch.autograd._profiler_enabled()  # pyright: ignore[reportPrivateImportUsage]
        or any(type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta for tensor in tensors)
    )


def plain_backward() -> bool:
    """Whether the backward that runs must consist of PyTorch's own operators: where its result is derived again."""
    return torch.is_grad_enabled() or plain()


def plain_gradients(
    product: Callable[..., Tensor], needed: Sequence[bool], upstream: Tensor, *inputs: Tensor
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of an operator so that they have gradients themselves, to any order.

    Args:
        product: What the operator computes, in PyTorch's own operators.
        needed: Which inputs need a gradient; what comes after those of the product is ignored.
        upstream: The gradient of the output.
        inputs: The inputs of the product.

    Returns:
        The gradient of each input; None for those that need none.
    """
    again, needed = torch.is_grad_enabled(), needed[: len(inputs)]
    with torch.enable_grad():
        # views: tensors of their own, even where one is given twice
        own = [value.view_as(value) if needs else value for value, needs in zip(inputs, needed, strict=True)]
        y = product(*own)
    wanted = [value for value, needs in zip(own, needed, strict=True) if needs]
    gradients = iter(torch.autograd.grad(y, wanted, upstream, create_graph=again))
    return tuple(next(gradients) if needs else None for needs in needed)


def keeps_intermediates(x: Tensor, *factors: Tensor) -> bool:
    """Whether what a product computes on the way is kept for its backward: on a CPU, where factors learn."""
    learning = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
    return learning and x.device.type == "cpu" and x.shape[0] >= FEWEST_KEPT


def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save the tensors among an operator's inputs for its backward, and the rest as ``ctx.options``."""
    ctx.options = [value for value in inputs if not isinstance(value, Tensor)]
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))


def save_with_kept(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save the same and, last, the second output, which is kept for the backward alone and has no gradient."""
    ctx.options = [value for value in inputs if not isinstance(value, Tensor)]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or zeros as large as what is kept would be made for it
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)), output[1])


def shaped_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Uninitialised tensors of these shapes and dtypes: what the gradients of an operator look like."""
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


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
    if x.device.type != "cpu" or is_half(x) or not 0 < T <= TRANSPOSED_TOKENS:
        return "linear"
    if T > SPLIT_TOKENS:
        return "transposed"
    return "split" if len(weight) >= 2 * ROW_SPLITS else "linear"


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
