"""Measured choices: what is picked is the fastest, everything is told, and it can be stored and set again."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import structmat as sm
from structmat.bench import autotune
from structmat.nn.linear import bucket


def network() -> nn.Sequential:
    torch.manual_seed(0)
    wide = sm.StructuredLinear(sm.Blast(64, 48, blocks=4, rank=12))
    return nn.Sequential(wide, nn.GELU(), sm.StructuredLinear(sm.Monarch(32, 64, blocks=4, rank=2)), nn.Linear(32, 8))


@pytest.mark.parametrize(("tokens", "power"), [(0, 1), (1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (1000, 1024)])
def test_bucket_is_the_next_power_of_two(tokens: int, power: int):
    assert bucket(tokens) == power


def given(monkeypatch: pytest.MonkeyPatch, times: dict[str, float]) -> None:
    """Measured seconds: those given by way, 1 for every other."""

    def measured(runs, *, rounds, settle):
        for run in runs.values():
            run()
        return {name: times.get(name, 1.0) for name in runs}

    monkeypatch.setattr(autotune, "time_side_by_side", measured)


def test_the_fastest_way_is_set_for_the_tokens_that_were_seen(monkeypatch: pytest.MonkeyPatch):
    given(monkeypatch, {"vectors": 0.5, "rows": 0.4, "dense": 0.45})
    model = network()
    x = torch.randn(2, 5, 48)
    before = model(x)
    found = sm.autotune_(model, x)
    assert model[0].algorithms == {16: "vectors"}
    assert model[2].algorithms == {16: "rows"}
    assert [(c.layer, c.tokens, c.algorithm, c.dense_is_faster) for c in found.choices] == [
        ("0", 10, "vectors", True),
        ("2", 10, "rows", False),
    ]
    assert isinstance(model[0], sm.StructuredLinear)
    assert "dense would be faster and take +" in str(found).splitlines()[0]
    assert "dense would be" not in str(found).splitlines()[1]
    torch.testing.assert_close(model(x), before)


def test_a_way_within_the_noise_of_the_automatic_one_is_not_taken(monkeypatch: pytest.MonkeyPatch):
    given(monkeypatch, {"vectors": 0.96})
    model = network()
    found = sm.autotune_(model, tokens=[1, 64])
    assert {choice.algorithm for choice in found.choices} == {"automatic"}
    assert model[0].algorithms == {}
    assert len(found.choices) == 4


def test_dense_layers_need_consent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    given(monkeypatch, {"dense": 0.5})
    model = network()
    x = torch.randn(3, 48)
    before = model(x)
    kept = sm.autotune_(model, x)
    assert not kept.densified
    assert all(choice.dense_is_faster for choice in kept.choices)
    found = sm.autotune_(model, x, allow_dense=True)
    assert found.densified == ("0", "2")
    assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear, nn.Linear]
    torch.testing.assert_close(model(x), before)
    found.save(tmp_path / "choices.json")
    other = network()
    loaded = sm.bench.autotune.Tuning.load(tmp_path / "choices.json")
    assert loaded == found
    with pytest.raises(
        ValueError, match="expected allow_dense=True, since a dense product was chosen for 2 layers: 0, 2"
    ):
        loaded.apply_(other)
    assert isinstance(other[0], sm.StructuredLinear)
    assert isinstance(loaded.apply_(other, allow_dense=True)[0], nn.Linear)


def test_choices_are_stored_and_set_again(tmp_path: Path):
    model = network()
    found = sm.autotune_(model, tokens=[1, 40], rounds=2)
    found.save(tmp_path / "choices.json")
    other = network()
    sm.bench.autotune.Tuning.load(tmp_path / "choices.json").apply_(other)
    assert [other[i].algorithms for i in (0, 2)] == [model[i].algorithms for i in (0, 2)]
    assert all(choice.seconds > 0 and choice.dense_seconds > 0 for choice in found.choices)
    assert all(choice.seconds <= choice.automatic_seconds for choice in found.choices)


def test_old_names_of_algorithms_are_read(tmp_path: Path):
    found = sm.autotune_(network(), tokens=[1], rounds=1)
    choices = [{**vars(choice), "algorithm": "vectors first"} for choice in found.choices]
    (tmp_path / "old.json").write_text(json.dumps({"hardware": found.hardware, "choices": choices}))
    loaded = sm.bench.autotune.Tuning.load(tmp_path / "old.json")
    assert {choice.algorithm for choice in loaded.choices} == {"vectors_first"}


def test_choices_from_other_hardware_are_set_with_a_warning(tmp_path: Path):
    found = sm.autotune_(network(), tokens=[1], rounds=1)
    text = json.dumps({"hardware": {**found.hardware, "threads": "99"}, "choices": [vars(c) for c in found.choices]})
    (tmp_path / "choices.json").write_text(text)
    with pytest.warns(UserWarning, match="measured elsewhere .threads 99, now"):
        sm.bench.autotune.Tuning.load(tmp_path / "choices.json").apply_(network())


def test_choices_for_another_network_are_refused(tmp_path: Path):
    found = sm.autotune_(network(), tokens=[1], rounds=1)
    other = network()
    other[0] = sm.StructuredLinear(sm.Blast(64, 48, blocks=4, rank=11))
    with pytest.raises(ValueError, match=r"expected Blast.*rank=12.* at '0', as it was measured, got Blast.*rank=11"):
        found.apply_(other)
    del other[2]
    other[0] = network()[0]
    with pytest.raises(ValueError, match="at '2', as it was measured, got no structured layer"):
        found.apply_(other)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"expected the choices that Tuning\.save writes in '.*other\.json'"):
        sm.bench.autotune.Tuning.load(tmp_path / "other.json")


def test_gblr_layers_go_into_tiles_where_that_is_faster(monkeypatch: pytest.MonkeyPatch):
    format = sm.GaudiGblr.for_budget(48, 64, keep=0.25)
    hard, factors = sm.formats.harden(format, format.init(generator=torch.Generator().manual_seed(0)))
    model = nn.Sequential(sm.StructuredLinear(hard, factors=factors)).eval()
    x = torch.randn(3, 64)
    before = model(x)
    given(monkeypatch, {"tiled": 0.5})
    found = sm.autotune_(model, x)
    assert found.choices[0].algorithm == "tiled"
    assert isinstance(model[0].format, sm.formats.TiledGblr)
    torch.testing.assert_close(model(x), before)


def test_bad_calls():
    model = network()
    with pytest.raises(ValueError, match="expected either example_inputs or tokens, got neither"):
        sm.autotune_(model)
    with pytest.raises(ValueError, match="expected either example_inputs or tokens, got both"):
        sm.autotune_(model, torch.randn(1, 48), tokens=[1])
    with pytest.raises(ValueError, match="expected a network with structured layers, got none"):
        sm.autotune_(nn.Linear(3, 3), tokens=[1])
    with pytest.raises(ValueError, match="expected a call that reaches a structured layer"):
        sm.autotune_(model, torch.randn(0, 48))
    with pytest.raises(ValueError, match="tokens"):
        sm.autotune_(model, tokens=[0])
    with pytest.raises(ValueError, match="expected at least one number of tokens, got none"):
        sm.autotune_(model, tokens=[])


def test_convolutions_are_measured_at_their_positions():
    model = nn.Sequential(sm.StructuredConv2d(sm.LowRank(12, 27, rank=4), kernel_size=3, padding=1))
    found = sm.autotune_(model, torch.randn(2, 3, 5, 5), rounds=1)
    assert found.choices[0].tokens == 50


def test_a_choice_holds_for_its_power_of_two_alone(monkeypatch: pytest.MonkeyPatch):
    given(monkeypatch, {"vectors": 0.5})
    model = network()
    found = sm.autotune_(model, tokens=[10, 12, 12, 1])
    assert [(c.tokens, c.algorithm) for c in found.choices if c.layer == "0"] == [(12, "vectors"), (1, "vectors")]
    used: list[str] = []
    monkeypatch.setattr(
        sm.Blast, "matmul", lambda self, x, factors, algorithm="": (used.append(algorithm), x.new_zeros(len(x), 64))[1]
    )
    for tokens in (0, 1, 2, 8, 9, 16, 17):
        model[0](torch.randn(tokens, 48))
    assert used == ["", "vectors", "", "", "vectors", "vectors", ""]


def test_calls_count_as_often_as_they_are_made(monkeypatch: pytest.MonkeyPatch):
    seconds = {1: {"automatic": 1.0, "dense": 2.0}, 128: {"automatic": 10.0, "dense": 5.0}}
    monkeypatch.setattr(autotune, "measured_ways", lambda layer, count, dtype, rounds: seconds[bucket(count)])

    class Often(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = sm.StructuredLinear(sm.Blast(48, 48, blocks=4, rank=12))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(100):
                self.layer(x[:1])
            return self.layer(x)

    model = Often()
    assert not sm.autotune_(model, torch.randn(100, 48), allow_dense=True).densified
    seconds[1]["dense"] = 0.9
    assert sm.autotune_(model, torch.randn(100, 48), allow_dense=True).densified == ("layer",)


def test_a_later_choice_replaces_an_earlier_one(monkeypatch: pytest.MonkeyPatch):
    model = network()
    given(monkeypatch, {"vectors": 0.5})
    sm.autotune_(model, tokens=[16])
    given(monkeypatch, {})
    sm.autotune_(model, tokens=[16])
    assert model[0].algorithms == {}


def test_the_network_is_left_as_it_was():
    torch.manual_seed(0)
    layers = sm.StructuredLinear(sm.Blast(48, 48, blocks=4, rank=12)), nn.BatchNorm1d(48), nn.Dropout(0.5)
    model = nn.Sequential(*layers).train()
    mean, state = layers[1].running_mean.clone(), torch.get_rng_state()
    sm.autotune_(model, torch.ones(4, 48), rounds=1)
    assert torch.equal(layers[1].running_mean, mean)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert layers[2].training


def test_tied_layers_become_dense_together(monkeypatch: pytest.MonkeyPatch):
    given(monkeypatch, {"dense": 0.5})
    model = network()
    model.append(sm.StructuredLinear(model[0].format, bias=False))
    for name in model[0].factors:
        setattr(model[4], name, getattr(model[0], name))
    found = sm.autotune_(model, tokens=[4], allow_dense=True)
    assert set(found.densified) == {"0", "2", "4"}
    assert model[4].weight is model[0].weight


def test_a_layer_that_is_the_model_stays_one(monkeypatch: pytest.MonkeyPatch):
    given(monkeypatch, {"dense": 0.1, "whole": 0.5})
    layer = sm.StructuredLinear(sm.Blast(48, 48, blocks=4, rank=12))
    assert sm.autotune_(layer, tokens=[4], allow_dense=True).choices[0].algorithm == "whole"


def test_unknown_algorithms_are_refused():
    found = sm.autotune_(network(), tokens=[1], rounds=1)
    wrong = sm.bench.autotune.Tuning((dataclasses.replace(found.choices[0], algorithm="nonsense"),), found.hardware)
    with pytest.raises(ValueError, match="nonsense"):
        wrong.apply_(network())
