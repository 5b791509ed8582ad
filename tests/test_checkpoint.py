"""Checkpoints: one file holds everything, and a file that does not fit changes nothing."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from structmat import (
    Blast,
    BlockDiagonal,
    GaudiGblr,
    LowRank,
    Plan,
    apply_plan_,
    compress_,
    harden_,
    load_model,
    make_plan,
    plan_of,
    save_model,
    tile_,
)
from structmat._files import write_atomically


class Network(nn.Module):
    """Layers, buffers and two kinds of ties."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 24)
        self.norm = nn.BatchNorm1d(24)
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.second.weight = self.first.weight
        self.block = nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24, bias=False))
        self.head = nn.Linear(24, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.second(self.first(self.norm(self.embedding(tokens))))))


PLAN = Plan({"first": LowRank(24, 24, 3), "block.0": Blast(32, 24, (4, 2), 5)})


def trained() -> Network:
    model = apply_plan_(Network(), PLAN)
    model(torch.arange(40))  # moves the running statistics
    return model.eval()  # pyright: ignore


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(trained(), path)
    return path


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Change the tensors and the header of a checkpoint, as of a version that wrote no digests."""
    tensors = load_file(path)
    with safe_open(path, "pt") as opened:
        header = json.loads(opened.metadata()["structmat"])
    del header["digests"]
    change(tensors, header)
    save_file(tensors, path, {"structmat": json.dumps(header)})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(tensor, b[name]) and tensor.dtype == b[name].dtype for name, tensor in a.items())


def assert_tied(model: Network) -> None:
    assert model.first is not model.second
    assert model.first.left is model.second.left
    assert model.first.right is model.second.right
    assert model.head.weight is model.embedding.weight


def test_plan_of_finds_what_was_applied() -> None:
    assert plan_of(Network()) == Plan({})
    assert plan_of(trained()) == PLAN


def test_round_trip_is_equal_to_the_bit(tmp_path: Path) -> None:
    model, fresh = trained(), Network().eval()
    save_model(model, tmp_path / "m")
    assert load_model(fresh, tmp_path / "m") is fresh
    assert_same_state(fresh.state_dict(), model.state_dict())
    assert_tied(fresh)
    assert plan_of(fresh) == PLAN
    assert torch.equal(fresh(torch.arange(5)), model(torch.arange(5)))


def test_round_trip_of_fitted_weights(tmp_path: Path) -> None:
    model = Network()
    plan = make_plan(model, {r"block\..*": Blast, "first": BlockDiagonal}, blocks=4)
    compress_(model, plan, progress=False)
    save_model(model, tmp_path / "m")
    assert_same_state(load_model(Network(), tmp_path / "m").state_dict(), model.state_dict())


def test_a_dense_network_is_a_checkpoint_too(tmp_path: Path) -> None:
    model, fresh = Network(), Network()
    save_model(model, tmp_path / "m")
    load_model(fresh, tmp_path / "m")
    assert_same_state(fresh.state_dict(), model.state_dict())
    assert fresh.head.weight is fresh.embedding.weight


def test_loading_into_the_same_structure(file: Path) -> None:
    assert_same_state(load_model(trained(), file).state_dict(), load_model(Network(), file).state_dict())


def test_each_shared_tensor_is_stored_once(file: Path) -> None:
    names = set(load_file(file))
    assert {"first.left", "embedding.weight"} <= names
    assert not {"second.left", "second.right", "head.weight"} & names


def test_overlapping_views_are_stored_apart(tmp_path: Path) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.arange(12.0)
            self.register_buffer("low", whole[:8])
            self.register_buffer("high", whole[4:])
            self.register_buffer("empty", torch.zeros(0, 3))
            self.register_buffer("turned", torch.arange(6.0).view(2, 3).T)

    model, fresh = Views(), Views()
    for name, buffer in fresh.named_buffers():
        setattr(fresh, name, torch.full_like(buffer, -1))
    save_model(model, tmp_path / "m")
    assert_same_state(load_model(fresh, tmp_path / "m").state_dict(), model.state_dict())


def test_a_skeleton_on_the_meta_device_takes_over_the_tensors(file: Path) -> None:
    model = load_model(Network(), file)
    with torch.device("meta"):
        skeleton = Network()
    load_model(skeleton, file)
    assert not any(tensor.is_meta for tensor in (*skeleton.parameters(), *skeleton.buffers()))
    assert_same_state(skeleton.state_dict(), model.state_dict())
    assert_tied(skeleton)
    assert len(list(skeleton.parameters())) == len(list(model.parameters()))
    assert torch.equal(skeleton.eval()(torch.arange(5)), model.eval()(torch.arange(5)))


@pytest.mark.parametrize("meta", [False, True])
def test_frozen_weights_stay_frozen(file: Path, meta: bool) -> None:
    with torch.device("meta" if meta else "cpu"):
        model = Network()
    model.block.requires_grad_(False)
    load_model(model, file)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"block.0.left", "block.0.diag", "block.0.right", "block.0.bias", "block.1.weight"}


def test_loading_keeps_the_networks_own_dtype(file: Path) -> None:
    model = load_model(Network().bfloat16(), file)
    expected = load_file(file)["first.left"].bfloat16()
    assert torch.equal(model.first.left, expected)


def test_a_file_may_be_replaced_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "m"
    save_model(Network(), path)
    model = trained()
    save_model(model, path)
    assert_same_state(load_model(Network(), path).state_dict(), model.state_dict())
    assert [p.name for p in path.parent.iterdir()] == ["m"]


# Writing


def test_a_failing_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(b"old")

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_save_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.mkdir()
    with pytest.raises(OSError, match=r"m'$"):
        save_model(Network(), path)  # a folder is in the way
    assert list(tmp_path.iterdir()) == [path]
    assert not list(path.iterdir())


def test_a_written_file_has_ordinary_permissions(tmp_path: Path) -> None:
    write_atomically(tmp_path / "m", lambda path: path.write_bytes(b"new"))
    (tmp_path / "ordinary").write_bytes(b"")
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert (tmp_path / "m").read_bytes() == b"new"


def test_a_network_without_values_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(
        ValueError, match="expected a model with values, but 'weight' is on the meta device; load it first"
    ):
        save_model(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


# Files that do not fit


def refused(path: Path, error: type[Exception], message: str, model: Network | None = None) -> None:
    """Loading raises, and leaves the network as it was."""
    model = model or Network()
    before, modules = state(model), dict(model.named_modules())
    with pytest.raises(error, match=message):
        load_model(model, path)
    assert_same_state(model.state_dict(), before)
    assert dict(model.named_modules()) == modules


def drop(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    del tensors["block.0.diag"]


def drop_owner(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    del tensors["embedding.weight"]


def add(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors["more"] = torch.zeros(3)


def misshape(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors["norm.bias"] = torch.zeros(23)


def misshape_factor(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors["first.left"] = torch.zeros(24, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, r"the checkpoint '.*' does not fit: missing block.0.diag \(8, 5\)$"),
        (drop_owner, r"does not fit: missing embedding.weight \(40, 24\); missing head.weight \(40, 24\)$"),
        (add, r"does not fit: unexpected more \(3,\)$"),
        (misshape, r"does not fit: norm.bias: expected shape \(24,\), got \(23,\)$"),
        (misshape_factor, r"does not fit: first.left: expected shape \(24, 3\), got \(24, 4\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    file: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None], message: str
) -> None:
    rewrite(file, change)
    refused(file, ValueError, message)


def test_another_schema_is_refused(file: Path) -> None:
    rewrite(file, lambda _, header: header.update(schema=2))
    refused(file, ValueError, "expected a checkpoint of schema 1, got 2; update structmat")


@pytest.mark.parametrize("header", ["{}", "[]", "not JSON", '{"schema": 1}'])
def test_a_damaged_header_is_refused(tmp_path: Path, header: str) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "m", {"structmat": header})
    refused(tmp_path / "m", ValueError, re.escape(str(tmp_path / "m")))


def test_a_plan_of_other_layers_is_refused(file: Path) -> None:
    def rename(_: dict[str, Tensor], header: dict[str, Any]) -> None:
        header["plan"]["layers"]["elsewhere"] = header["plan"]["layers"].pop("first")

    rewrite(file, rename)
    refused(file, ValueError, "does not fit|expected a module named 'elsewhere'")


def test_another_structure_is_refused(file: Path) -> None:
    model = apply_plan_(Network(), {"first": LowRank(24, 24, 4)})
    refused(file, ValueError, "does not fit|densify_ it first", model)


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    save_file({"first.weight": torch.zeros(2)}, tmp_path / "m")
    refused(
        tmp_path / "m",
        ValueError,
        "expected a checkpoint written by structmat.save_model, got '.*m' without its header",
    )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file, as torch.save writes it"])
def test_another_kind_of_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)
    refused(tmp_path / "m", ValueError, "expected a safetensors file at '.*m': ")


def test_a_truncated_file_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])
    refused(file, ValueError, "expected a safetensors file at")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "m", FileNotFoundError, "expected a safetensors file at '.*m', found none")
    refused(tmp_path, FileNotFoundError, "found none")


def test_two_tensors_for_what_the_network_shares_are_refused(tmp_path: Path) -> None:
    save_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), tmp_path / "untied")
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    before = tied[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"shares one tensor under '0.weight' and '1.weight', but the file has two"):
        load_model(tied, tmp_path / "untied")
    assert torch.equal(tied[0].weight, before)


class Rotary(nn.Module):
    """A layer beside a buffer that no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("frequencies", torch.ones(2), persistent=False)


def test_a_buffer_that_would_stay_without_values_is_refused(tmp_path: Path) -> None:
    save_model(Rotary(), tmp_path / "file")
    with torch.device("meta"):
        skeleton = Rotary()
    with pytest.raises(ValueError, match=r"values for the non-persistent buffers \['frequencies'\]"):
        load_model(skeleton, tmp_path / "file")


class Counted(nn.Linear):
    """A layer with state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensors alone in the state dict, but '_extra_state' is a dict"):
        save_model(Counted(4, 4), tmp_path / "file")


# Files that were edited


def edited(path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a checkpoint whose tensors were changed."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    with safe_open(path, framework="pt") as file:
        save_file(tensors, path.with_name("edited"), file.metadata())
    return path.with_name("edited")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_factors_that_are_no_plain_numbers_are_refused_before_anything_changes(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    save_model(apply_plan_(nn.Sequential(nn.Linear(16, 16)), {"0": LowRank(16, 16, 4)}), tmp_path / "m")
    path = edited(tmp_path / "m", lambda t: t.update({"0.right": torch.ones(4, 16).to(dtype)}))
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(16, 16))
    for model in (nn.Sequential(nn.Linear(16, 16)), skeleton):
        with pytest.raises(ValueError, match=r"expected floating-point numbers in '0\.right', got "):
            load_model(model, path)
        assert type(model[0]) is nn.Linear


def test_two_dtypes_of_one_storage_are_two_tensors(tmp_path: Path) -> None:
    class Bits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))
            self.register_buffer("bits", self.w.detach().view(torch.int32))

    model = Bits()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_model(model, tmp_path / "m")
    assert_same_state(load_model(Bits(), tmp_path / "m").state_dict(), expected)


GBLR_EDITS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "an order twice": (lambda t: t["0.order"].zero_(), "expected order to hold each of"),
    "an order out of range": (lambda t: t["0.order"].fill_(10**6), "expected order to hold each of"),
    "no width": (lambda t: t["0.width"].zero_(), "expected widths from 1 to 32"),
    "a width past the axis": (lambda t: t["0.width"].fill_(2**31 - 1), "expected widths from 1 to 32"),
    "a start out of range": (lambda t: t["0.start"].fill_(10**9), "expected starts from 0 to 31"),
    "a negative start": (lambda t: t["0.start"].fill_(-1), "expected starts from 0 to 31"),
}


@pytest.mark.parametrize("kind", GBLR_EDITS)
def test_indices_that_are_none_are_refused(tmp_path: Path, kind: str) -> None:
    change, message = GBLR_EDITS[kind]
    model = apply_plan_(nn.Sequential(nn.Linear(32, 32)), {"0": GaudiGblr.for_budget(32, 32, keep=0.5)})
    harden_(model)
    save_model(model, tmp_path / "m")
    with pytest.raises(ValueError, match=r"layer '0': " + message):
        load_model(nn.Sequential(nn.Linear(32, 32)), edited(tmp_path / "m", change))


TILE_EDITS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "left_index": lambda t: t["0.left_index"].fill_(10**6),
    "right_rows": lambda t: t["0.right_rows"].zero_(),
    "right_offsets": lambda t: t["0.right_offsets"].fill_(7),
    "left_place": lambda t: t["0.left_place"].fill_(3),
}


@pytest.mark.parametrize("name", TILE_EDITS)
def test_indices_of_tiles_that_are_none_are_refused(tmp_path: Path, name: str) -> None:
    model = apply_plan_(nn.Sequential(nn.Linear(32, 32)), {"0": GaudiGblr.for_budget(32, 32, keep=0.5)})
    harden_(model)
    tile_(model)
    save_model(model, tmp_path / "m")
    with pytest.raises(ValueError, match=rf"layer '0': expected {name} "):
        load_model(nn.Sequential(nn.Linear(32, 32)), edited(tmp_path / "m", TILE_EDITS[name]))


def test_dense_weights_of_another_kind_come_back(tmp_path: Path) -> None:
    def network() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        model[0].weight = nn.Parameter(model[0].weight.data.to(torch.float8_e4m3fn), requires_grad=False)
        return model

    model = network()
    save_model(model, tmp_path / "m")
    loaded = load_model(network(), tmp_path / "m")
    assert torch.equal(loaded[0].weight.float(), model[0].weight.float())


def test_a_plan_that_names_a_layer_that_nothing_has_is_refused(tmp_path: Path) -> None:
    save_model(nn.Sequential(nn.Linear(16, 16)), tmp_path / "m")
    rewrite(tmp_path / "m", lambda _, header: header["plan"]["layers"].update(far=LowRank(16, 16, 4).to_json()))
    with pytest.raises(ValueError, match=r"'.*m': expected a module named 'far'"):
        load_model(nn.Sequential(nn.Linear(16, 16)), tmp_path / "m")
