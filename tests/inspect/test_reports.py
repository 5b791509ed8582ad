"""The report: counts against counts by hand."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structmat import (
    Blast,
    BlockSparse,
    GaudiGblr,
    LowRank,
    Monarch,
    Plan,
    apply_plan_,
    compress_,
    harden_,
    make_plan,
    report,
)
from structmat._tables import share, table_text
from structmat.plan import UNPICKED


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 8, bias=False))
    return apply_plan_(model, {"0": LowRank(6, 8, 2)})  # pyright: ignore


def test_a_dense_network_by_hand() -> None:
    result = report(nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4, bias=False)))
    assert [(row.name, row.format, row.shape, row.parameters, row.multiplications) for row in result.rows] == [
        ("0", "dense", (6, 8), 48, 48),
        ("2", "dense", (4, 6), 24, 24),
    ]
    assert (result.parameters, result.dense_parameters) == (48 + 6 + 12 + 24,) * 2
    assert (result.multiplications, result.dense_multiplications) == (72, 72)
    assert result.per_token


def test_a_structured_network_by_hand() -> None:
    result = report(network())
    first, second = result.rows
    assert (first.format, first.settings, first.shape) == ("low_rank", "rank 2", (6, 8))
    assert (first.parameters, first.dense_parameters) == (2 * 14, 48)
    assert (first.multiplications, first.dense_multiplications) == (28, 48)
    assert (second.parameters, second.dense_parameters) == (48, 48)
    assert (result.parameters, result.dense_parameters) == (28 + 6 + 12 + 48, 48 + 6 + 12 + 48)
    assert (result.multiplications, result.dense_multiplications) == (28 + 48, 96)


def test_example_inputs_count_the_vectors_of_each_layer() -> None:
    result = report(network(), example_inputs=torch.zeros(3, 5, 8))
    assert [row.multiplications for row in result.rows] == [15 * 28, 15 * 48]
    assert (result.multiplications, result.dense_multiplications) == (15 * 76, 15 * 96)
    assert not result.per_token


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_example_inputs_count_the_positions_of_a_convolution(structured: bool, batched: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2))  # 9 x 8 images to 4 x 3
    if structured:
        apply_plan_(model, {"0": LowRank(4, 27, 2)})
    images = torch.zeros(5, 3, 9, 8) if batched else torch.zeros(3, 9, 8)
    result = report(model, example_inputs=images)
    positions, cost = (60 if batched else 12), (2 * 31 if structured else 4 * 27)
    assert (result.multiplications, result.dense_multiplications) == (positions * cost, positions * 4 * 27)
    assert result.parameters == cost + 4


def test_a_layer_used_twice_costs_twice_and_an_unused_one_nothing() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.used(self.used(x)) + y

    result = report(Loop(), example_inputs=(torch.zeros(3, 8), torch.zeros(8)))
    assert [(row.name, row.multiplications) for row in result.rows] == [("used", 2 * 3 * 64), ("unused", 0)]


def test_no_vectors_cost_nothing() -> None:
    assert report(network(), example_inputs=torch.zeros(0, 8)).multiplications == 0


class Tied(nn.Module):
    """Two layers of one weight, and a head tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.embedding(x))))


SHARED = "its weight is shared with 'embedding' (Embedding), which would keep the dense one; untie them first"


@pytest.mark.parametrize("structured", [False, True])
def test_shared_weights_are_counted_once_but_multiplied_twice(structured: bool) -> None:
    model = Tied()
    if structured:
        apply_plan_(model, {"first": LowRank(8, 8, 2)})
    size = 32 if structured else 64
    result = report(model, example_inputs=torch.arange(3))
    assert [(row.name, row.parameters, row.dense_parameters, row.note) for row in result.rows] == [
        ("first", size, 64, ""),
        ("second", 0, 0, "shares its weight"),
        ("head", 80, 80, SHARED),
    ]
    assert [row.multiplications for row in result.rows] == [3 * size, 3 * size, 3 * 80]
    assert (result.parameters, result.dense_parameters) == (size + 16 + 80, 64 + 16 + 80)


def test_errors_and_reasons_are_shown() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(3, 4, 3))
    plan = make_plan(model, {nn.Linear: LowRank, nn.Conv2d: LowRank}, misfits="skip")
    fits = compress_(model, plan, progress=False)
    rows = {row.name: row for row in report(model, fits=fits, plan=plan).rows}
    assert set(rows) == {"0", "1.group_0", "1.group_1", "2"}
    assert {name: row.error for name, row in rows.items()} == {name: fits[name].error for name in rows}
    assert {row.note for row in rows.values()} == {""}


@pytest.mark.parametrize(
    ("format", "settings"),
    [
        (Blast(8, 8, (2, 4), 1), "2 x 4 blocks, rank 1"),
        (Monarch(8, 8, 2, 1), "2 x 2 blocks, rank 1"),
        (Monarch(8, 8, 2, 1, permute_output=True), "2 x 2 blocks, rank 1, permute_output"),
        (BlockSparse(8, 8, ("10", "01"), 1), "2 of 2 x 2 blocks, rank 1"),
    ],
)
def test_settings_are_short(format: Any, settings: str) -> None:
    model = apply_plan_(nn.Sequential(nn.Linear(8, 8)), {"0": format})
    assert report(model).rows[0].settings == settings


def test_data_json_and_text_agree() -> None:
    result = report(network(), example_inputs=torch.zeros(3, 8))
    data = result.to_dict()
    assert json.loads(result.to_json()) == data
    assert data["rows"][0]["shape"] == [6, 8]
    assert data["parameters"] == result.parameters
    lines = str(result).splitlines()
    assert len(lines) == 2 + 2 + 1 + 1  # the last one names the norm
    assert lines[0].split() == [
        "layer",
        "format",
        "settings",
        "shape",
        "parameters",
        "keep",
        "mult.",
        "in",
        "all",
        "output",
        "error",
        "weight",
        "error",
    ]
    assert lines[2].split() == ["0", "low_rank", "rank", "2", "6", "x", "8", "28", "0.583", "84"]
    assert lines[3].split() == ["2", "dense", "8", "x", "6", "48", "1.000", "144"]
    assert lines[4].split() == ["whole", "model", "94", "0.825", "228", "0.792", "of", "dense"]
    assert "mult. per token" in str(report(network()))


def test_an_empty_network_has_an_empty_report() -> None:
    result = report(nn.Sequential(nn.ReLU()))
    assert (result.rows, result.parameters, result.multiplications) == ((), 0, 0)
    assert "whole model" in str(result)


def test_counting_leaves_the_network_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout())
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report(model, example_inputs=torch.randn(4, 8))
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_failing_call_leaves_the_network_as_it_was() -> None:
    model = network()
    with pytest.raises(ValueError, match="expected an input with 8 features"):
        report(model, example_inputs=torch.zeros(2, 7))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_layer_that_is_not_in_the_plan_says_so() -> None:
    assert [row.note for row in report(network(), plan=Plan({})).rows] == ["", UNPICKED]


def test_tables_are_aligned() -> None:
    text = table_text(("a", "b"), [("long", "1"), ("", ""), ("", "[10]")], right=(1,))
    assert text == "a         b\n-----------\nlong      1\n\n       [10]"
    assert (share(1, 4), share(0, 3), share(1, 0)) == ("0.250", "0.000", "")


def test_a_skipped_layer_is_named_with_its_reason() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    plan = make_plan(model, {nn.Linear: LowRank}, misfits="skip")
    rows = report(model, plan=plan).rows
    parts = ["1.q_proj", "1.k_proj", "1.v_proj", "1.out_proj"]
    assert {row.name: row.note for row in rows} == dict.fromkeys(["0", *parts], "it is not replaced yet")


def test_the_error_is_found_under_any_name_of_a_module() -> None:
    model = nn.Module()
    model.a = model.b = nn.Linear(16, 16)
    fits = compress_(model, {"b": LowRank(16, 16, 4)}, progress=False)
    assert [row.error for row in report(model, fits=fits).rows] == [fits["b"].error]


class Scaled(nn.Linear):
    """Called by keyword."""

    def forward(self, *, values: torch.Tensor) -> torch.Tensor:
        return super().forward(values)


def test_example_inputs_by_keyword() -> None:
    assert report(Scaled(4, 2), example_inputs={"values": torch.zeros(3, 4)}).multiplications == 3 * 8


def test_a_learning_layer_counts_what_is_inside_its_segments() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
    apply_plan_(model, {"0": GaudiGblr(8, 12, 6, 0.5)})
    with torch.no_grad():
        model[0].width[:, 0] = 0
    result = report(model)
    assert result.rows[0].parameters == 5 * (4 + 6)
    assert result.parameters == 50 + 8 + 32 + 4
    assert result.dense_parameters == 96 + 8 + 32 + 4
    harden_(model)
    hardened = report(model)
    assert (hardened.parameters, hardened.dense_parameters) == (result.parameters, result.dense_parameters)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_layer_without_a_size_yet_counts_nothing() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    found = report(model)
    assert [row.name for row in found.rows] == ["1"]
    assert found.parameters == found.dense_parameters == 8 * 8 + 8
