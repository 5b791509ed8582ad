"""Digests: nothing of a tensor or a record changes without a change of its digest, and messages name what did."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from structmat import Blast, GaudiGblr, LowRank, Monarch, apply_plan_, load_model, save_model
from structmat._digests import CHUNK, changes, check, digest, digest_of_file, digests, sealed
from structmat.integrations.integrity import Verified, verify

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7,), (5, 13), (3, 2 * CHUNK + 1)])
def test_a_digest_is_that_of_the_values(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (10 * torch.randn(shape, dtype=torch.float64)).to(dtype)
    assert re.fullmatch("[0-9a-f]{16}", digest(tensor))
    assert digest(tensor) == digest(tensor.clone()) == digests({"a": tensor})["a"]
    if len(shape) == 2:
        assert digest(tensor.mT.contiguous().mT) == digest(tensor)  # however it lies in memory
        assert digest(tensor.reshape(-1)) != digest(tensor)
    if shape and dtype != torch.uint8:
        assert digest(tensor.contiguous().view(torch.uint8)) != digest(tensor)


@given(bit=st.integers(0, 63), where=st.integers(0, CHUNK + 9))
def test_every_bit_counts(bit: int, where: int) -> None:
    values = torch.arange(CHUNK + 10) * 2**40 + 7
    changed = values.clone()
    changed.view(torch.uint8).view(-1, 8)[where, bit // 8] ^= 1 << bit % 8
    assert digest(changed) != digest(values)


def test_signs_and_places_count() -> None:
    for dtype in DTYPES[:4]:
        values = torch.randn(64, 8, dtype=torch.float64).to(dtype)
        others = [-values, values.flip(0), values.flip(1), values.roll(1, 0), torch.cat((values[32:], values[:32]))]
        for scale in (-1, 2, 4, 0.5, -0.25):
            others.append(values * scale)
            others.append(torch.cat((values[:2] * scale, values[2:])))
        found = {digest(one) for one in (values, *others)}
        assert len(found) == len(others)  # one of them is the whole, negated, which is there twice
    large = torch.arange(3 * CHUNK, dtype=torch.int64)
    assert digest(large) != digest(torch.cat((large[CHUNK:], large[:CHUNK])))


def test_the_digests_of_this_version_stay() -> None:
    """Files hold them: a change would make every stored model one that has changed."""
    assert digest(torch.arange(100, dtype=torch.int32)) == "20089194ae0670af"
    assert digest(torch.linspace(-1, 1, 9).bfloat16()) == "5725dc4c0efb0164"


def test_a_file_has_a_digest(tmp_path: Path) -> None:
    found = set()
    for content in (b"", b"a", b"b", b"ab" * 10**6, b"ab" * 10**6 + b"c"):
        (tmp_path / "file").write_bytes(content)
        found.add(digest_of_file(tmp_path / "file"))
    assert len(found) == 5


# Checkpoints


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, 16) for _ in range(4))
        self.register_buffer("mask", torch.ones(3))


PLAN = {"a": LowRank(16, 16, 3), "b": LowRank(16, 16, 3), "c": Monarch(16, 16, (4, 4), 1), "d": GaudiGblr(16, 16, 4)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_model(apply_plan_(Network(), PLAN), tmp_path / "m")
    return tmp_path / "m"


def edit(file: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["structmat"])
    change(tensors, header)
    save_file(tensors, file, {"structmat": json.dumps(header)})


def _swap(tensors: dict[str, Tensor], _: Any) -> None:
    tensors["a.left"], tensors["b.left"] = tensors["b.left"], tensors["a.left"]


def _flip(tensors: dict[str, Tensor], _: Any) -> None:
    tensors["c.bias"].view(torch.int32)[3] ^= 1


def _permute(_: Any, header: dict[str, Any]) -> None:
    header["plan"]["layers"]["c"]["permute_output"] = True


def _share(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    del tensors["b.left"]
    header["aliases"]["b.left"] = "a.left"


CHANGES = [
    (_swap, "'a.left' has other values, those of 'b.left'; 'b.left' has other values, those of 'a.left'"),
    (_flip, "'c.bias' has other values"),
    (_permute, "the record of formats and names differs"),
    (_share, "'b.left' is missing; the record of formats and names differs"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_changed_checkpoint_is_refused_by_name(change: Any, message: str, file: Path) -> None:
    assert verify(file) == Verified(16, True, ())
    edit(file, change)
    model = Network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"expected '{file}' as it was saved, but {message}: restore the file"):
        load_model(model, file)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "; ".join(verify(file).problems) == message


def test_the_check_can_be_switched_off(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(file, _flip)
    monkeypatch.setenv("STRUCTMAT_VERIFY", "0")
    assert torch.equal(load_model(Network(), file).c.bias, load_file(file)["c.bias"])


def test_a_checkpoint_without_digests_loads_and_verify_says_so(file: Path) -> None:
    edit(file, lambda tensors, header: (_flip(tensors, header), header.pop("digests")))
    assert torch.equal(load_model(Network(), file).c.bias, load_file(file)["c.bias"])
    assert verify(file) == Verified(16, False, ())


@pytest.mark.parametrize("seal", [None, 3, [], {"tensors": {}}, {"tensors": 3, "record": ""}, {"record": []}])
def test_digests_of_another_kind_are_refused(seal: Any, file: Path) -> None:
    edit(file, lambda _, header: header.update(digests=seal))
    with pytest.raises(ValueError, match=str(file)):
        load_model(Network(), file)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_that_are_not_finite_are_refused_by_name(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    model = apply_plan_(Network(), PLAN).to(dtype)
    model.a.right.data[2, 3] = value
    model.mask[0] = value  # a buffer of the network's own may be anything
    save_model(model, tmp_path / "m")
    with pytest.raises(
        ValueError, match=r"'.*m': expected finite factors in layer 'a', got NaN or infinity in 'right'"
    ):
        load_model(Network().to(dtype), tmp_path / "m")
    assert verify(tmp_path / "m").problems == tuple(
        f"{name!r} has NaN or infinite values" for name in ("a.right", "mask")
    )


def test_large_factors_are_finite(tmp_path: Path) -> None:
    model = apply_plan_(nn.Sequential(nn.Linear(16, 16)), {"0": Blast(16, 16, (2, 2), 2)})
    model[0].left.data.fill_(3e38)  # whose sum is not
    save_model(model, tmp_path / "m")
    assert torch.equal(load_model(nn.Sequential(nn.Linear(16, 16)), tmp_path / "m")[0].left, model[0].left)


def test_messages_end() -> None:
    state = {str(k): torch.ones(k) for k in range(40)}
    seal = sealed({}, digests(state))
    assert changes(seal, {}, digests(state)) == []
    with pytest.raises(ValueError, match=r"'19' is missing, and 20 more: restore"):
        check(seal, {}, {}, "file")
    assert changes(seal, {}, digests({**state, "new": torch.ones(1)})) == ["'new' was not saved with the others"]
