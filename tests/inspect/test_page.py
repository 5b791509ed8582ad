"""The page of a report: whole, safe, small, and true to the report."""

import base64
import io
import re
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image
from torch import nn

from structmat import Blast, GaudiGblr, LowRank, Rule, apply_plan_, make_plan, report
from structmat.inspect import maps
from structmat.inspect.charts import BOTTOM, TOP, keep_panel, rounded_up
from structmat.inspect.kinds import depths, kinds
from structmat.inspect.page import Quality, Story, bytes_text, page, short, stored_bytes
from structmat.inspect.reports import Row

VOID = {"meta", "link", "img", "br"}


class Reader(HTMLParser):
    """Checks that every element is closed, and gathers what the page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def network(depth: int, width: int = 16) -> nn.Sequential:
    """Blocks of three linear layers: one for each format, and one that stays dense."""
    parts = ("up", "learned", "flat", "dense")
    block = lambda: nn.ModuleDict({name: nn.Linear(width, width) for name in parts})  # noqa: E731
    model = nn.Sequential(*[block() for _ in range(depth)])
    rules = {
        r".*up": Rule(Blast, keep=0.5, blocks=4),
        r".*learned": Rule(GaudiGblr, keep=0.8),
        r".*flat": Rule(LowRank, keep=0.5),
    }
    return apply_plan_(model, make_plan(model, rules), generator=torch.Generator().manual_seed(0))


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    model = network(3)
    story = Story(
        "small <b>&", "compress", {"keep": 0.5, "layers": []}, {"torch": "2"}, Quality("perplexity", 4.0, 5.0)
    )
    found = Reader(text := page(model, report(model), story))
    assert {name for name, _ in found.tags} & {"script", "iframe", "object", "form"} == set()
    links = [value for _, attributes in found.tags for key in ("src", "href") if (value := attributes.get(key))]
    assert all(link.startswith("data:") for link in links)
    assert "url(" not in text
    assert "@import" not in text
    assert "small &lt;b&gt;&amp;" in text
    assert "4 before, +25.0 %" in text
    assert all(attributes.get("alt") for attributes in found.named("img"))
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = [name for one in found.named("svg") for name in (one.get("aria-labelledby") or "").split()]
    assert set(labels) == set(ids)
    assert all({"aria-labelledby", "aria-label", "aria-hidden"} & set(one) for one in found.named("svg"))
    assert len(found.named("svg")) > 6


def test_the_page_has_the_figures_of_the_report() -> None:
    model = network(3)
    found = report(model)
    text = page(model, found, Story("small"))
    for row in found.rows:
        assert f"{row.name}: {row.format}, keep {row.parameters / row.dense_parameters:.3f}" in text or (
            row.format == "dense"
        )
    saved = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert stored_bytes(model) == saved
    assert f'<div class="big">{short(found.parameters)}</div>' in text
    assert f'<div class="big">{bytes_text(saved)}</div>' in text
    dense = nn.Sequential(*[nn.Linear(16, 16) for _ in range(12)])
    assert f"{bytes_text(stored_bytes(dense))} dense" in text
    assert "Errors by depth" not in text
    assert "Recipe" not in text


def test_errors_are_marks_with_their_values() -> None:
    model = network(2)
    found = report(model)
    rows = tuple(Row(**{**vars(row), "error": 0.25, "output_error": 0.125}) for row in found.rows)
    text = page(model, type(found)(**{**vars(found), "rows": rows}), Story("small"))
    assert text.count("weight 0.250</title>") == text.count("output 0.125</title>") == len(rows)
    assert "median error of the output 0.125" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False, dtype=dtype), nn.Linear(8, 8, bias=False, dtype=dtype))
    model[1].weight = model[0].weight
    assert stored_bytes(model) == 64 * dtype.itemsize


def test_a_dense_network_has_a_page_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    text = page(model, report(model), Story("plain"))
    Reader(text)
    assert "What each layer keeps" not in text
    assert "What the structure looks like" not in text


def test_a_network_of_210_layers_makes_a_page_below_three_megabytes() -> None:
    model = nn.Sequential(
        *[nn.ModuleDict({name: nn.Linear(128, 128) for name in "abcdefg"}) for _ in range(30)]
    )  # fmt: skip
    rules = {r".*\.[a-d]": Rule(Blast, keep=0.5, blocks=16), r".*\.[e-g]": Rule(GaudiGblr, keep=0.5)}
    apply_plan_(model, make_plan(model, rules), generator=torch.Generator().manual_seed(0))
    found = report(model)
    assert len(found.rows) == 210
    assert len(page(model, found, Story("large")).encode()) < 3e6


def test_a_missing_jinja2_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pages need jinja2: pip install 'structmat\[report\]'"):
        page(nn.Linear(2, 2), report(nn.Linear(2, 2)), Story("small"))


def decoded(address: str) -> Any:
    """The pixels of an image, read by another library: ``(H, W, 4)`` from 0 to 1."""
    return image.imread(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,"))), format="png")


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_images_hold_the_values(height: int, width: int, seed: int) -> None:
    values = torch.rand(height, width, generator=torch.Generator().manual_seed(seed))
    pixels = torch.from_numpy(decoded(maps.image_of(values, 1.0)).copy())
    assert pixels.shape == (height, width, 4)
    torch.testing.assert_close(pixels[..., 3], values, rtol=0, atol=0.51 / maps.LEVELS)
    signed = torch.from_numpy(decoded(maps.signed_image_of(2 * values - 1, 1.0)).copy())
    sign = torch.where(signed[..., 2] > signed[..., 0], 1.0, -1.0)
    torch.testing.assert_close(sign * signed[..., 3], 2 * values - 1, rtol=0, atol=0.52 / (maps.LEVELS // 2))


def test_kinds_and_depths() -> None:
    names = ["h.0.up", "h.10.up", "h.2.up", "head", "tail"]
    assert kinds(names, {}, 8) == {"up": ["h.0.up", "h.2.up", "h.10.up"], "head": ["head"], "tail": ["tail"]}
    costs = {"h.0.up": 5.0, "h.10.up": 0.0, "h.2.up": 0.0, "head": 1.0, "tail": 1.0}
    assert kinds(names, costs, 2) == {"up": ["h.0.up", "h.2.up", "h.10.up"], "others": ["head", "tail"]}
    assert depths(["h.0.up", "h.2.up", "h.10.up"]) == [0, 2, 10]
    assert depths(["h.0.experts.0", "h.0.experts.1", "h.1.experts.0"]) == [0, 1, 2]


def test_bars_are_as_high_as_what_is_kept() -> None:
    rows = [Row(f"h.{k}.up", "blast", "", (8, 8), kept, 64, kept, 64) for k, kept in enumerate([64, 32, 16])]
    panel = keep_panel("up", rows, "", {"blast": "f0"})
    assert [mark.height / (BOTTOM - TOP) for mark in panel.marks] == [1.0, 0.5, 0.25]
    assert all(mark.y + mark.height == BOTTOM for mark in panel.marks)
    assert [text for _, text in panel.x_ticks] == ["0", "1", "2"]
    assert "from 0.25 to 1.00" in panel.description


def test_numbers_are_short() -> None:
    assert [short(value) for value in (12, 1500, 2_641_344, 7e9)] == ["12", "1.5 k", "2.64 M", "7 B"]
    assert [bytes_text(value) for value in (12, 1500, 10_579_539, 7e9)] == ["12 B", "1.5 kB", "10.6 MB", "7 GB"]
    assert [rounded_up(values) for values in ([0.07], [0.55, 0.1], [3.0], [])] == [0.1, 0.6, 3.0, 1.0]
    assert re.fullmatch(r"-50.0 %", Quality("accuracy", 1.0, 0.5).change)
    assert Quality("output error", 0.0, 0.5).change == ""
