"""Plans: which layer gets which format, and the JSON of it."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from structmat import Blast, BlockDiagonal, BlockSparse, Dense, LowRank, Monarch, Plan, Rule, make_plan


class Tied(nn.Module):
    """Two layers of one weight, one module under two names, and a head tied to an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.twice = nn.Linear(32, 64)
        self.again = self.twice
        self.embedding = nn.Embedding(50, 32)
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 32),
        nn.Sequential(nn.Linear(32, 32), nn.ReLU()),
        nn.Conv2d(8, 16, 3),
        nn.Conv2d(8, 16, 3, groups=2),
    )


def test_the_first_rule_that_matches_decides() -> None:
    plan = make_plan(network(), {r"1\..*": LowRank, nn.Linear: BlockDiagonal}, keep=0.5)
    assert dict(plan) == {"0": BlockDiagonal(32, 64, 2), "1.0": LowRank(32, 32, 8)}


@pytest.mark.parametrize("exclude", [(), r"1\..*"])
def test_a_rule_that_decides_nothing_is_refused(exclude: Any) -> None:
    rules: Any = {nn.Linear: BlockDiagonal, r"1\..*": LowRank}
    with pytest.raises(ValueError, match="all that it picks are excluded or taken by an earlier rule"):
        make_plan(network(), rules, exclude=exclude)


def test_a_rule_wants_a_format_class_or_its_name() -> None:
    with pytest.raises(TypeError, match="expected a format class such as Blast, or its name, got 3"):
        Rule(3)  # pyright: ignore
    with pytest.raises(ValueError, match=r"expected the format's name to be one of .*'blast'.*, got 'last'"):
        Rule("last")
    assert Rule("low-rank") == Rule("low_rank") == Rule(LowRank)


def test_one_format_for_all_layers_by_class_by_name_or_by_rule() -> None:
    plans = [
        make_plan(network(), choice, keep=0.4, blocks=4, misfits="skip")
        for choice in (Blast, "blast", Rule("blast"), {".*": Blast})
    ]
    assert len(plans[0]) > 1
    assert plans[1] == plans[2] == plans[3] == plans[0]


def test_missing_blocks_are_no_misfit() -> None:
    with pytest.raises(ValueError, match="expected blocks for Blast, in make_plan or in a Rule, got none"):
        make_plan(network(), {nn.Linear: Blast}, misfits="skip")


def test_dense_leaves_alone_what_could_not_be_structured() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4, 4))  # each group has one row
    assert list(make_plan(model, {nn.Linear: Dense, nn.Conv2d: Dense})) == ["1"]


def test_expressions_match_the_whole_name() -> None:
    assert list(make_plan(network(), {"1.0": LowRank})) == ["1.0"]
    with pytest.raises(ValueError, match="expected '1' to pick a dense linear layer or convolution, but it picks none"):
        make_plan(network(), {"1": LowRank})


def test_a_rule_overrides_the_plan() -> None:
    rules = {"0": Rule(Blast, keep=0.25, blocks=(2, 4)), "1.0": Blast}
    plan = make_plan(network(), rules, keep=0.5, blocks=4)
    assert dict(plan) == {
        "0": Blast.for_budget(32, 64, keep=0.25, blocks=(2, 4)),
        "1.0": Blast.for_budget(32, 32, keep=0.5, blocks=4),
    }


def test_options_reach_the_format() -> None:
    rules = {"0": Rule(Monarch, options={"permute_output": True}), "1.0": Rule(BlockSparse, options={"rank": 0})}
    plan = make_plan(network(), rules, keep=0.5, blocks=4)
    assert isinstance(monarch := plan["0"], Monarch)
    assert monarch.permute_output
    assert isinstance(sparse := plan["1.0"], BlockSparse)
    assert sparse.rank == 0


def test_a_convolution_is_a_matrix_of_its_unfolded_weight() -> None:
    assert dict(make_plan(network(), {"2": LowRank})) == {"2": LowRank.for_budget(16, 72, keep=0.5)}


def test_dense_needs_no_budget() -> None:
    assert dict(make_plan(network(), {"0": Dense, nn.Linear: LowRank}, keep=0.3))["0"] == Dense(32, 64)


@pytest.mark.parametrize("exclude", [["0"], [r"\d"]])
def test_excluded_layers_are_left_out(exclude: list[str]) -> None:
    assert list(make_plan(network(), {nn.Linear: LowRank}, exclude=exclude)) == ["1.0"]


def test_every_layer_keeps_at_most_its_budget() -> None:
    for format in (LowRank, BlockDiagonal, Monarch, BlockSparse, Blast):
        plan = make_plan(network(), {nn.Linear: format}, keep=0.4, blocks=4)
        assert all(0.15 < layer.keep <= 0.4 for layer in plan.values())


def test_a_shared_weight_is_one_candidate() -> None:
    model = Tied()
    assert list(make_plan(model, {nn.Linear: LowRank}, exclude=["head"])) == ["first", "twice"]
    assert list(make_plan(model, {"second|again": LowRank})) == ["first", "twice"]
    with pytest.raises(
        ValueError, match=r"layer 'head' does not fit: its weight is shared with 'embedding' \(Embedding\)"
    ):
        make_plan(model, {"head": LowRank})


def test_the_network_may_be_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = network()
    assert make_plan(model, {nn.Linear: LowRank}) == make_plan(network(), {nn.Linear: LowRank})


def test_making_a_plan_changes_nothing() -> None:
    model = network()
    before = {name: (id(module), type(module)) for name, module in model.named_modules()}
    make_plan(model, {nn.Linear: LowRank})
    assert {name: (id(module), type(module)) for name, module in model.named_modules()} == before


def test_misfits_are_errors_or_named() -> None:
    rules = {nn.Conv2d: LowRank, nn.Linear: LowRank}
    model = network()
    model.append(nn.Conv2d(4, 4, 3, groups=4))
    message = "layer '[^']*' does not fit: .* exclude it, or pass misfits='skip'"
    with pytest.raises(ValueError, match=message):
        make_plan(model, rules)
    plan = make_plan(model, rules, misfits="skip")
    assert list(plan) == ["0", "1.0", "2", "3.group_0", "3.group_1"]
    assert "4" in " ".join(plan.skipped | plan.stays)


def test_indivisible_shapes_are_misfits() -> None:
    with pytest.raises(ValueError, match="layer '0' does not fit: expected a block count that divides the 32 rows"):
        make_plan(network(), {"0": Blast}, blocks=5)


def test_a_format_that_does_not_save_is_a_misfit() -> None:
    with pytest.raises(ValueError, match=r"layer '1.0' does not fit: expected fewer parameters than the dense 32 x 32"):
        make_plan(network(), {"1.0": LowRank}, keep=1.0)


def test_a_whole_model_is_a_misfit() -> None:
    with pytest.raises(
        ValueError, match=r"it is the whole model, which cannot be replaced in place; wrap it in nn.Seq"
    ):
        make_plan(nn.Linear(32, 32), {nn.Linear: LowRank})


@pytest.mark.parametrize("exclude", [False, True])
def test_a_selector_that_picks_nothing_is_refused(exclude: bool) -> None:
    message = (
        "expected 'attention' to pick a dense linear layer or convolution, but it picks none; there are: 0, 1.0, 2, 3"
    )
    with pytest.raises(ValueError, match=message):
        make_plan(network(), {nn.Linear: LowRank} if exclude else {"attention": LowRank}, exclude=["attention"])
    with pytest.raises(ValueError, match=r"expected Linear to pick .*; there are: none"):
        make_plan(nn.Sequential(nn.ReLU()), {nn.Linear: LowRank})


def test_unknown_misfits_are_refused() -> None:
    with pytest.raises(ValueError, match="expected misfits to be one of 'error', 'skip', got 'ignore'"):
        make_plan(network(), {nn.Linear: LowRank}, misfits="ignore")


@pytest.mark.parametrize("rule", [3, LowRank(4, 4, 1), None])
def test_rules_of_another_type_are_refused(rule: Any) -> None:
    with pytest.raises(
        TypeError, match="expected a format class, the name of a format, or a Rule, got " + re.escape(repr(rule))
    ):
        make_plan(network(), {nn.Linear: rule})


def test_blocks_in_a_rule_must_mean_something() -> None:
    with pytest.raises(ValueError, match="expected no blocks for LowRank, whose budget alone decides, got 4"):
        make_plan(network(), {nn.Linear: Rule(LowRank, blocks=4)})
    assert make_plan(network(), {nn.Linear: LowRank}, blocks=4) == make_plan(network(), {nn.Linear: LowRank})


def test_missing_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="expected blocks for Blast, in make_plan or in a Rule, got none"):
        make_plan(network(), {nn.Linear: Blast})


@pytest.mark.parametrize("keep", [0, 0.0, -0.5, 1.5, float("nan")])
def test_keeps_out_of_range_are_refused(keep: float) -> None:
    with pytest.raises(ValueError, match=r"expected keep to be in \(0, 1\], got " + str(keep)):
        make_plan(network(), {nn.Linear: LowRank}, keep=keep)
    with pytest.raises(ValueError, match=r"expected keep to be in \(0, 1\], got " + str(keep)):
        make_plan(network(), {nn.Linear: Rule(LowRank, keep=keep)})


# The plan itself

PLAN = Plan({"a": Blast(32, 64, (2, 4), 3), "b.c": BlockSparse(8, 8, ("10", "11"), 1)}, {"d": "too small"})


def test_a_plan_is_a_mapping_that_cannot_change() -> None:
    layers = {"a": LowRank(4, 4, 1)}
    plan = Plan(layers)
    layers["b"] = LowRank(4, 4, 1)
    assert (len(plan), list(plan), plan["a"]) == (1, ["a"], LowRank(4, 4, 1))
    with pytest.raises(TypeError, match="does not support item assignment"):
        plan["b"] = LowRank(4, 4, 1)  # pyright: ignore
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_a_plan_holds_formats() -> None:
    with pytest.raises(TypeError, match="expected a format for every layer, got 'blast' for 'b'"):
        Plan({"a": LowRank(4, 4, 1), "b": "blast"})  # pyright: ignore


def test_a_plan_prints_its_layers_and_what_it_left_out() -> None:
    assert str(PLAN).splitlines() == [
        f"a    {PLAN['a']}  keep {PLAN['a'].keep:.3f}",
        f"b.c  {PLAN['b.c']}  keep {PLAN['b.c'].keep:.3f}",
        "d    skipped: too small",
    ]
    assert str(Plan({})) == ""


def test_json_round_trip() -> None:
    again = Plan.from_json(PLAN.to_json())
    assert again == PLAN
    assert list(again) == list(PLAN)
    assert again["a"] == Blast(32, 64, (2, 4), 3)
    assert json.loads(PLAN.to_json())["schema"] == 1


@pytest.mark.parametrize(
    "text",
    ["", "3", "[]", "{}", '{"schema": 1, "layers": {}}', '{"schema": 1, "layers": 3, "skipped": {}}'],
)
def test_json_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected (a plan as JSON|.*the JSON of a plan)"):
        Plan.from_json(text)


@pytest.mark.parametrize("layer", [3, "blast", ["blast"], None])
def test_json_of_a_layer_that_is_no_format_is_refused(layer: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        Plan.from_json(json.dumps({"schema": 1, "layers": {"a": layer}, "skipped": {}}))


def test_json_of_an_unknown_format_is_refused() -> None:
    text = PLAN.to_json().replace('"blast"', '"butterfly"')
    with pytest.raises(ValueError, match=r"expected the format's name to be one of .*, got 'butterfly'"):
        Plan.from_json(text)


def test_json_of_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a plan of schema 1, got 2; update structmat"):
        Plan.from_json('{"schema": 2, "layers": {}, "skipped": {}}')


def test_a_plan_is_saved_and_loaded(tmp_path: Path) -> None:
    file = tmp_path / "new" / "plan.json"
    PLAN.save(file)
    assert Plan.load(file) == PLAN
    assert [path.name for path in file.parent.iterdir()] == ["plan.json"]


def test_a_file_without_a_plan_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a plan, .*, in '.*nowhere', found no file"):
        Plan.load(tmp_path / "nowhere")
    (tmp_path / "other").write_text("{}")
    with pytest.raises(ValueError, match=r"'.*other': expected the JSON of a plan"):
        Plan.load(tmp_path / "other")


@pytest.mark.parametrize("M", [10**16, 10**18])
def test_an_axis_beyond_measure_is_refused_at_once(M: int) -> None:
    text = PLAN.to_json().replace('"M": 32', f'"M": {M}').replace("2,", "7,", 1)
    assert str(M) in text
    with pytest.raises(ValueError, match=f"expected a block count that divides the {M} rows, got 7$"):
        Plan.from_json(text)
