"""A format of another package, in one file: everything works with it, and nothing in the library knows it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structmat as sm
from structmat.cli import main
from structmat.fit import GradientFit
from structmat.formats import FORMATS, format_from_json, sized_formats
from third_party.btt import BlockTensorTrain
from training import tiny

FORMATS.pop("btt", None)  # it is there where a test asks for it

LAYERS = ".*(q_proj|up_proj)"


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "btt", BlockTensorTrain)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file as an installed package that declares it as an entry point, for new processes."""
    site = tmp_path / "site"
    facts = site / "btt-1.0.dist-info"
    facts.mkdir(parents=True)
    (site / "btt.py").write_text((Path(__file__).parent / "btt.py").read_text())
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: btt\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[structmat.formats]\nbtt = btt\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]))
    return site


def fresh(code: str, *arguments: Any) -> str:
    """What a new process prints."""
    found = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(36, 36), nn.GELU(), nn.Linear(36, 16))


def test_the_file_uses_public_names_alone() -> None:
    text = (Path(__file__).parent / "btt.py").read_text()
    imports = [line for line in text.splitlines() if "structmat" in line and "import" in line]
    assert imports == [
        "from structmat import Format, register_format",
        "from structmat.formats import Factors, FactorSpec",
    ]
    source = Path(sm.__file__).parent
    assert not [path for path in source.rglob("*.py") if "btt" in path.read_text(encoding="utf-8").lower()]


def test_it_contains_monarch() -> None:
    """The format of Monarch matrices in their original order of the rows, with blocks ``m2 x n1``."""
    monarch = sm.Monarch(24, 30, blocks=(4, 5), rank=3, permute_output=True)
    factors = monarch.init(dtype=torch.float64)
    left, right = monarch.views(factors)  # (I, P, J, t), (J, I, t, Q)
    format = BlockTensorTrain(24, 30, ((6, 4), (5, 6)), 3)
    same = {
        "left": left.permute(1, 0, 3, 2).reshape(24, -1),
        "right": right.transpose(1, 2).reshape(-1, 6),
    }
    format.check_factors(same)
    assert format.num_parameters() == monarch.num_parameters()
    torch.testing.assert_close(format.to_dense(same), monarch.to_dense(factors))


def test_nested_tuples_survive_json() -> None:
    format = BlockTensorTrain(36, 16, ((9, 4), (4, 4)), 2)
    assert format.to_json() == {"format": "btt", "M": 36, "N": 16, "cores": [[9, 4], [4, 4]], "rank": 2}
    rebuilt = format_from_json(json.loads(json.dumps(format.to_json())))
    assert rebuilt == format
    assert hash(rebuilt) == hash(format)
    plan = sm.Plan({"0": format})
    assert sm.Plan.from_json(plan.to_json()) == plan


def test_it_has_a_name_options_and_settings() -> None:
    assert sized_formats()["btt"] is BlockTensorTrain
    assert list(BlockTensorTrain.budget_options()) == ["rank_cap"]
    assert BlockTensorTrain(36, 36, ((6, 6), (6, 6)), 2).settings() == "cores [[6, 6], [6, 6]], rank 2"


def test_plans_take_the_class_and_the_name() -> None:
    expected = sm.Plan({
        "0": BlockTensorTrain(36, 36, ((6, 6), (6, 6)), 2),
        "2": BlockTensorTrain(16, 36, ((4, 4), (6, 6)), 1),
    })  # fmt: skip
    for rule in (BlockTensorTrain, "btt", {nn.Linear: "btt"}, sm.Rule(BlockTensorTrain)):
        assert sm.make_plan(network(), rule, keep=0.7) == expected
    capped = sm.make_plan(network(), sm.Rule(BlockTensorTrain, options={"rank_cap": 1}), keep=0.7)
    assert [format.rank for format in capped.values()] == [1, 1]


def test_it_is_fitted_by_gradient_descent() -> None:
    format = BlockTensorTrain(36, 36, ((6, 6), (6, 6)), 2)
    assert sm.default_method(format) == GradientFit()
    weight = format.to_dense(format.init(generator=torch.Generator().manual_seed(3)))
    assert sm.default_method(format)(weight, format).error < 0.05
    assert GradientFit(steps=3000, learning_rate=0.1)(weight, format).error < 1e-5
    second_moment = torch.diag(torch.arange(1.0, 37))
    aware = GradientFit(steps=300)(torch.randn(36, 36), format, second_moment=second_moment)
    assert aware.output_error is not None
    assert aware.output_error < aware.error


def test_a_network_is_compressed_reported_trained_and_stored(tmp_path: Path) -> None:
    model = network()
    plan = sm.make_plan(model, "btt", keep=0.7)
    fits = sm.compress_(model, plan, method=GradientFit(steps=50), progress=False)
    assert {type(fit.format) for fit in fits.values()} == {BlockTensorTrain}
    rows = [re.split(r"\s{2,}", line)[:4] for line in str(sm.report(model, fits=fits)).splitlines()]
    assert ["0", "btt", "cores [[6, 6], [6, 6]], rank 2", "36 x 36"] in rows

    groups = sm.training.parameter_groups(model, 1e-2, 0.1)
    assert {group["name"]: len(group["params"]) for group in groups} == {"dense, no decay": 2, "structured": 4}
    assert sm.training.balance_(model) == []
    optimizer = torch.optim.AdamW(groups)
    x, y = torch.randn(64, 36), torch.randn(64, 16)
    losses = []
    for _ in range(30):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]

    sm.save_model(model, tmp_path / "model.safetensors")
    loaded = sm.load_model(network(), tmp_path / "model.safetensors")
    assert sm.plan_of(loaded) == plan
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    dense = sm.densify_(loaded)
    assert isinstance(dense[0], nn.Linear)
    torch.testing.assert_close(dense(x), model(x), rtol=1e-4, atol=1e-5)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(8)[None]).logits


def test_transformers_saves_and_loads_it_in_a_new_process_too(tmp_path: Path, installed: Path) -> None:
    model = tiny.llama()
    sm.compress_(model, sm.make_plan(model, {LAYERS: "btt"}, keep=0.8), method=GradientFit(steps=2), progress=False)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert {type(format) for format in sm.plan_of(loaded).values()} == {BlockTensorTrain}
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=0)
    code = """
import sys, torch, transformers, structmat
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(sorted({type(format).__module__ for format in structmat.plan_of(model).values()}))
with torch.no_grad():
    torch.save(model(torch.arange(8)[None]).logits, sys.argv[2])
"""
    assert fresh(code, tmp_path / "saved", tmp_path / "logits.pt").splitlines()[-1] == "['btt']"
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits_of(model), rtol=1e-5, atol=1e-6)


def test_the_command_line_compresses_to_it(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "dense")
    words = ["--layers", LAYERS, "--keep", "0.8"]
    made = {}
    for name, format in {"free": "btt", "capped": "btt:rank_cap=1"}.items():
        assert main(["compress", str(tmp_path / "dense"), "-o", str(tmp_path / name), *words, "--format", format]) == 0
        plan = sm.plan_of(sm.load_pretrained(tmp_path / name))
        made[name] = [format for format in plan.values() if isinstance(format, BlockTensorTrain)]
    assert max(format.rank for format in made["free"]) > 1
    assert len(made["capped"]) == len(made["free"])
    assert {format.rank for format in made["capped"]} == {1}


def test_the_command_line_of_a_new_process_knows_it(tmp_path: Path, installed: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "dense")
    code = "import sys; from structmat.cli import main; sys.exit(main(sys.argv[1:]))"
    shown = fresh(code, "plan", tmp_path / "dense", "--format", "btt:rank_cap=1", "--layers", LAYERS, "--keep", "0.8")
    assert shown.count("BlockTensorTrain") == 2  # of two layers each
    assert shown.count("rank=1)") == 2
