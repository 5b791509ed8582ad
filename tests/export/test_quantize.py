"""``quantize_``: integers in the layers, in the files, and after loading."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conformance import CASES
from small_networks import mlp
from structmat import (
    Blast,
    GaudiGblr,
    Gblr,
    LowRank,
    apply_plan_,
    compress_,
    densify_,
    load_model,
    load_pretrained,
    make_plan,
    plan_of,
    quantize_,
    report,
    save_model,
)
from structmat.cli import main
from structmat.compress import spectra
from structmat.fit.rounding import round_factors
from structmat.formats import FORMATS, Dense, Quantized, format_from_json
from training import tiny

BASES = {name: format for name, format in CASES.items() if format.name in FORMATS and not format.learns}


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (8, 5), (4, 0), (4, 4)])
@pytest.mark.parametrize("case", BASES)
def test_every_format(case: str, bits: int, group: int) -> None:
    base = BASES[case]
    factors = base.init(generator=seed())
    format = Quantized(base.M, base.N, base, bits, group)
    rounded = format.rounded(factors)
    format.check_factors(rounded)
    opened = format.opened(rounded)
    for name in format.rounded_factors:  # each entry is within half a step, or cut off by a quarter at most
        largest = factors[name].abs().max()
        assert (opened[name] - factors[name]).abs().max() <= 0.26 * largest
        assert (opened[name] - factors[name]).norm() <= (0.02 if bits == 8 else 0.3) * factors[name].norm()
    assert format_from_json(format.to_json()) == format
    assert not any(spec.trainable for spec in format.factor_specs().values())
    x = torch.randn(3, base.N, generator=seed())
    torch.testing.assert_close(format.matmul(x, rounded), x @ format.to_dense(rounded).mT, rtol=1e-4, atol=1e-5)
    twice = format.to_dense(format.scaled(rounded, 2.0))
    if base.scale_exponents:
        torch.testing.assert_close(twice, 2 * format.to_dense(rounded))
    fresh = format.init(generator=seed())
    assert torch.equal(format.to_dense(fresh), format.to_dense(rounded))


def test_integers_are_exact_where_the_values_are() -> None:
    base = LowRank(16, 16, 4)
    signs = [[7.0 if row >> k & 1 else -7.0 for k in range(4)] for row in range(16)]
    shifted = [torch.tensor([7.0, -3.0, 5.0, 2.0]).roll(k) for k in range(16)]
    whole = {"left": torch.tensor(signs), "right": torch.stack(shifted, 1)}  # a step is 1; inputs have one size
    for bits in (4, 8):
        format = Quantized(16, 16, base, bits)
        opened = format.opened(format.rounded(whole))
        for name, factor in whole.items():
            torch.testing.assert_close(opened[name], factor, rtol=0, atol=7 / 127 if bits == 8 else 1e-6)


def test_what_cannot_be_quantised() -> None:
    with pytest.raises(ValueError, match=r"expected a base of shape \(8, 4\)"):
        Quantized(8, 4, LowRank(4, 8, 2))
    with pytest.raises(ValueError, match=r"with final factors in floating point, got GaudiGblr.*; harden_"):
        Quantized(12, 12, GaudiGblr(12, 12, 12, 0.5))
    with pytest.raises(ValueError, match="it is quantised already"):
        Quantized(8, 8, Quantized(8, 8, LowRank(8, 8, 2)))
    with pytest.raises(ValueError, match="bits"):
        Quantized(8, 8, LowRank(8, 8, 2), 3)
    with pytest.raises(ValueError, match="expected group of at least 0, got -1"):
        Quantized(8, 8, LowRank(8, 8, 2), 8, -1)
    with pytest.raises(ValueError, match="kind"):
        quantize_(mlp(), "int2")
    with pytest.raises(ValueError, match=r"expected names of layers that can be quantised, got \['9'\]; there are: 0"):
        quantize_(mlp(), names=["9"])
    with pytest.raises(ValueError, match=r"got none; there are: none"):
        quantize_(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_network_is_stored_in_integers_and_comes_back_equal(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 128)).eval()
    apply_plan_(model, {"0": Blast(256, 256, (4, 4), 96)})
    x = torch.randn(5, 256)
    before = model(x)
    save_model(model, tmp_path / "float.safetensors")
    errors = quantize_(model, kind)
    assert set(errors) == {"0", "2"}
    assert all(1e-4 < error < (0.03 if kind == "int8" else 0.3) for error in errors.values())
    assert (model(x) - before).norm() < 2 * max(errors.values()) * before.norm()
    path = tmp_path / "integers.safetensors"
    save_model(model, path)
    share = path.stat().st_size / (tmp_path / "float.safetensors").stat().st_size
    assert share < (0.29 if kind == "int8" else 0.2)
    fresh = load_model(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 128)).eval(), path)
    assert torch.equal(fresh(x), model(x))
    assert plan_of(fresh) == plan_of(model)
    with pytest.raises(ValueError, match="got none; there are: none"):
        quantize_(model)
    after = model(x)
    torch.testing.assert_close(densify_(model)(x), after, rtol=1e-3, atol=1e-4)


def test_balancing_hurts_less_than_rounding_alone() -> None:
    base = LowRank(64, 64, 16)
    factors = base.init(generator=seed())
    factors["left"] = factors["left"] * torch.logspace(-2, 2, 16)  # one component outshines others in this factor
    factors["right"] = factors["right"] / torch.logspace(-2, 2, 16)[:, None]
    model = nn.Sequential(nn.Linear(64, 64))
    apply_plan_(model, {"0": base}, factors={"0": factors})
    dense = base.to_dense(factors)
    alone = Quantized(64, 64, base)
    unbalanced = (alone.to_dense(alone.rounded(factors)) - dense).norm() / dense.norm()
    assert quantize_(model)["0"] < unbalanced / 10


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_large_weights_of_a_quiet_input_do_not_spoil_the_others(kind: str, data: bool) -> None:
    torch.manual_seed(0)
    quiet = torch.ones(96)
    quiet[7] = 1e-4
    batches = [torch.randn(100, 96) * quiet for _ in range(4)]
    for base in (Blast(96, 96, (4, 4), 40), LowRank(96, 96, 40), None):
        model = nn.Sequential(nn.Linear(96, 96, bias=False)).eval().requires_grad_(False)
        if base is not None:
            apply_plan_(model, {"0": base}, generator=seed())
            densify_(model)
        alike = copy.deepcopy(model)  # the same network of inputs of one size
        model[0].weight[:, 7] *= 1e4
        for network in (model, alike):
            if base is not None:
                compress_(network, {"0": base}, batches=batches if network is model else None, progress=False)
        errors = []
        for network, scale in ((model, quiet), (alike, torch.ones(96))):
            x = torch.randn(200, 96, generator=seed()) * scale
            wanted = network(x)
            quantize_(network, kind, batches=batches if data and network is model else None, progress=False)
            errors.append(float((network(x) - wanted).norm() / wanted.norm()))
        assert errors[0] < 2 * errors[1]


def test_layers_that_share_factors_come_along() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16, bias=False) for _ in range(3))
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(x)))

    torch.manual_seed(0)
    for batches in (None, [torch.randn(40, 16)]):
        for tied in (True, False):
            model = Shared().eval().requires_grad_(False)
            apply_plan_(model, {name: LowRank(16, 16, 4) for name in ("a", "c")})
            if tied:
                model.b = model.a.with_factors(model.a.format, dict(model.a.factors))
                for key in model.a.factors:
                    setattr(model.b, key, getattr(model.a, key))
            names = ["b", "c"] if tied else ["c"]
            errors = quantize_(model, names=names, batches=batches, progress=False)
            assert set(errors) == ({"a", "c"} if tied else {"c"})
            assert isinstance(model.c.format, Quantized)
            assert isinstance(model.b.format, Quantized) == tied  # pyright: ignore[reportAttributeAccessIssue]


def test_what_the_data_does_not_reach_is_rounded_without_it() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Apart().eval()
    with pytest.warns(UserWarning, match=r"the data never reaches \['unused'\], which are rounded without it"):
        assert set(quantize_(model, batches=[torch.randn(40, 16)], progress=False)) == {"used", "unused"}


def test_matrices_and_inputs_of_zeros() -> None:
    for base in (Blast(16, 16, (2, 2), 4), LowRank(16, 16, 4), Dense(16, 16)):
        some = base.init(generator=seed())
        for given in (some, {n: f * (n != "right") for n, f in some.items()}, {n: 0 * f for n, f in some.items()}):
            for moment in (None, torch.zeros(16, 16), 1e-20 * torch.eye(16)):
                format = Quantized(16, 16, base)
                found = format.to_dense(round_factors(format, given, moment))
                torch.testing.assert_close(found, base.to_dense(given), rtol=0.05, atol=0.02)
    empty = Gblr(16, 16, 0, (0, 0))
    format = Quantized(16, 16, empty)
    assert not format.to_dense(round_factors(format, empty.init())).any()


@pytest.mark.parametrize("most", [2**31, 1])
def test_data_decides_what_errors_count(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "MOMENT_BYTES", most)  # all layers in one part, or each in its own
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 96)).eval().requires_grad_(False)
    fits = compress_(model, {"0": Blast(96, 96, (8, 8), 32)}, progress=False)
    assert fits["0"].format.name == "blast"
    mixing = torch.randn(96, 96) * torch.logspace(0, -2, 96)
    batches = [torch.randn(200, 96) @ mixing.mT for _ in range(4)]
    x = torch.randn(500, 96) @ mixing.mT
    wanted, errors = model(x), []
    for given in (None, batches):
        other = copy.deepcopy(model)
        assert set(quantize_(other, "int4", batches=given, progress=False)) == {"0", "2"}
        errors.append(float((other(x) - wanted).norm() / wanted.norm()))
    assert errors[1] < 0.8 * errors[0]


def test_models_of_transformers_load_as_usual(tmp_path: Path) -> None:
    model = tiny.structured(tiny.llama()).eval()
    quantize_(model)
    tokens = torch.randint(3, 128, (2, 7))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert any(tensor.dtype == torch.int8 for tensor in stored.values())
    loaded = load_pretrained(tmp_path).eval()
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.get_input_embeddings().weight.dtype == torch.float32
    half = load_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    torch.testing.assert_close(half(tokens).logits.float(), model(tokens).logits, rtol=0.1, atol=0.1)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.structured(tiny.llama())
    model.save_pretrained(tmp_path / "small")
    assert main(["quantize", str(tmp_path / "small"), "-o", str(tmp_path / "four"), "--to", "int4"]) == 0
    assert "layers are in int4 now" in "".join(capsys.readouterr())
    assert {format.name for format in plan_of(load_pretrained(tmp_path / "four")).values()} == {"quantized"}
    assert main(["report", str(tmp_path / "four")]) == 0


def test_tables_say_what_is_quantised() -> None:
    base = LowRank(8, 8, 2)
    format = Quantized(8, 8, base)
    assert format.settings() == f"int8, {base.label} {base.settings()}"
    assert (format.num_parameters(), format.multiplications(3)) == (base.num_parameters(), base.multiplications(3))
    model = mlp().eval()
    apply_plan_(model, make_plan(model, Blast, keep=0.6, blocks=2))
    before = report(model).parameters
    quantize_(model)
    assert report(model).parameters == before
