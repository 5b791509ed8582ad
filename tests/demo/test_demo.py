"""The demo: which structures it compares, how fast their layers are, and what it prints."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from structmat.demo import Settings, run_demo, speed, structures, usual_structures
from structmat.demo.settings import plans_for, rule_for
from structmat.demo.show import spread
from structmat.demo.vit import VisionTransformer
from structmat.fit import DEFAULT_METHODS, GradientFit
from structmat.formats import FORMATS, Factors, FactorSpec, Format, TiledGblr, register_format


@dataclass(frozen=True)
class Halves(Format):
    """The structure of another package: the upper half of the rows is there twice."""

    name: ClassVar[str] = "halves"
    label: ClassVar[str] = "two halves"
    scale_exponents: ClassVar[dict[str, float]] = {"upper": 1.0}

    @classmethod
    def for_budget(cls, M: int, N: int, *, keep: float) -> "Halves":
        if keep < 0.5:
            raise ValueError(f"expected a keep of at least 0.5, got {keep}")
        return cls(M, N)

    def factor_specs(self) -> dict[str, FactorSpec]:
        return {"upper": FactorSpec((self.M // 2, self.N))}

    def to_dense(self, factors: Factors) -> Tensor:
        return torch.cat([factors["upper"], factors["upper"]], -2)


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(FORMATS, "halves", Halves)
    register_format(Halves)
    return "halves"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch, and layers that are timed at once."""
    monkeypatch.setattr(Settings, "epochs", property(lambda self: (1, 1)))
    monkeypatch.setattr(speed, "SIZE", 64)


def test_every_sized_format_can_be_asked_for(halves: str) -> None:
    assert halves in structures()
    assert halves not in usual_structures()  # it has no method of its own
    assert "dense" not in structures()
    assert list(usual_structures()) == [
        "low_rank",
        "block_diagonal",
        "monarch",
        "block_sparse",
        "blast",
        "gaudi_gblr",
    ]


def test_blocks_of_the_rules() -> None:
    blocks = {name: rule_for(name).blocks for name in usual_structures()}
    assert blocks == {
        "low_rank": None,
        "block_diagonal": None,
        "monarch": 4,
        "block_sparse": 8,
        "blast": 8,
        "gaudi_gblr": None,
    }


def test_a_structure_that_does_not_fit_says_why(halves: str) -> None:
    settings = Settings(keep=0.3, formats=("low_rank", halves))
    plans, refused = plans_for(settings, VisionTransformer())
    assert list(plans) == [("low_rank", 0.15), ("low_rank", 0.3), ("low_rank", 0.6), ("halves", 0.6)]
    assert set(refused) == {("halves", 0.15), ("halves", 0.3)}
    assert "expected a keep of at least 0.5, got 0.3" in refused["halves", 0.3]


@pytest.mark.usefixtures("small")
def test_speeds_are_those_of_hardened_layers_beside_dense_ones(halves: str) -> None:
    settings = Settings(keep=0.3, formats=("low_rank", "gaudi_gblr", halves), quick=True)
    speeds, refused = speed.measure_speeds(settings)
    assert [(one.name, one.tokens) for one in speeds] == [
        (name, tokens) for name in ("low_rank", "gaudi_gblr") for tokens in (1, 16, 512)
    ]
    assert list(refused) == [halves]
    assert all(0.2 < one.keep <= 0.3 for one in speeds)
    assert all(one.speedup == one.dense_seconds / one.seconds > 0 for one in speeds)
    assert all(one.format.startswith(TiledGblr.__name__) for one in speeds if one.name == "gaudi_gblr")


@pytest.mark.usefixtures("small")
def test_a_run_with_the_structure_of_another_package(
    halves: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(DEFAULT_METHODS, Halves, GradientFit(steps=20))
    content = run_demo(Settings(0.6, ("gaudi_gblr", halves), out=tmp_path / "out", quick=True))
    assert json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8")) == content
    assert [result["name"] for result in content["results"]] == ["dense", "gaudi_gblr", "halves"]
    assert [one["name"] for one in content["speeds"]] == ["gaudi_gblr"] * 3 + ["halves"] * 3
    assert content["hardware"]["threads"] == str(torch.get_num_threads())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "results.json",
        "structure.png",
        "trade_off.png",
    ]
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("  ")[0] for line in lines]
    assert rows.count("dense") == rows.count("Gaudi-GBLR") == rows.count("two halves") == 2
    first = next(line for line in lines if line.startswith("structure"))
    assert first.split() == [
        "structure",
        "keep",
        "parameters",
        "mult./image",
        "of",
        "dense",
        "weight",
        "error",
        "compressed",
        "retrained",
        "from",
        "scratch",
    ]
    assert any("times as fast" in line for line in lines)


def test_the_spread_over_seeds() -> None:
    assert spread([0.5]) == "50.0%"
    assert spread([0.25, 0.75]) == "50.0% ± 35.4%"
    assert spread([0.5], "{:.3f}") == "0.500"
