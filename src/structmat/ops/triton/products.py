"""The batched product ``out_g = a_g b_g^T`` on any strides, which most structures are made of.

Transposes, slices and permutations are views: the kernel reads and writes through their strides, and the columns of the
output may be split into two axes, so that a regrouping costs no pass of its own.

Three ways, of which ``tuning`` picks the fastest for a shape: ``dot``, tiles on the tensor cores; ``vector``, for few
rows of ``a``, where each program holds whole rows of ``b`` in registers and goes over the tokens; and ``library``,
``torch.bmm``, where the output's columns are one axis. The last follows torch's settings for reduced precision.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (launches of kernels, which triton does not type)

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from structmat.ops.triton import tuning
from structmat.ops.triton.tuning import Choice

FEW_TOKENS = 16
"""Up to this many rows, the least that a tile of a product has, weights are read once and bound the time
(``benchmarks/gpu.py`` measures it)."""

FEWEST_TOKENS = 4
"""Up to this many tokens, a launch for each token on its own is tried where its sums stay in registers to the end
(``benchmarks/gpu.py`` measures it)."""

LARGEST_VECTOR = 32768
"""The most entries of ``b`` that a program of the vector kernel holds in registers (``benchmarks/gpu.py`` measures
it)."""

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

# rows, columns, depth, warps, stages; clipped to the product at hand
_DOTS = (
    (128, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 32, 128, 4, 4),
)
_THIN_DOTS = ((256, 32, 32, 4, 2), (512, 32, 32, 8, 2), (128, 32, 64, 4, 3))
_FEW_DOTS = ((16, 32, 256, 4, 3), (16, 64, 128, 4, 4), (16, 16, 256, 2, 4), (16, 128, 64, 4, 4))


@triton.jit
def _dot_kernel(
    a,
    b,
    out,
    rows,
    columns,
    depth,
    a_group,
    a_row,
    a_depth,
    b_group,
    b_column,
    b_depth,
    out_group,
    out_row,
    out_outer,
    out_inner,
    inner,
    groups,
    PRECISION: tl.constexpr,
    COMPUTE: tl.constexpr,
    GROUPS_FIRST: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SWIZZLE: tl.constexpr,
):
    """One tile of one group: ``(ROWS, COLUMNS)``, going ``DEPTH`` at a time."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, ROWS)
    column_tiles = tl.cdiv(columns, COLUMNS)
    if GROUPS_FIRST:  # neighbouring programs write neighbouring entries of different groups
        group = (program % groups).to(tl.int64)
        tile = program // groups
    else:
        group = (program // (row_tiles * column_tiles)).to(tl.int64)
        tile = program % (row_tiles * column_tiles)
    band = SWIZZLE * column_tiles  # tiles that run together share rows and columns in the L2 cache
    first = tile // band * SWIZZLE
    height = tl.minimum(row_tiles - first, SWIZZLE)
    row = ((first + tile % band % height) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tile % band // height * COLUMNS + tl.arange(0, COLUMNS)
    along = tl.arange(0, DEPTH)

    a_at = a + group * a_group + row[:, None] * a_row + along[None, :] * a_depth
    b_at = b + group * b_group + column.to(tl.int64)[None, :] * b_column + along[:, None] * b_depth
    a_inside = (row < rows)[:, None]
    b_inside = (column < columns)[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN:
            a_tile = tl.load(a_at, mask=a_inside, other=0.0)
            b_tile = tl.load(b_at, mask=b_inside, other=0.0)
        else:
            inside = along < depth - start
            a_tile = tl.load(a_at, mask=a_inside & inside[None, :], other=0.0)
            b_tile = tl.load(b_at, mask=b_inside & inside[:, None], other=0.0)
        total = tl.dot(a_tile.to(COMPUTE), b_tile.to(COMPUTE), total, input_precision=PRECISION)
        a_at += DEPTH * a_depth
        b_at += DEPTH * b_depth
    column_at = (column // inner).to(tl.int64) * out_outer + (column % inner).to(tl.int64) * out_inner
    out_at = out + group * out_group + row[:, None] * out_row + column_at[None, :]
    tl.store(out_at, total.to(out.dtype.element_ty), mask=a_inside & b_inside)


@triton.jit
def _vector_kernel(
    a,
    b,
    out,
    rows,
    columns,
    depth,
    a_group,
    a_row,
    a_depth,
    b_group,
    b_column,
    b_depth,
    out_group,
    out_row,
    out_outer,
    out_inner,
    inner,
    groups,
    GROUPS_FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``COLUMNS`` columns of one group for all rows of ``a``; ``b`` is read once, all of it at the same time."""
    program = tl.program_id(0)
    column_tiles = tl.cdiv(columns, COLUMNS)
    if GROUPS_FIRST:
        group = (program % groups).to(tl.int64)
        tile = program // groups
    else:
        group = (program // column_tiles).to(tl.int64)
        tile = program % column_tiles
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    along = tl.arange(0, DEPTH).to(tl.int64)
    inside = (column < columns)[:, None] & (along < depth)[None, :]
    b_at = b + group * b_group + column.to(tl.int64)[:, None] * b_column + along[None, :] * b_depth
    b_tile = tl.load(b_at, mask=inside, other=0.0).to(tl.float32)
    column_at = (column // inner).to(tl.int64) * out_outer + (column % inner).to(tl.int64) * out_inner
    out_at = out + group * out_group + column_at
    a_at = a + group * a_group + along * a_depth
    for _ in range(rows):
        a_row_tile = tl.load(a_at, mask=along < depth, other=0.0).to(tl.float32)
        total = tl.sum(b_tile * a_row_tile[None, :], 1)
        tl.store(out_at, total.to(out.dtype.element_ty), mask=column < columns)
        a_at += a_row
        out_at += out_row


def batched_product(a: Tensor, b: Tensor, out: Tensor, tokens: int, choice: Choice | None = None) -> None:
    """Write ``a_g b_g^T`` to ``out_g``, for every group ``g``.

    Args:
        a: ``(G, m, k)``, on any strides.
        b: ``(G, n, k)``, on any strides.
        out: ``(G, m, n)``, or ``(G, m, n1, n2)`` with ``n = n1 n2``, on any strides; overwritten.
        tokens: The number of tokens; a size that equals it is rounded to a power of two in the key of the measurement.
        choice: One of ``product_choices``; None for the one that ``tuning`` finds fastest.
    """
    if choice is None:
        choices = product_choices(a, b, out)
        key = _key(a, b, out, tokens)
        choice = tuning.choose(key, a.device, choices, lambda one: _launch(a, b, out, one))
    _launch(a, b, out, choice)


def product_choices(a: Tensor, b: Tensor, out: Tensor) -> list[Choice]:
    """The ways in which a product can be launched, the one that is taken unmeasured first.

    Args:
        a: ``(G, m, k)``.
        b: ``(G, n, k)``.
        out: ``(G, m, n)`` or ``(G, m, n1, n2)``.

    Returns:
        At least one.
    """
    m, k, n = a.shape[1], a.shape[2], b.shape[1]
    choices = vector_choices(n, k) if m <= FEW_TOKENS else []
    shapes = _FEW_DOTS if m <= FEW_TOKENS else _THIN_DOTS if n <= 32 else _DOTS
    for choice in tile_choices(shapes, ("rows", "columns", "depth"), (m, n, k), a.dtype):
        choices.append({"way": "dot"} | choice)
    if out.ndim == 3 and a.dtype == b.dtype == out.dtype:
        choices.append({"way": "library"})
    return choices


def vector_choices(n: int, k: int) -> list[Choice]:
    """The launches of the vector kernel: whole rows of ``b``, as many at a time as fill the registers.

    Args:
        n: The number of columns of the product, which are rows of ``b``.
        k: The depth.

    Returns:
        None at all if one row is too long.
    """
    depth, most = triton.next_power_of_2(k), triton.next_power_of_2(n)
    if tuning.interpreted():
        return [{"way": "vector", "columns": min(8, most), "depth": depth, "warps": 1}]
    choices: list[Choice] = []
    for entries, warps in ((8192, 4), (16384, 8), (4096, 4), (LARGEST_VECTOR, 8)):
        choice: Choice = {
            "way": "vector",
            "columns": min(max(entries // depth, 1), most),
            "depth": depth,
            "warps": warps,
        }
        if depth <= entries and choice not in choices:
            choices.append(choice)
    return choices


def tokens_last(groups: int, width: int, tokens: int, like: Tensor) -> Tensor:
    """Room for an intermediate whose tokens lie side by side, each row aligned.

    Args:
        groups: The number of groups, ``G``.
        width: The number of rows of a group.
        tokens: The number of tokens, ``T``.
        like: A tensor of the dtype and on the device.

    Returns:
        ``(G, width, T)``, the rows a multiple of 16 entries apart; uninitialised.
    """
    return torch.empty(groups, width, -(-tokens // 16) * 16, dtype=like.dtype, device=like.device)[..., :tokens]


def segments(x: Tensor, count: int) -> Tensor:
    """A view of ``(T, count width)`` as ``(count, T, width)``."""
    return x.view(x.shape[0], count, -1).transpose(0, 1)


def precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: float32 in full, unless torch is allowed to use TF32 for its own products."""
    matmul = torch.backends.cuda.matmul
    setting = getattr(matmul, "fp32_precision", None)  # since torch 2.9; then reading the older one may raise
    allowed = matmul.allow_tf32 if setting is None else setting == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of every kernel with a ``tl.dot``: its precision and the dtype of its operands."""
    if dtype == torch.bfloat16 and tuning.interpreted():
        dtype = torch.float32  # the interpreter would take the bits of bfloat16 for integers
    return {"PRECISION": precision(dtype), "COMPUTE": _DTYPES[dtype]}


def tile_choices(
    shapes: Sequence[tuple[int, int, int, int, int]],
    names: tuple[str, str, str],
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
) -> list[Choice]:
    """Launches with tiles no larger than what they cover, and no smaller than the 16 that ``tl.dot`` needs.

    Args:
        shapes: Three blocks for entries of two bytes, a tile sums along the last of them; then warps and stages.
        names: The names of the blocks.
        sizes: The sizes that the blocks cover.
        dtype: The dtype of the tensors; the last block is half as long for float32.

    Returns:
        At least one; a small one alone in the interpreter.
    """
    choices: list[Choice] = []
    for *blocks, warps, stages in ((16, 16, 16, 1, 1),) if tuning.interpreted() else shapes:
        blocks[2] = blocks[2] * 2 // dtype.itemsize
        fitting = [max(min(b, triton.next_power_of_2(n)), 16) for b, n in zip(blocks, sizes, strict=True)]
        choice: Choice = {**dict(zip(names, fitting, strict=True)), "warps": warps, "stages": stages}
        if choice not in choices:
            choices.append(choice)
    return choices


def _key(a: Tensor, b: Tensor, out: Tensor, tokens: int) -> str:
    sizes = [a.shape[0], a.shape[1], b.shape[1], a.shape[2]]
    named = "x".join(f"t{tuning.bucket(size)}" if size == tokens else str(size) for size in sizes)
    layout = ".".join("".join("1" if stride == 1 else "-" for stride in t.stride()) for t in (a, b, out))
    return f"product {named} {layout} {a.dtype} {precision(a.dtype)}"


def _launch(a: Tensor, b: Tensor, out: Tensor, choice: Choice) -> None:
    if choice["way"] == "library":
        torch.bmm(a, b.mT, out=out)
        return
    groups, m, k = a.shape
    n = b.shape[1]
    split = out.stride() if out.ndim == 4 else (*out.stride()[:2], 0, out.stride(2))
    inner = out.shape[3] if out.ndim == 4 else n
    columns = int(choice["columns"])
    arguments = (a, b, out, m, n, k, *a.stride(), *b.stride(), *split, inner, groups)
    groups_first = split[0] < split[3]
    if choice["way"] == "vector":
        _vector_kernel[(groups * triton.cdiv(n, columns),)](
            *arguments, GROUPS_FIRST=groups_first, COLUMNS=columns, DEPTH=choice["depth"], num_warps=choice["warps"]
        )
        return
    rows, depth = int(choice["rows"]), int(choice["depth"])
    _dot_kernel[(groups * triton.cdiv(m, rows) * triton.cdiv(n, columns),)](
        *arguments,
        **arithmetic(a.dtype),
        GROUPS_FIRST=groups_first,
        EVEN=k % depth == 0,
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=depth,
        SWIZZLE=8,
        num_warps=choice["warps"],
        num_stages=choice["stages"],
    )
