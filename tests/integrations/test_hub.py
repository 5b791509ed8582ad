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
    with pytest.raises(ValueError, match=r"to name a class of (transformers|diffusers) under .*, got .* auto_class"):
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


@pytest.mark.parametrize(
    "named",
    [["pipeline"], ["AutoTokenizer"], ["LlamaConfig"], ["AutoModelForCausalLM", "x"], [""], ["modeling_utils"], None],
)
def test_nothing_but_a_model_is_loaded(named: Any, tmp_path: Path) -> None:
    compressed(build("LlamaForCausalLM")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": named}))
    if named and named[0] == "AutoModelForCausalLM":
        assert type(load_pretrained(tmp_path)) is LlamaForCausalLM
        return
    with pytest.raises(
        ValueError, match=f"the configuration of '{tmp_path}' to name a class of transformers under 'arch"
    ):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one of models, got 'AutoTokenizer'"):
        load_pretrained(tmp_path, auto_class="AutoTokenizer")


@pytest.mark.parametrize("architectures", [5, {"a": 1}, "LlamaForCausalLM", [5], [["LlamaForCausalLM"]]])
def test_architectures_of_another_kind_are_refused(architectures: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures}))
    with pytest.raises(
        ValueError, match=rf"'{tmp_path}/config\.json': expected .*'architectures' of the configuration"
    ):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 5}, "'layers' of the quantization_config to be an object, got 5"),
        ({"ties": {"a": 5}}, "'a' of 'ties' of the quantization_config to be text, got 5"),
        (
            {"ties": {"a": "nowhere"}},
            r"expected 'ties' of the quantization_config to name its layers, got \['nowhere'\]",
        ),
        ({"digests": []}, "have|"),
        ({"schema": "1"}, "'schema' of the JSON of a plan to be an integer, got '1'"),
        ({"quant_method": None}, "expected 'quant_method' in 'quantization_config'|quantiz"),
        ({"self": 1, "layers": {"a": {"self": 2, "format": "low_rank", "M": 2, "N": 2}}}, "do not fit"),
    ],
)
def test_a_record_of_another_kind_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    compressed(build("LlamaForCausalLM")).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if "digests" in change:  # empty ones are none
        load_pretrained(tmp_path)
        return
    with pytest.raises(ValueError, match=message) as raised:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value)
