"""What can go wrong with a structured checkpoint of transformers is an error that says what, never random weights."""

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from networks import build, compressed, output_of, same_state
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from structmat import Blast, LowRank, StructuredLinear, apply_plan_, plan_of
from structmat.integrations.transformers import quantizer as integration
from structmat.integrations.transformers.quantizer import StructmatConfig, StructmatQuantizer

TESTS = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved Llama with some structured layers."""
    compressed(build("LlamaForCausalLM")).save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder: Path, change: Any) -> None:
    """Change the configuration of a checkpoint, as of a version that wrote no digests."""
    config = json.loads((folder / "config.json").read_text())
    config.get("quantization_config", {}).pop("digests", None)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Any) -> None:
    """Change the tensors of a checkpoint, as of a version that wrote no digests."""
    edit_config(folder, lambda config: None)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# Files


@pytest.mark.parametrize("own", ["left", "right", "diag"])
@pytest.mark.parametrize("change", ["delete", "rename"])
@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
def test_a_missing_or_misnamed_factor_is_named(kind: Any, change: str, own: str, folder: Path) -> None:
    key = f"model.layers.1.self_attn.o_proj.{own}"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors.pop(key)
        if change == "rename":
            tensors[f"{key}s"] = tensor

    edit_weights(folder, edit)
    with pytest.raises(ValueError, match=rf"has none for \['(model\.)?layers\.1\.self_attn\.o_proj\.{own}'\]"):
        kind.from_pretrained(folder)


def test_a_missing_bias_of_a_structured_layer_is_named(tmp_path: Path) -> None:
    compressed(build("BertForMaskedLM")).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.pop("bert.encoder.layer.0.attention.self.query.bias"))
    with pytest.raises(ValueError, match=r"has none for \['bert.encoder.layer.0.attention.self.query.bias'\]"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_a_factor_of_another_shape_is_refused(folder: Path) -> None:
    key = "model.layers.1.self_attn.o_proj.left"
    edit_weights(folder, lambda tensors: tensors.update({key: tensors[key][:, :1].clone()}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_layer_that_the_model_has_not_is_named(folder: Path) -> None:
    def rename(config: dict[str, Any]) -> None:
        layers = config["quantization_config"]["layers"]
        layers["model.layers.7.self_attn.o_proj"] = layers.pop("model.layers.1.self_attn.o_proj")

    edit_config(folder, rename)
    for kind in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match=r"expected the layers \['model.layers.7.self_attn.o_proj'\]"):
            kind.from_pretrained(folder)


def test_layers_of_a_bare_model_are_all_looked_for(folder: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(folder / "bare")
    edit_config(folder / "bare", lambda c: c["quantization_config"]["layers"].update({"layers.0.q": {}}))
    with pytest.raises(ValueError, match="the format's name"):
        AutoModelForCausalLM.from_pretrained(folder / "bare")
    format = LowRank(32, 32, 2).to_json()
    edit_config(folder / "bare", lambda c: c["quantization_config"]["layers"].update({"layers.0.q": format}))
    with pytest.raises(ValueError, match=r"expected the layers \['layers.0.q'\].*load it into LlamaModel"):
        AutoModelForCausalLM.from_pretrained(folder / "bare")


def test_a_newer_schema_is_refused(folder: Path) -> None:
    edit_config(folder, lambda config: config["quantization_config"].update(schema=99))
    with pytest.raises(ValueError, match="expected a plan of schema 1, got 99; update structmat"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_dense_checkpoint_cannot_be_structured_on_the_fly(tmp_path: Path) -> None:
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pre-quantized"):
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=StructmatConfig())


# Without the library

LOAD = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import torchvision_ops
torchvision_ops.declare()
class Blocked:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "structmat":
            raise ImportError("structmat is not installed")
if sys.argv[1] == "blocked":
    sys.meta_path.insert(0, Blocked())
if sys.argv[1] == "before":
    import structmat
import torch
from transformers import AutoModelForCausalLM
if sys.argv[1] == "after":
    AutoModelForCausalLM.from_config  # the lazy import of transformers happens here
    import transformers.modeling_utils, structmat
model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
with torch.no_grad():
    torch.save(model(torch.arange(9)[None])[0], sys.argv[2] + "/output.pt")
"""


def in_a_new_process(how: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, how, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_without_the_library_loading_is_an_error(folder: Path) -> None:
    finished = in_a_new_process("blocked", folder)
    assert finished.returncode != 0
    assert "Unknown quantization type, got structmat" in finished.stderr
    assert "q_proj.weight" in finished.stderr
    assert "RuntimeError: You set `ignore_mismatched_sizes` to `False`" in finished.stderr
    assert not (folder / "output.pt").exists()


@pytest.mark.parametrize("how", ["before", "after"])
def test_importing_the_library_is_enough(how: str, folder: Path) -> None:
    finished = in_a_new_process(how, folder)
    assert finished.returncode == 0, finished.stderr
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(folder / "output.pt"), model(torch.arange(9)[None])[0])


# What is saved


@pytest.mark.parametrize("how", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_the_state_dict_that_was_asked_for_is_saved(how: Callable[[Any], Any], folder: Path) -> None:
    model = how(LlamaForCausalLM.from_pretrained(folder))
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder / "more", state_dict=state)
    loaded = LlamaForCausalLM.from_pretrained(folder / "more")
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def test_the_state_dict_of_the_model_has_no_dense_weights(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    structured = {name for name, module in model.named_modules() if isinstance(module, StructuredLinear)}
    assert not {f"{name}.weight" for name in structured} & set(model.state_dict())
    stored = load_file(folder / "model.safetensors")
    assert all(stored[f"{name}.weight"].shape == (1,) for name in structured)


def test_offloaded_layers(folder: Path) -> None:
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"]
    device_map = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    loaded = LlamaForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=folder / "offload")
    whole = LlamaForCausalLM.from_pretrained(folder)
    inputs = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(inputs)[0], whole(inputs)[0])


# Other quantization


def test_a_model_that_is_quantized_otherwise_says_so() -> None:
    model = build("LlamaForCausalLM")
    model.config.quantization_config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.warns(
        UserWarning, match="has the quantization_config BitsAndBytesConfig, and a model can have but one"
    ):
        apply_plan_(model, {"model.layers.0.mlp.up_proj": LowRank(48, 32, 4)})
    assert not hasattr(model, "hf_quantizer")
    integration.write_down(build("LlamaForCausalLM"))


def test_every_model_in_a_network_is_written_down() -> None:
    both = torch.nn.ModuleDict({"a": build("LlamaForCausalLM"), "b": build("BertForMaskedLM")})
    apply_plan_(both, {"a.model.layers.0.mlp.up_proj": LowRank(48, 32, 4)})
    config: Any = both["a"].config
    assert list(config.quantization_config.layers) == ["model.layers.0.mlp.up_proj"]
    assert isinstance(both["a"].hf_quantizer, StructmatQuantizer)
    assert not hasattr(both["b"].config, "quantization_config")


def test_the_configuration_reads_what_it_writes() -> None:
    config = StructmatConfig({"a": Blast(8, 8, (2, 2), 2).to_json()}, {"b": "a"})
    again: Any = StructmatConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    assert again.plan()["a"] == Blast(8, 8, (2, 2), 2)


def test_a_copy_of_a_model_saves_its_own_structure(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    plan = plan_of(model)
    assert torch.equal(output_of(model), output_of(LlamaForCausalLM.from_pretrained(folder)))
    model.save_pretrained(folder / "again", safe_serialization=True)
    assert plan_of(LlamaForCausalLM.from_pretrained(folder / "again")) == plan
    assert same_state(LlamaForCausalLM.from_pretrained(folder / "again"), model)
