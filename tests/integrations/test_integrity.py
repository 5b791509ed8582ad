"""Integrity of Hugging Face checkpoints: what changed after saving is named, and what is saved anew is fresh."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build, compressed, output_of, same_state
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from structmat import LowRank, densify_, load_pretrained
from structmat.integrations.integrity import Verified, verify
from structmat.integrations.transformers import compress_checkpoint

LAYER = "model.layers.1.self_attn.o_proj"


@pytest.fixture(params=["whole", "sharded"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A saved Llama with some structured layers, in one file or several."""
    compressed(build("LlamaForCausalLM")).save_pretrained(
        tmp_path / "m", max_shard_size="15KB" if request.param == "sharded" else "5GB"
    )
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (request.param == "sharded")
    return tmp_path / "m"


def tensors_of(folder: Path) -> dict[str, tuple[Path, Tensor]]:
    return {n: (file, t.clone()) for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def write(folder: Path, changes: dict[str, Tensor]) -> None:
    """Write other tensors into the files of a checkpoint, as any program does."""
    places = tensors_of(folder)
    for file in {places[name][0] for name in changes}:
        save_file(
            {**load_file(file), **{n: t for n, t in changes.items() if places[n][0] == file}}, file, {"format": "pt"}
        )


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def flip(folder: Path, name: str) -> None:
    tensor = tensors_of(folder)[name][1]
    tensor.view(torch.uint8).view(-1)[5] ^= 4
    write(folder, {name: tensor})


@pytest.mark.parametrize("name", [f"{LAYER}.left", "model.embed_tokens.weight", "model.norm.weight"])
def test_a_flipped_bit_is_named(name: str, folder: Path) -> None:
    assert verify(folder) == Verified(len(tensors_of(folder)), True, ())
    flip(folder, name)
    for load in (AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained, load_pretrained):
        with pytest.raises(
            ValueError, match=f"expected '{folder}' as it was saved, but '{name}' has other values: res"
        ):
            load(folder)
    assert verify(folder).problems == (f"{name!r} has other values",)


def test_swapped_tensors_are_named(folder: Path) -> None:
    names = [f"model.layers.{k}.self_attn.q_proj.left" for k in range(2)]
    tensors = tensors_of(folder)
    write(folder, {names[0]: tensors[names[1]][1], names[1]: tensors[names[0]][1]})
    with pytest.raises(
        ValueError, match=f"'{names[0]}' has other values, those of '{names[1]}'; '{names[1]}' has other"
    ):
        LlamaForCausalLM.from_pretrained(folder)


def test_another_record_is_noticed(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["layers"]["model.layers.0.mlp.up_proj"]["permute_output"] = True
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"'{folder}' as it was saved, but the record of formats and names differs"):
        LlamaForCausalLM.from_pretrained(folder)


def test_the_check_can_be_switched_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(folder, f"{LAYER}.left")
    monkeypatch.setenv("STRUCTMAT_VERIFY", "0")
    loaded = LlamaForCausalLM.from_pretrained(folder)
    assert torch.equal(loaded.get_submodule(LAYER).left, tensors_of(folder)[f"{LAYER}.left"][1])
    monkeypatch.delenv("STRUCTMAT_VERIFY")
    loaded.save_pretrained(folder)  # the new state is what was saved
    assert same_state(LlamaForCausalLM.from_pretrained(folder), loaded)


def test_an_old_checkpoint_has_no_digests(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["digests"]
    (folder / "config.json").write_text(json.dumps(config))
    flip(folder, f"{LAYER}.left")
    LlamaForCausalLM.from_pretrained(folder)
    assert verify(folder) == Verified(len(tensors_of(folder)), False, ())


def test_what_is_trained_and_saved_again_has_fresh_digests(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.config.quantization_config.digests == {}  # in memory the tensors may change
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    before = record(folder)["digests"]
    model.save_pretrained(folder)
    assert record(folder)["digests"]["tensors"].keys() == before["tensors"].keys()
    assert record(folder)["digests"] != before
    loaded = load_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight.bfloat16())
    loaded.save_pretrained(folder / "half")
    assert same_state(LlamaForCausalLM.from_pretrained(folder / "half"), loaded)
    assert verify(folder / "half").problems == ()


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "BertForMaskedLM", "ViTForImageClassification", "MixtralForCausalLM"]
)
def test_digests_are_those_of_the_files_under_their_names(name: str, tmp_path: Path) -> None:
    model = compressed(build(name))
    model.save_pretrained(tmp_path)
    assert record(tmp_path)["digests"]["tensors"].keys() == tensors_of(tmp_path).keys()
    assert verify(tmp_path) == Verified(len(tensors_of(tmp_path)), True, ())
    assert torch.equal(output_of(load_pretrained(tmp_path)), output_of(model))


def test_files_of_another_program_do_not_count(tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    tmp_path.joinpath("m").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "m" / "adapter_model.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "m" / "other.safetensors")
    model.save_pretrained(tmp_path / "m")
    assert "a" not in record(tmp_path / "m")["digests"]["tensors"]
    LlamaForCausalLM.from_pretrained(tmp_path / "m")
    assert verify(tmp_path / "m").problems == ("'a' was not saved with the others",)


def test_a_variant_is_not_compared_with_the_digests_of_the_other(tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    model.save_pretrained(tmp_path)
    digests = record(tmp_path)["digests"]
    config = (tmp_path / "config.json").read_text()
    model.bfloat16().save_pretrained(tmp_path, variant="bf16")
    assert record(tmp_path)["digests"] != digests
    LlamaForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(config)
    assert same_state(LlamaForCausalLM.from_pretrained(tmp_path, variant="bf16", dtype=torch.bfloat16), model)


def test_a_dense_model_has_no_digests_any_more(folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    densify_(model)
    model.save_pretrained(folder / "dense")
    assert "quantization_config" not in json.loads((folder / "dense" / "config.json").read_text())
    assert verify(folder / "dense") == Verified(len(tensors_of(folder / "dense")), False, ())


def test_streaming_writes_digests(tmp_path: Path) -> None:
    build("LlamaForCausalLM", num_hidden_layers=3).save_pretrained(tmp_path / "dense")
    compress_checkpoint(tmp_path / "dense", tmp_path / "m", {LAYER: LowRank(32, 32, 4)}, progress=False)
    assert verify(tmp_path / "m") == Verified(len(tensors_of(tmp_path / "m")), True, ())
    LlamaForCausalLM.from_pretrained(tmp_path / "m")
    flip(tmp_path / "m", f"{LAYER}.left")
    with pytest.raises(ValueError, match=f"'{LAYER}.left' has other values"):
        LlamaForCausalLM.from_pretrained(tmp_path / "m")


def test_factors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = compressed(build("LlamaForCausalLM"))
    model.get_submodule(LAYER).left.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=f"'{tmp_path}': expected finite factors in layer '{LAYER}', got NaN or infinity"
    ):
        LlamaForCausalLM.from_pretrained(tmp_path)
    assert verify(tmp_path).problems == (f"'{LAYER}.left' has NaN or infinite values",)


def test_an_index_without_its_files_is_noticed(tmp_path: Path) -> None:
    compressed(build("LlamaForCausalLM")).save_pretrained(tmp_path, max_shard_size="15KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[0]
    names = list(load_file(gone))
    gone.unlink()
    problems = verify(tmp_path).problems
    assert all(any(f"{name!r} is missing" in problem for problem in problems) for name in names)
    assert any(f"is not in '{gone.name}', where 'model.safetensors.index.json' has it" in one for one in problems)
