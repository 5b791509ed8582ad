"""The triton kernels in triton's interpreter: products and gradients against the dense definition, in every dtype.

What they read lies between NaN, and so does the memory that they fill, which starts as NaN too. With a GPU and
``TRITON_INTERPRET=0`` in the environment the same tests run compiled.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from structmat import Blast, BlockDiagonal, BlockSparse, Format, Gblr, Monarch
from structmat.formats import TiledGblr, tile

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl


def _imported(*names: str) -> list:
    """Modules of kernels; anew, if triton was imported before the variable was set, as collecting doctests does."""
    if os.environ["TRITON_INTERPRET"] == "1" and type(tl.sum).__name__ != "InterpretedFunction":
        importlib.reload(tl.standard)
        importlib.reload(tl)
        for name in [name for name in sys.modules if name.startswith("structmat.ops.triton.")]:
            del sys.modules[name]
    return [importlib.import_module(f"structmat.ops.triton.{name}") for name in names]


blast, block_diagonal, block_sparse, gblr, monarch, products, tuning = _imported(
    "blast", "block_diagonal", "block_sparse", "gblr", "monarch", "products", "tuning"
)

DEVICE = "cpu" if tuning.interpreted() else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GUARD = 64
"""Entries of NaN on each side of a tensor: 16 times the four bytes to which loads are aligned at least."""

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRUCTMAT_CACHE", str(tmp_path))
    tuning.forget()


def between_nan(values: Tensor) -> Tensor:
    """The same values in memory that has NaN before and after them."""
    around = torch.full((values.numel() + 2 * GUARD,), torch.nan, dtype=values.dtype, device=DEVICE)
    inside = around[GUARD : GUARD + values.numel()].view(values.shape)
    inside.copy_(values)
    return inside


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory is NaN, and lies between more of it, which must still be NaN at the end."""
    originals, made = (torch.empty, torch.empty_like), []

    def empty(*shape, dtype=None, device=None) -> Tensor:
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if dtype not in DTYPES:
            return originals[0](shape, dtype=dtype, device=device)
        inside = between_nan(torch.full(shape, torch.nan, dtype=dtype, device=device))
        made.append(inside)
        return inside

    def empty_like(other: Tensor) -> Tensor:
        return empty(other.shape, dtype=other.dtype, device=other.device)

    torch.empty, torch.empty_like = empty, empty_like
    try:
        yield
    finally:
        torch.empty, torch.empty_like = originals
    assert made
    for inside in made:
        around = inside.new_empty(0).set_(inside.untyped_storage())
        assert around[:GUARD].isnan().all()
        assert around[-GUARD:].isnan().all()


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """As near as rounding what lies between the products to the dtype allows, relative to the largest entry."""
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert got.isfinite().all()
    error = (got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error <= 4 * torch.finfo(dtype).eps, f"{error / torch.finfo(dtype).eps:.1f} eps"


class Case:
    """A format and how its kernels take factors; gradients come back in the order of ``names``, after that of ``x``."""

    def __init__(self, format: Format, names: list[str], forward: Callable, backward: Callable):
        self.format, self.names, self.forward, self.backward = format, names, forward, backward


def blast_case(format: Blast, variant: str | None = None) -> Case:
    (I, J), (P, Q), R = format.blocks, format.block_shape, format.rank

    def views(f: dict) -> tuple[Tensor, ...]:
        return f["left"].view(I, P, R), f["diag"].view(I, J, R), f["right"].view(J, R, Q)

    return Case(
        format,
        ["left", "diag", "right"],
        lambda x, f: blast.blast_forward(x, *views(f), variant),
        lambda up, x, f: blast.blast_backward(up, x, *views(f)),
    )


def monarch_case(format: Monarch) -> Case:
    (I, J), t = format.blocks, format.rank

    def views(f: dict) -> tuple[Tensor, ...]:
        return f["left"].view(I, -1, J, t), f["right"].view(J, I, t, -1), format.permute_output

    return Case(
        format,
        ["left", "right"],
        lambda x, f: monarch.monarch_forward(x, *views(f)),
        lambda up, x, f: monarch.monarch_backward(up, x, *views(f)),
    )


def block_diagonal_case(format: BlockDiagonal) -> Case:
    shape = format.blocks, *format.block_shape
    return Case(
        format,
        ["blocks"],
        lambda x, f: block_diagonal.block_diagonal_forward(x, f["blocks"].view(shape)),
        lambda up, x, f: block_diagonal.block_diagonal_backward(up, x, f["blocks"].view(shape)),
    )


def block_sparse_case(format: BlockSparse) -> Case:
    I, J = len(format.mask), len(format.mask[0])
    on = [[j for j in range(J) if row[j] == "1"] for row in format.mask]
    columns = torch.tensor([j for row in on for j in row], dtype=torch.int32, device=DEVICE)
    starts = torch.tensor([0, *(len(row) for row in on)], device=DEVICE).cumsum(0).to(torch.int32)

    def arguments(f: dict) -> tuple:
        return f["blocks"].view(len(columns), format.M // I, format.N // J), starts, columns, J

    return Case(
        format,
        ["blocks"],
        lambda x, f: block_sparse.block_sparse_forward(x, *arguments(f)),
        lambda up, x, f: block_sparse.block_sparse_backward(up, x, *arguments(f)),
    )


def tiled_case(format: TiledGblr) -> Case:
    def arguments(f: dict) -> tuple[tuple, tuple]:
        inputs = f["right"], format.in_groups, f["right_place"], f["right_rows"], f["right_offsets"]
        return inputs, (f["left"], format.out_groups, f["left_place"], f["left_index"])

    return Case(
        format,
        ["right", "left"],
        lambda x, f: gblr.tile_matmul_forward(x, *arguments(f), format.M),
        lambda up, x, f: gblr.tile_matmul_backward(up, x, *arguments(f)),
    )


def hardened() -> tuple[TiledGblr, dict[str, Tensor]]:
    """Tiles of random segments, of all lengths, on an axis that no block divides."""
    format = Gblr(70, 53, 21, (600, 500))
    return tile(format, format.init(generator=torch.Generator().manual_seed(0)), block_sizes=(32, 24))


CASES: dict[str, Case] = {
    "blast": blast_case(Blast(57, 42, blocks=(3, 2), rank=18)),
    "blast coupled": blast_case(Blast(57, 42, blocks=(3, 2), rank=18), "coupled"),
    "blast fused": blast_case(Blast(57, 42, blocks=(3, 2), rank=18), "fused"),
    "blast one block, rank 1": blast_case(Blast(7, 5, blocks=1, rank=1)),
    "blast many block columns": blast_case(Blast(10, 34, blocks=(5, 17), rank=2)),
    "monarch": monarch_case(Monarch(57, 42, blocks=(3, 2), rank=9)),
    "monarch permuted": monarch_case(Monarch(42, 57, blocks=(2, 3), rank=5, permute_output=True)),
    "block-diagonal": block_diagonal_case(BlockDiagonal(57, 99, blocks=3)),
    "block-sparse": block_sparse_case(BlockSparse(57, 84, ("1101", "0100", "1111"))),
    "block-sparse empty row and column": block_sparse_case(BlockSparse(51, 57, ("101", "000", "100"))),
    "gblr": tiled_case(hardened()[0]),
    "gblr one group, short last block": tiled_case(TiledGblr(75, 53, 7, (3, 3), (3, 19), (33, 20))),
    "gblr three groups": tiled_case(TiledGblr(64, 40, 5, (1, 17, 2, 4, 1, 1), (1, 9, 1, 2, 1, 1), (16, 16))),
}


def factors_and_dense(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Factors between NaN, the same in float64 with gradients, and the dense matrix of these."""
    original = hardened()[1] if case is CASES["gblr"] else case.format.init()
    given = {name: between_nan(f.to(dtype)) if name in case.names else f.to(DEVICE) for name, f in original.items()}
    exact = {n: f.double().requires_grad_() if n in case.names else f for n, f in given.items()}
    return given, exact, case.format.to_dense(exact)


@each_dtype
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("T", [1, 3, 33])
def test_product(name: str, dtype: torch.dtype, T: int) -> None:
    case = CASES[name]
    factors, _, dense = factors_and_dense(case, dtype)
    x = between_nan(torch.randn(T, case.format.N).to(dtype))
    with poisoned_memory():
        y = case.forward(x, factors)
    assert y.is_contiguous()
    assert_near(y, x.double() @ dense.T, dtype)


@pytest.mark.parametrize(("T", "dtype"), [(1, torch.float32), *((17, dtype) for dtype in DTYPES)], ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("blast coupled", "blast fused")])
def test_gradients(name: str, dtype: torch.dtype, T: int) -> None:
    case = CASES[name]
    factors, exact, dense = factors_and_dense(case, dtype)
    x, upstream = (between_nan(torch.randn(T, n).to(dtype)) for n in (case.format.N, case.format.M))
    with poisoned_memory():
        got = case.backward(upstream, x, factors)
    wide = x.double().requires_grad_()
    inputs = [wide, *(exact[name] for name in case.names)]
    expected = torch.autograd.grad(wide @ dense.T, inputs, upstream.double())
    for one, other in zip(got, expected, strict=True):
        assert one.is_contiguous()
        assert_near(one, other.reshape(one.shape), dtype)


def test_without_blocks_the_product_is_zero() -> None:
    x, blocks = torch.randn(3, 10, device=DEVICE), torch.empty(0, 4, 5, device=DEVICE)
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    starts = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    with poisoned_memory():
        y = block_sparse.block_sparse_forward(x, blocks, starts, none, 2)
        gradients = block_sparse.block_sparse_backward(torch.ones_like(y), x, blocks, starts, none, 2)
    assert torch.equal(y, torch.zeros(3, 8, device=DEVICE))
    assert torch.equal(gradients[0], torch.zeros_like(x))
    assert gradients[1].shape == blocks.shape


WAYS = {
    "vector": {"way": "vector", "columns": 16, "depth": 64, "warps": 1},
    "dot": {"way": "dot", "rows": 16, "columns": 32, "depth": 16, "warps": 1, "stages": 1},
    "dot, tiles that fit": {"way": "dot", "rows": 16, "columns": 16, "depth": 16, "warps": 1, "stages": 1},
    "library": {"way": "library"},
}


@each_dtype
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", ["plain", "transposed", "groups inside", "split columns"])
def test_batched_product_on_strides(way: str, layout: str, dtype: torch.dtype) -> None:
    G, m, n, k = (2, 32, 32, 48) if way == "dot, tiles that fit" else (2, 19, 34, 51)
    a, b = (torch.randn(G, rows, k).to(dtype) for rows in (m, n))
    expected = a.double() @ b.double().mT
    if layout == "transposed":
        a, b = (between_nan(t.mT.contiguous()).mT for t in (a, b))
    else:
        a, b = between_nan(a), between_nan(b)
    shape = {"groups inside": (m, n, G), "split columns": (2, G, m, n // 2)}.get(layout, (G, m, n))
    around = torch.full((2 * GUARD + G * m * n,), torch.nan, dtype=dtype, device=DEVICE)
    out = around[GUARD:-GUARD].view(shape)
    if layout == "groups inside":
        out = out.permute(2, 0, 1)
    if layout == "split columns":
        out = out.permute(1, 2, 0, 3)
        if way == "library":
            assert {"way": "library"} not in products.product_choices(a, b, out)
            return
    products.batched_product(a, b, out, m, WAYS[way])
    assert_near(out.reshape(G, m, n), expected.to(DEVICE), dtype)
    assert around[:GUARD].isnan().all()
    assert around[-GUARD:].isnan().all()


def test_float32_is_multiplied_in_full_unless_torch_may_not() -> None:
    assert products.precision(torch.float32) == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert products.precision(torch.float32) == "tf32"
        assert products.precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_blast_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert blast.blast_variants(1, 16, 16, 256) == ["vector", "coupled", "fused"]
    assert blast.blast_variants(16, 2, 2, 256) == ["vector", "fused", "coupled"]
    assert blast.blast_variants(17, 16, 16, 256) == ["coupled", "fused"]
    assert blast.blast_variants(1, 64, 64, 4096) == ["coupled"]  # too much for the registers


def test_launches_on_a_gpu_fit_what_they_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    a, b, out = torch.empty(4, 8, 100), torch.empty(4, 70, 100), torch.empty(4, 8, 70)
    choices = products.product_choices(a, b, out)
    assert choices[0]["way"] == "vector"
    assert choices[-1] == {"way": "library"}
    for choice in choices:
        if choice["way"] == "dot":
            assert choice["rows"] == 16
            assert choice["columns"] <= 128
            assert choice["depth"] <= 128
    assert len({json.dumps(choice) for choice in choices}) == len(choices)
    assert products.vector_choices(8, 2 * products.LARGEST_VECTOR) == []


class Clock:
    """Stands in for the GPU: the time of a candidate is its number, and what ran is counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.ran: list = []
        monkeypatch.setattr(tuning, "_measures", lambda device: True)
        monkeypatch.setattr(tuning, "_device_name", lambda device: "A GPU, 80 GB/2")
        monkeypatch.setattr(tuning, "_milliseconds", self.time)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def time(self, run: Callable, candidate: dict) -> float:
        self.ran.append(candidate["n"])
        return candidate["ms"]


DEVICES = torch.device("cpu")
CANDIDATES = [{"n": 1, "ms": 3.0}, {"n": 2, "ms": 1.0}, {"n": 3, "ms": 2.0}]


def test_the_fastest_launch_is_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock = Clock(monkeypatch)
    assert tuning.choose("key", DEVICES, CANDIDATES, print) == CANDIDATES[1]
    assert clock.ran == [1, 2, 3]
    assert tuning.choose("key", DEVICES, CANDIDATES, print) == CANDIDATES[1]
    tuning.forget()
    assert tuning.choose("key", DEVICES, CANDIDATES, print) == CANDIDATES[1]
    assert clock.ran == [1, 2, 3]
    path = tuning.cache_file(DEVICES)
    assert path.parent == tmp_path / "triton"
    assert path.name.startswith("A-GPU-80-GB-2-triton-")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert json.loads(path.read_text()) == {"key": CANDIDATES[1]}


def test_a_launch_that_is_no_candidate_any_more_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    tuning.choose("key", DEVICES, CANDIDATES, print)
    assert tuning.choose("key", DEVICES, CANDIDATES[::2], print) == CANDIDATES[2]
    assert clock.ran == [1, 2, 3, 1, 3]


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"key": 3}', "\udcff\udcfe"])
def test_a_damaged_file_is_measured_anew(monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    clock = Clock(monkeypatch)
    path = tuning.cache_file(DEVICES)
    path.parent.mkdir(parents=True)
    path.write_bytes(damage.encode("utf-8", "surrogateescape"))
    assert tuning.choose("key", DEVICES, CANDIDATES, print) == CANDIDATES[1]
    assert clock.ran == [1, 2, 3]
    assert json.loads(path.read_text()) == {"key": CANDIDATES[1]}


def test_what_other_processes_wrote_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    tuning.choose("one", DEVICES, CANDIDATES, print)
    path = tuning.cache_file(DEVICES)
    path.write_text(json.dumps({"two": CANDIDATES[0], "one": CANDIDATES[1]}))
    tuning.choose("three", DEVICES, CANDIDATES, print)
    assert set(json.loads(path.read_text())) == {"one", "two", "three"}


def test_a_folder_that_cannot_be_written_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Clock(monkeypatch)
    (tmp_path / "triton").write_text("in the way")
    with pytest.warns(UserWarning, match="set STRUCTMAT_CACHE"):
        assert tuning.choose("key", DEVICES, CANDIDATES, print) == CANDIDATES[1]


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.choose("key", DEVICES, CANDIDATES, print) == CANDIDATES[0]
    assert clock.ran == []
    assert not tuning.cache_file(DEVICES).exists()


def test_no_launch_that_fits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    monkeypatch.setattr(tuning, "_milliseconds", lambda run, candidate: float("inf"))
    with pytest.raises(RuntimeError, match="expected a launch that fits A GPU"):
        tuning.choose("key", DEVICES, CANDIDATES, print)


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_device_name", lambda device: "GPU")
    monkeypatch.delenv("STRUCTMAT_CACHE")
    assert tuning.cache_file(DEVICES).parent == Path.home() / ".cache" / "structmat" / "triton"


def test_tokens_are_rounded_to_powers_of_two() -> None:
    assert [tuning.bucket(T) for T in (1, 2, 3, 16, 17, 1000)] == [1, 2, 4, 16, 32, 1024]


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("blast coupled", "blast fused")])
def test_operators_take_the_kernels_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    assert "triton" in case.format.algorithms
    calls: list[str] = []
    for module in (blast, block_diagonal, block_sparse, gblr, monarch):
        for function in [key for key in vars(module) if key.endswith(("_forward", "_backward"))]:
            kernel = getattr(module, function)
            monkeypatch.setattr(
                module, function, lambda *a, k=kernel, f=function, **o: (calls.append(f), k(*a, **o))[1]
            )
    factors, exact, dense = factors_and_dense(case, torch.float32)
    given = {n: f.requires_grad_() if n in case.names else f for n, f in factors.items()}
    x = torch.randn(2, 3, case.format.N, device=DEVICE, requires_grad=True)
    y = case.format.matmul(x, given, "triton")
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, [x, *(given[n] for n in case.names)], upstream)
    wide = x.detach().double().requires_grad_()
    product = wide @ dense.T
    assert_near(y, product, torch.float32)
    expected = torch.autograd.grad(product, [wide, *(exact[n] for n in case.names)], upstream.double())
    for one, other in zip(got, expected, strict=True):
        assert_near(one, other.reshape(one.shape), torch.float32)
    assert [name.rpartition("_")[2] for name in calls] == ["forward", "backward"]
    assert case.format.matmul(x[:, :0], given, "triton").shape == (2, 0, case.format.M)
