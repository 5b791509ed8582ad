"""Compression from file to file: the same as in memory, with one block in memory at a time."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build, same_state
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from structmat import Blast, Dense, LowRank, Refinement, Rule, compress_, make_plan
from structmat.integrations.transformers.streaming import compress_checkpoint, partial_folder, skeleton
from support.changes import Killed, stopped

RULES = {r".*\.(q|o)_proj": Rule(Blast, blocks=4), r".*\.mlp\..*": LowRank}


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    return [
        {"input_ids": torch.randint(1, 60, (3, 9), generator=generator), "attention_mask": mask} for _ in range(count)
    ]


def source(folder: Path, name: str = "LlamaForCausalLM", **options: Any) -> Path:
    build(name, num_hidden_layers=3, **options).save_pretrained(folder / "dense", max_shard_size="15KB")
    return folder / "dense"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LlamaForCausalLM", {}),
        ("LlamaForCausalLM", {"tie_word_embeddings": True, "dtype": "bfloat16"}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("MistralForCausalLM", {"sliding_window": 4}),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"batches": batches(), "refine": Refinement(steps=3)}])
def test_it_is_bit_for_bit_what_compress_gives(
    tmp_path: Path, name: str, options: dict[str, Any], settings: dict[str, Any]
) -> None:
    folder = source(tmp_path, name, **options)
    plan = make_plan(skeleton(folder), RULES, keep=0.6)
    streamed = compress_checkpoint(folder, tmp_path / "out", plan, progress=False, **settings)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    fits = compress_(expected, plan, progress=False, **settings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_state(loaded, expected)
    assert {name: fit.error for name, fit in streamed.items()} == {name: fit.error for name, fit in fits.items()}
    assert all(factor.is_meta for fit in streamed.values() for factor in fit.factors.values())
    assert not (tmp_path / "out.partial").exists()


def test_one_file_for_each_block_and_one_for_the_rest(tmp_path: Path) -> None:
    folder = source(tmp_path)
    plan = make_plan(skeleton(folder), RULES, keep=0.6)
    compress_checkpoint(folder, tmp_path / "out", plan, progress=False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) == 4
    for file in files:
        assert set(load_file(tmp_path / "out" / file)) == {n for n, at in index["weight_map"].items() if at == file}


def test_layers_planned_as_dense_stay(tmp_path: Path) -> None:
    folder = source(tmp_path)
    plan = make_plan(skeleton(folder), {r".*\.q_proj": LowRank, r".*\.k_proj": Dense}, keep=0.6)
    compress_checkpoint(folder, tmp_path / "out", plan, progress=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(folder)
    name = "model.layers.1.self_attn.k_proj"
    assert torch.equal(loaded.get_submodule(name).weight, dense.get_submodule(name).weight)


def test_a_second_run_takes_finished_fits_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = source(tmp_path)
    plan = make_plan(skeleton(folder), RULES, keep=0.6)
    settings = {"batches": batches(), "refine": Refinement(steps=3), "cache": tmp_path / "cache", "progress": False}
    compress_checkpoint(folder, tmp_path / "one", plan, **settings)
    fits = sorted(path.name for path in (tmp_path / "cache").iterdir())
    compress_checkpoint(folder, tmp_path / "two", plan, **settings)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == fits
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    folder = source(tmp_path)
    model = skeleton(folder)
    assert all(parameter.is_meta for parameter in model.parameters())
    plan = make_plan(model, RULES, keep=0.6)
    with pytest.raises(ValueError, match="expected every planned layer inside the blocks"):
        compress_checkpoint(folder, tmp_path / "out", make_plan(model, {**RULES, "lm_head": LowRank}, keep=0.6))
    with pytest.raises(ValueError, match="expected batches to refine on"):
        compress_checkpoint(folder, tmp_path / "out", plan, refine=Refinement())
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="expected a new folder"):
        compress_checkpoint(folder, tmp_path / "there", plan)
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config\.json"):
        skeleton(tmp_path / "nowhere")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model\.safetensors or"):
        compress_checkpoint(folder, tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_what_a_process_leaves_that_is_killed_at_any_change_of_a_file_is_taken_over(tmp_path: Path) -> None:
    for number in itertools.count(1):
        out = tmp_path / str(number)
        partial = partial_folder(out)
        (partial / "block.safetensors").write_text("x")
        with stopped(number, Killed) as stop:
            partial_folder(out)
        assert partial_folder(out) == partial
        assert [path.name for path in partial.iterdir()] == [".structmat-partial"]
        if stop.seen < number:
            break
    assert number > 4


def test_a_missing_tensor_and_a_broken_weight_are_named(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "dense")
    plan = make_plan(skeleton(tmp_path / "dense"), RULES, keep=0.6)
    with pytest.raises(ValueError, match=r"the weight of layer 'model\.layers\.1\.mlp\.up_proj' to be finite"):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", plan, progress=False)
    assert not (tmp_path / "out.partial").exists()
    index = tmp_path / "dense" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "model.safetensors"}}))
    with pytest.raises(ValueError, match="expected tensors under the modules' names"):
        compress_checkpoint(tmp_path / "dense", tmp_path / "out", plan, progress=False)


def test_a_configuration_without_a_class_is_refused(tmp_path: Path) -> None:
    folder = source(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="to name a class of transformers under 'architectures'"):
        skeleton(folder)
