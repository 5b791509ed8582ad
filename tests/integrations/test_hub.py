"""Loading in one line."""

import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DiTTransformer2DModel
from huggingface_hub.errors import EntryNotFoundError
from networks import build, compressed, same_state
from transformers import AutoModel, BertForMaskedLM, LlamaForCausalLM, LlamaModel

from structmat import LowRank, apply_plan_, load_pretrained
from structmat.integrations import doors


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_a_transformers_model(name: str, tmp_path: Path) -> None:
    model = compressed(build(name))
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(tmp_path)
    assert type(loaded) in (LlamaForCausalLM, BertForMaskedLM)
    assert same_state(loaded, model)


@pytest.mark.parametrize("auto_class", ["AutoModel", AutoModel])
def test_another_class(auto_class: Any, tmp_path: Path) -> None:
    compressed(build("LlamaForCausalLM")).save_pretrained(tmp_path / "sub")
    loaded = load_pretrained(str(tmp_path), auto_class=auto_class, dtype=torch.bfloat16, subfolder="sub")
    assert type(loaded) is LlamaModel
    assert loaded.dtype == torch.bfloat16


def test_a_diffusers_model(tmp_path: Path) -> None:
    model = DiTTransformer2DModel(2, 8, num_layers=1, sample_size=8)
    apply_plan_(model, {"transformer_blocks.0.attn1.to_q": LowRank(16, 16, 4)})
    model.save_pretrained(tmp_path)
    assert same_state(load_pretrained(tmp_path), model)


def test_a_repository_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compressed(build("LlamaForCausalLM")).save_pretrained(tmp_path)
    asked: list[Any] = []

    def download(name: str, file: str, **options: Any) -> str:
        asked.append((name, file, options))
        if not (tmp_path / file).exists():
            raise EntryNotFoundError(f"no {file}")
        return str(tmp_path / file)

    def from_pretrained(name: str, **options: Any) -> str:
        asked.append((name, options))
        return "loaded"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", from_pretrained)
    assert load_pretrained("somebody/some-model", revision="r", device_map="cpu") == "loaded"
    assert asked == [
        ("somebody/some-model", "model_index.json", {"revision": "r"}),
        ("somebody/some-model", "config.json", {"revision": "r"}),
        ("somebody/some-model", {"revision": "r", "device_map": "cpu"}),
    ]


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a folder or hub repository with config.json or model_index"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("config", [{}, {"architectures": ["NoSuchModel"]}, {"_class_name": "NoSuchModel"}])
def test_a_class_that_the_framework_has_not(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"to name a class of (transformers|diffusers), got .*; pass auto_class"):
        load_pretrained(tmp_path)


def test_a_framework_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "transformers")
    with pytest.raises(ImportError, match=r"expected transformers to be installed; run: pip install 'structmat\[trans"):
        load_pretrained(tmp_path)


def test_a_framework_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(doors, "version", lambda name: "4.57.6")
    with pytest.raises(
        ImportError, match=r"expected transformers 5\.17 or newer, got 4\.57\.6; run: pip install --upg"
    ):
        load_pretrained(tmp_path)
