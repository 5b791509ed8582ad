"""The model card that every command writes beside a model."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open

from structmat import load_pretrained, plan_of
from structmat.cli import main
from structmat.cli.card import CARD, MARKER, base_card, card_text
from structmat.cli.compress import FitOptions
from structmat.cli.models import Placement
from structmat.cli.options import Options, command_line
from structmat.cli.selection import PlanOrFile
from structmat.formats import Blast, BlockSparse, LowRank, Quantized
from training import tiny

BASE = """---
license: other
license_name: tiny
license_link: https://example.org/licence
language: en
---
A card of a user.
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama under ``dense`` with a card, texts, and the Llama compressed with data under ``small``."""
    path = tmp_path_factory.mktemp("card")
    tiny.llama().save_pretrained(path / "dense")
    tiny.tokenizer().save_pretrained(path / "dense")
    (path / "dense" / CARD).write_text(BASE, encoding="utf-8")
    (path / "texts.txt").write_text("<|endoftext|>".join(tiny.sentences(40)), encoding="utf-8")
    words = ["--blocks", "2", "--keep", "0.6", "--rule", ".*attn.*=low_rank"]
    words += ["--layers", ".*(q|up)_proj", "--calibrate", str(path / "texts.txt"), "--uniform"]
    assert main(["compress", str(path / "dense"), "-o", str(path / "small"), *words]) == 0
    return path


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """The metadata and the text of a card, as the Hub's library reads them."""
    card = ModelCard.load(folder / CARD)
    return card.data.to_dict(), card.text


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "structmat.json").read_text())


def table(text: str, section: str) -> list[list[str]]:
    """The rows of the table of a section, without its head."""
    found = re.search(rf"^## {section}\n\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()[2:]]


def test_the_card_of_a_compressed_model(folder: Path) -> None:
    small = folder / "small"
    data, text = read(small)
    record, model = record_of(small), load_pretrained(small)
    assert {name: data.get(name) for name in ("library_name", "pipeline_tag", "base_model")} == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "base_model": None,
    }  # fmt: skip
    assert data["tags"] == ["structmat", "blast", "low-rank"]
    assert (data["license"], data["license_name"]) == ("other", "tiny")
    assert data["license_link"] == "https://example.org/licence"
    assert "language" not in data
    (index,) = data["model-index"]
    (result,) = index["results"]
    assert result["task"] == {"type": "text-generation"}
    assert result["metrics"] == [
        {"type": "perplexity", "name": "perplexity", "value": pytest.approx(record["measured_after"])}
    ]
    assert result["dataset"] == {"name": "rows of texts.txt that were held out", "type": "texts.txt"}
    rows = {row[0]: row[1:] for row in table(text, "Layers")}
    made = plan_of(model)
    up = [name for name in made if name.endswith("up_proj")]
    name = "`model.layers.{0-1}.mlp.up_proj`"
    assert rows[name][:2] == ["2", "BLAST, 2 x 2 blocks"]
    assert rows[name][2] == f"{made[up[0]].keep:.2f}"
    mean = (sum(record["layers"][one]["output_error"] ** 2 for one in up) / 2) ** 0.5
    assert rows[name][3] == f"{mean:.3f}"
    assert sum(int(row[0]) for row in rows.values()) == len(made) == 10
    sizes = {row[0]: row[1:] for row in table(text, "Size")}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dense = sum(parameter.numel() for parameter in load_pretrained(folder / "dense").parameters())
    assert sizes["parameters"] == [f"{dense:,}", f"{parameters:,}", f"{parameters / dense:.3f}"]
    stored = (small / "model.safetensors").stat().st_size
    assert sizes["weights, dense in float32"] == [
        f"{4 * dense / 1e6:.1f} MB", f"{stored / 1e6:.1f} MB", f"{stored / 4 / dense:.3f}",
    ]  # fmt: skip
    before, after = record["measured_before"], record["measured_after"]
    assert table(text, "Quality") == [["perplexity", f"{before:.4g}", f"{after:.4g}"]]
    assert (
        "structmat compress dense -o OUT --keep 0.6 --blocks 2 --layers '.*(q|up)_proj' --rule '.*attn.*=low_rank' "
        "--uniform --calibrate texts.txt\n"
    ) in text
    assert str(folder) not in (small / CARD).read_text()


def test_the_code_in_the_card_loads_the_model(folder: Path) -> None:
    code = re.search(r"```python\n(.*?)```", read(folder / "small")[1], re.DOTALL)
    assert code is not None
    found: dict[str, Any] = {}
    exec(code[1].replace("REPO", str(folder / "small")), found)
    assert len(plan_of(found["model"])) == 10
    assert found["tokenizer"]("w5 w12")["input_ids"][-2:] == tiny.tokenizer()("w5 w12")["input_ids"][-2:]
    assert main(["verify", str(folder / "small")]) == 0  # a card beside the tensors changes nothing


def test_the_cards_of_what_is_made_of_it(folder: Path, tmp_path: Path) -> None:
    assert main(["quantize", str(folder / "small"), "-o", str(tmp_path / "integers")]) == 0
    assert main(["densify", str(folder / "small"), "-o", str(tmp_path / "plain")]) == 0
    words = ["--data", str(folder / "texts.txt"), "--steps", "2", "--device", "cpu", "--length", "16"]
    assert main(["retrain", str(folder / "small"), "-o", str(tmp_path / "better"), *words]) == 0
    first = record_of(folder / "small")["commands"]
    for name in ("integers", "plain", "better"):
        data, text = read(tmp_path / name)
        assert data["license"] == "other"  # from card to card
        assert record_of(tmp_path / name)["commands"][:1] == first
        assert "\n".join(record_of(tmp_path / name)["commands"]) in text
        assert text.lstrip().startswith("# dense, ")  # the model that all came from
    _, text = read(tmp_path / "integers")
    errors = record_of(tmp_path / "integers")["layers"]
    row = next(row for row in table(text, "Layers") if "mlp.up_proj" in row[0])
    changes = [error for name, error in errors.items() if name.endswith("up_proj")]
    assert row[2] == "BLAST, 2 x 2 blocks in int8"
    assert row[-1] == f"{(sum(one**2 for one in changes) / 2) ** 0.5:.1e}"
    assert "stored in int8" in text
    data, text = read(tmp_path / "plain")
    assert data["tags"] == ["structmat"]
    assert "import structmat" not in text
    assert "## Layers" not in text
    assert table(text, "Size")[0][3] == "1.000"
    data, text = read(tmp_path / "better")
    figures = record_of(tmp_path / "better")["figures"]
    rows = {row[0]: row[1:] for row in table(text, "Quality")}
    metrics = data["model-index"][0]["results"][0]["metrics"][0]
    name = "perplexity" if "eval_perplexity" in figures else "loss"
    assert (metrics["type"], metrics["value"]) == (name, pytest.approx(figures[f"eval_{name}"], abs=1e-6))
    assert rows[name] == [f"{figures[f'eval_{name}_before']:.4g}", f"{figures[f'eval_{name}']:.4g}"]
    assert "structmat retrain small -o OUT --data texts.txt --length 16 --steps 2 --device cpu" in text


def test_a_card_by_hand_stays(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    shutil.copytree(folder / "small", out)
    words = ["compress", str(folder / "dense"), "-o", str(out), "--format", "low_rank", "--overwrite"]
    (out / CARD).write_text("# Mine\n")
    assert main(words) == 0
    assert (out / CARD).read_text() == "# Mine\n"
    (out / CARD).write_text(f"# Not mine\n{MARKER}\n")
    assert main([*words, "--keep", "0.6"]) == 0
    assert "without data" in read(out)[1]
    before = (out / CARD).read_bytes()
    assert main([*words, "--keep", "0.6"]) == 0
    assert (out / CARD).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"small"}


def test_the_base_on_the_hub(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert base_card(str(folder / "dense")) == (ModelCard(BASE).data.to_dict(), None)
    (tmp_path / CARD).write_text(f"---\nbase_model: org/dense\nlicense: mit\n---\n{MARKER}\n")
    assert base_card(str(tmp_path)) == ({"base_model": "org/dense", "license": "mit"}, "org/dense")
    (tmp_path / CARD).write_text("---\nbase_model: org/other\n---\nA card by hand names what it likes.\n")
    assert base_card(str(tmp_path))[1] is None
    for text in ("---\nlicense: [mit\n---\n", "---\n- mit\n---\n"):
        (tmp_path / CARD).write_text(text)
        capsys.readouterr()
        assert base_card(str(tmp_path)) == ({}, None)
        assert "warning: the new card names no licence, since that of" in capsys.readouterr().err
    (tmp_path / CARD).write_text("No metadata.\n")
    assert base_card(str(tmp_path)) == ({}, None)
    assert capsys.readouterr().err == ""


def test_what_learns_has_no_count_yet(folder: Path, tmp_path: Path) -> None:
    words = ["--format", "gaudi_gblr", "--keep", "0.5", "--layers", ".*up_proj", "--learn"]
    assert main(["compress", str(folder / "dense"), "-o", str(tmp_path / "learning"), *words]) == 0
    _, text = read(tmp_path / "learning")
    assert [row[3] for row in table(text, "Layers")] == [""]
    assert table(text, "Size")[0][0] == "parameters"
    record = record_of(tmp_path / "learning")
    without = {name: value for name, value in record.items() if name != "parameters"}
    rows = table(card_text(tmp_path / "learning", without), "Size")
    with safe_open(tmp_path / "learning" / "model.safetensors", "pt") as file:
        assert len(file.keys()) > 0
    assert [row[0] for row in rows] == ["weights"]
    assert main(["harden", str(tmp_path / "learning"), "-o", str(tmp_path / "hard")]) == 0
    assert table(read(tmp_path / "hard")[1], "Size")[0][0] == "parameters"


def test_the_kind_of_a_format() -> None:
    blast = Blast(64, 32, (4, 2), 3)
    assert blast.kind == Blast(16, 8, (4, 2), 1).kind == "BLAST, 4 x 2 blocks"
    assert LowRank(8, 8, 2).kind == "low-rank"
    assert Quantized(64, 32, blast, 4, 32).kind == "BLAST, 4 x 2 blocks in int4"
    sparse = BlockSparse.for_budget(64, 64, keep=0.5, blocks=4)
    assert sparse.kind.startswith("block-sparse, 4 x 4 blocks")


def test_the_command_line_is_spelled() -> None:
    plan = PlanOrFile(keep=0.7, blocks="4", rules=(".*a=b", "c=d"), skip_misfits=True)
    fit = FitOptions(two_sided=False, quantize="int8")
    assert command_line("compress", "org/model", plan, fit, Placement(device="cpu")) == (
        "structmat compress org/model -o OUT --keep 0.7 --blocks 4 --rule '.*a=b' --rule c=d --skip-misfits "
        "--one-sided --quantize int8 --device cpu"
    )
    assert command_line("densify", Path("/models/small"), Options()) == "structmat densify small -o OUT"
    path = PlanOrFile(plan=Path("/plans/plan.json"))
    assert command_line("compress", "~/m", path) == "structmat compress m -o OUT --plan plan.json"
