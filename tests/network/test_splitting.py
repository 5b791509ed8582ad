"""Networks of PyTorch's own modules: planned, compressed, trained, saved, loaded and put back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import structmat as sm
from structmat.network import find_sites, structured_layers
from structmat.network.splitting import split_modules, unfused
from structmat.nn import SplitAttention


class Everything(nn.Module):
    """One of each module that holds several matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 16, 3, padding=1)
        self.grouped = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.transposed = nn.ConvTranspose1d(16, 16, 2, 2)
        self.lstm = nn.LSTM(16, 8, bidirectional=True, batch_first=True)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.cross = nn.MultiheadAttention(16, 2, kdim=8, vdim=8, batch_first=True)
        self.gru = nn.GRU(16, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        states = self.transposed(self.grouped(self.conv(x.mT)).relu()).mT
        states = self.encoder(self.lstm(states)[0])
        states = states + self.cross(states, x, x, need_weights=False)[0]
        return self.head(self.norm(self.gru(states)[0]))


PARTS = {
    **{f"grouped.group_{k}": (8, 24) for k in range(2)},
    "transposed": (32, 16),
    "conv": (16, 24),
    **{f"lstm.{part}_l0{end}": (32, n) for part, n in (("ih", 16), ("hh", 8)) for end in ("", "_reverse")},
    **{f"encoder.layers.{k}.self_attn.{one}_proj": (16, 16) for k in range(2) for one in ("q", "k", "v", "out")},
    **{f"encoder.layers.{k}.linear{one}": shape for k in range(2) for one, shape in ((1, (32, 16)), (2, (16, 32)))},
    **{f"cross.{one}_proj": (16, 16 if one in ("q", "out") else 8) for one in ("q", "k", "v", "out")},
    "gru.ih_l0": (24, 16),
    "gru.hh_l0": (24, 8),
    "head": (3, 8),
}


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 5, 8, generator=generator) for _ in range(3)]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Everything().eval()


def low_rank_(model: nn.Module, plan: sm.Plan) -> None:
    """Make every weight exactly of the format."""
    with torch.no_grad(), unfused(model):
        for name, site in find_sites(model).items():
            site.matrix.copy_(plan[name].to_dense(plan[name].init()))


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).detach().norm() / wanted.detach().norm())


def plan_for(model: nn.Module) -> sm.Plan:
    return sm.make_plan(model, "low_rank", keep=0.7)


def test_every_matrix_is_a_site(model: nn.Module) -> None:
    sites = find_sites(model)
    assert {name: tuple(site.matrix.shape) for name, site in sites.items()} == PARTS
    assert all(site.problem is None for site in sites.values())
    assert not split_modules(model)
    assert {row.name: row.shape for row in sm.report(model).rows} == PARTS
    assert {row.note for row in sm.report(model).rows} == {""}


@pytest.mark.parametrize("data", ["none", "calibration", "batches"])
def test_compressed_exactly_where_weights_are_of_the_format(model: nn.Module, data: str) -> None:
    plan = plan_for(model)
    low_rank_(model, plan)
    wanted, before = model(batches()[0]), copy.deepcopy(model.state_dict())
    given: dict[str, Any] = {"batches": batches()} if data == "batches" else {}
    if data == "calibration":
        given = {"calibration": sm.calibrate(model, batches(), plan, progress=False)}
        assert list(model.state_dict()) == list(before)
    sm.compress_(model, plan, progress=False, **given)
    assert set(structured_layers(model)) == set(plan) == set(PARTS)
    assert relative(model(batches()[0]), wanted) < 2e-5
    sm.densify_(model)
    assert list(model.state_dict()) == list(before)
    assert not split_modules(model)
    assert relative(model(batches()[0]), wanted) < 2e-5


def test_an_error_leaves_the_network_as_it_was(model: nn.Module) -> None:
    plan, before = plan_for(model), list(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError):
        sm.compress_(model, plan, batches=[torch.randn(2, 5, 9)], progress=False)
    assert list(model.state_dict()) == before
    assert [type(module) for module in model.modules()] == kinds
    assert model.encoder.use_nested_tensor  # type: ignore[union-attr]


def test_trained_saved_and_loaded(model: nn.Module, tmp_path: Path) -> None:
    plan = sm.make_plan(model, {r".*(q_proj|hh_l0|group_1|transposed)": "low_rank"}, keep=0.7)
    sm.apply_plan_(model.train(), plan)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = batches()[0]
    losses = []
    for _ in range(5):
        loss = model(x).square().mean()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    sm.save_model(model.eval(), tmp_path / "all.safetensors")
    loaded = sm.load_model(Everything().eval(), tmp_path / "all.safetensors")
    assert sm.plan_of(loaded) == sm.plan_of(model)
    assert torch.equal(loaded(x), model(x))
    with torch.device("meta"):
        empty = Everything().eval()
    assert torch.equal(sm.load_model(empty, tmp_path / "all.safetensors")(x), model(x))


def test_a_module_that_is_split_but_dense_is_saved_and_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(nn.GRU(4, 5), nn.Identity())
    model[0] = find_sites(model)["0.ih_l0"].holder.twin  # type: ignore[union-attr]
    sm.save_model(model, tmp_path / "split.safetensors")
    loaded = sm.load_model(nn.Sequential(nn.GRU(4, 5), nn.Identity()), tmp_path / "split.safetensors")
    x = torch.randn(3, 2, 4)
    assert torch.equal(loaded[0](x)[0], model[0](x)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("grads", [False, True])
def test_an_encoder_in_evaluation_is_right_with_padding(grads: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2)).eval()
    x, padding = torch.randn(3, 6, 16), torch.arange(6) >= torch.tensor([6, 4, 2])[:, None]
    names = [name for name in find_sites(model) if "q_proj" in name]
    weights = {name: find_sites(model)[name].matrix.detach() for name in names}
    exact = {name: sm.LowRank(16, 16, rank=7) for name in names}
    with torch.set_grad_enabled(grads):
        plain = model[0](x), model[0](x, src_key_padding_mask=padding)
        for name, weight in weights.items():
            weight.copy_(exact[name].to_dense(exact[name].init()))
        plain = model[0](x), model[0](x, src_key_padding_mask=padding)
        sm.compress_(model, exact, progress=False)
        assert isinstance(model[0].layers[0].self_attn, SplitAttention)
        got = model[0](x), model[0](x, src_key_padding_mask=padding)
    assert relative(got[0], plain[0]) < 1e-5
    assert relative(got[1][~padding], plain[1][~padding]) < 1e-5


def test_what_stays_dense_is_named_with_its_reason() -> None:
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(8, 2),
            "hooked": nn.LSTM(8, 8),
            "depthwise": nn.Conv1d(8, 8, 3, groups=8),
            "embedding": nn.Embedding(5, 8),
            "norms": nn.ModuleList(nn.LayerNorm(8) for _ in range(3)),
            "sub": nn.Bilinear(2, 3, 4),
            "head": nn.Linear(8, 8),
        }
    )
    model["hooked"].register_forward_hook(lambda *_: None)
    plan = sm.make_plan(model, {nn.MultiheadAttention: "low_rank"}, keep=0.6)
    assert set(plan) == {f"attention.{one}_proj" for one in ("q", "k", "v", "out")}
    assert plan.stays.keys() - {"hooked", "depthwise", "head", "sub.weight"} == {
        "hooked.weight_ih_l0",
        "hooked.weight_hh_l0",
        "Embedding (1 module, 40 parameters)",
        "LayerNorm (3 modules, 48 parameters)",
    }
    assert plan.stays["depthwise"].startswith("it is a convolution with 8 groups, whose matrices of 1 x 3 have one row")
    assert plan.stays["hooked"].startswith("it has hooks, which would be lost")
    assert plan.stays["head"] == "it is excluded, or no rule picks it"
    assert "stays dense: an embedding is looked up, not multiplied by" in str(plan)
    assert sm.Plan.from_json(plan.to_json()).stays == plan.stays
    text = str(sm.report(model, plan=plan))
    assert "not in any row: LayerNorm (3 modules, 48 parameters): their parameters are no matrices" in text
    notes = {row.name: row.note for row in sm.report(model, plan=plan).rows}
    assert notes["attention.q_proj"] == "it is not replaced yet"
    assert notes["head"] == "it is excluded, or no rule picks it"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda m: m.update({"again": nn.ParameterList([m["one"].in_proj_weight])}), "shared with another module"),
        (lambda m: m["one"].register_buffer("more", torch.ones(1)), "it holds 'more' too"),
        (lambda m: setattr(m["one"], "forward", m["one"].forward), "its forward was replaced"),
        (lambda m: m["one"].in_proj_weight.register_hook(lambda g: g), "its weight has gradient hooks"),
        (
            lambda m: setattr(m["one"], "in_proj_weight", nn.Parameter(torch.zeros(24, 8, dtype=torch.complex64))),
            "no plain matrix of floating-point numbers but complex64",
        ),
        (lambda m: m.update({"one": type("Own", (nn.GRU,), {})(8, 8)}), "it is a Own, a GRU that may use its weights"),
    ],
)
def test_what_cannot_be_split_says_why(spoil: Any, reason: str) -> None:
    model = nn.ModuleDict({"one": nn.MultiheadAttention(8, 2)})
    spoil(model)
    assert reason in (find_sites(model)["one"].problem or "")
    assert "it is the whole model" in (find_sites(nn.LSTM(4, 4))[""].problem or "")


def test_a_network_is_allocated_and_is_as_before(model: nn.Module) -> None:
    before = list(model.state_dict())
    plan = sm.allocate(model, batches(), keep=0.6, structures="low_rank", progress=False)
    assert set(plan) == set(PARTS) - set(plan.skipped)
    assert list(model.state_dict()) == before
    assert "LayerNorm (5 modules" in str(plan)
