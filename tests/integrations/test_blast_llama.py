"""The authors' checkpoints: blocks against the formula of the paper, and every way in which a folder can be wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build, output_of, same_state
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from structmat import Blast, plan_of
from structmat.integrations.transformers.blast_llama import import_blast_checkpoint

I, J, R = 4, 2, 5


def authors_layer(M: int, N: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"B": (I, M // I, R), "C": (J, R, N // J), "D": (I, J, R)}
    return {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}


def dense(layer: dict[str, Tensor]) -> Tensor:
    """Block ``(i, j)`` is ``B_i Diag(D_ij) C_j``, one block after the other."""
    B, C, D = (layer[name] for name in "BCD")
    return torch.cat([torch.cat([B[i] @ torch.diag(D[i, j]) @ C[j] for j in range(J)], 1) for i in range(I)])


def authors_tensors(model: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a checkpoint as the authors store one, and the dense model with the same weights."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed, (name, module) in enumerate(model.named_modules()):
        if name.endswith("_proj"):
            layer = authors_layer(*module.weight.shape, seed)
            del tensors[f"{name}.weight"]
            tensors.update((f"{name}.{own}", tensor) for own, tensor in layer.items())
            with torch.no_grad():
                module.weight.copy_(dense(layer))
    return tensors, model


def write(folder: Path, model: Any, tensors: dict[str, Tensor], shards: int = 1, torch_format: bool = False) -> None:
    config = {**json.loads(model.config.to_json_string()), "blast_rank": R, "auto_map": {"AutoModel": "x--y.Z"}}
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    for k in range(shards):
        part = {name: tensors[name].contiguous() for name in names[k::shards]}
        if torch_format:
            torch.save(part, folder / f"pytorch_model-{k}.bin")
        else:
            save_file(part, folder / f"model-{k}.safetensors")


@pytest.mark.parametrize("torch_format", [False, True])
@pytest.mark.parametrize("transposed", ["", "B", "C", "BC"])
def test_the_model_is_the_dense_one(transposed: str, torch_format: bool, tmp_path: Path) -> None:
    tensors, model = authors_tensors(build("LlamaForCausalLM"))
    stored = {n: t.mT if n.rpartition(".")[2] in set(transposed) else t for n, t in tensors.items()}
    write(tmp_path, model, stored, 3, torch_format)
    imported = import_blast_checkpoint(tmp_path)
    assert plan_of(imported)["model.layers.0.mlp.up_proj"] == Blast(48, 32, (I, J), R)
    assert len(plan_of(imported)) == 14
    torch.testing.assert_close(output_of(imported), output_of(model), rtol=1e-4, atol=1e-5)
    imported.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_state(loaded, imported)
    assert torch.equal(output_of(loaded), output_of(imported))
    assert "auto_map" not in json.loads((tmp_path / "out/config.json").read_text())


def test_square_blocks_follow_the_others(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM")
    tensors, _ = authors_tensors(model)
    name = "model.layers.0.self_attn.q_proj"
    square = {"B": torch.randn(4, 8, 8) / 8, "C": torch.randn(2, 8, 16) / 8, "D": torch.randn(4, 2, 8)}
    for own, tensor in square.items():
        tensors[f"{name}.{own}"] = tensor.mT if own == "B" else tensor
    for other in [n for n in tensors if n.endswith(".B") and not n.startswith(name)]:
        tensors[other] = tensors[other].mT
    write(tmp_path, model, tensors)
    torch.testing.assert_close(import_blast_checkpoint(tmp_path).get_submodule(name).to_dense(), dense(square))


@pytest.mark.parametrize("tied", [False, True])
def test_heads(tied: bool, tmp_path: Path) -> None:
    tensors, model = authors_tensors(build("LlamaForCausalLM", tie_word_embeddings=True))
    del tensors["lm_head.weight"]
    if not tied:
        head = authors_layer(64, 32, 99)
        tensors.update((f"lm_head.{own}", tensor) for own, tensor in head.items())
    write(tmp_path, model, tensors)
    imported = import_blast_checkpoint(tmp_path)
    assert (imported.lm_head.weight is imported.model.embed_tokens.weight) is tied
    if tied:
        torch.testing.assert_close(output_of(imported), output_of(model), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(imported.lm_head.to_dense(), dense(head))


Q = "model.layers.0.self_attn.q_proj"
WRONG: dict[str, tuple[Any, str]] = {
    "no couplings": (lambda t: t.pop(f"{Q}.D"), f"expected B, C and D of layer '{Q}', but the checkpoint has no {Q}.D"),
    "no bases": (lambda t: t.pop(f"{Q}.B"), f"expected B, C and D of layer '{Q}', but the checkpoint has no {Q}.B"),
    "flat couplings": (lambda t: t.update({f"{Q}.D": torch.ones(8, 5)}), f"expected D (I, J, R) for layer '{Q}'"),
    "odd couplings": (lambda t: t.update({f"{Q}.D": torch.ones(3, 2, 5)}), f"expected D (I, J, R) for layer '{Q}'"),
    "odd bases": (lambda t: t.update({f"{Q}.B": torch.ones(4, 7, 5)}), "expected B (4, 8, 5) or (4, 5, 8) for layer"),
    "mixed": (
        lambda t: t.update({f"{Q}.C": t[f"{Q}.C"].mT}),
        "expected C in one orientation, but it is transposed in",
    ),
    "dense too": (lambda t: t.update({f"{Q}.weight": torch.ones(32, 32)}), f"unexpected {Q}.weight (32, 32)"),
    "no norm": (lambda t: t.pop("model.norm.weight"), "missing model.norm.weight (32,)"),
    "no embedding": (lambda t: t.pop("model.embed_tokens.weight"), "missing model.embed_tokens.weight (64, 32)"),
    "elsewhere": (lambda t: t.update({"model.norm.B": torch.ones(2, 2, 2)}), "got some of ['model.norm']"),
}


@pytest.mark.parametrize(("change", "message"), list(WRONG.values()), ids=list(WRONG))
def test_what_does_not_fit_is_named(change: Any, message: str, tmp_path: Path) -> None:
    tensors, model = authors_tensors(build("LlamaForCausalLM"))
    change(tensors)
    write(tmp_path, model, tensors)
    with pytest.raises(ValueError, match=re.escape(message)):
        import_blast_checkpoint(tmp_path)


def test_square_blocks_alone_are_refused(tmp_path: Path) -> None:
    model = build("LlamaForCausalLM", num_hidden_layers=1)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del tensors[f"{Q}.weight"]
    tensors |= {f"{Q}.B": torch.ones(4, 8, 8), f"{Q}.C": torch.ones(4, 8, 8), f"{Q}.D": torch.ones(4, 4, 8)}
    write(tmp_path, model, tensors)
    with pytest.raises(ValueError, match="expected some layer whose shapes tell the orientation of B"):
        import_blast_checkpoint(tmp_path)


def test_files_that_are_not_there_or_twice(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected the config.json of a Llama in"):
        import_blast_checkpoint(tmp_path)
    tensors, model = authors_tensors(build("LlamaForCausalLM"))
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    with pytest.raises(FileNotFoundError, match=r"expected weights, \*.safetensors or pytorch_model\*.bin, in"):
        import_blast_checkpoint(tmp_path)
    write(tmp_path, model, tensors)
    save_file({"model.norm.weight": torch.ones(32)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"expected every tensor in one file, but more.safetensors has \['model.norm"):
        import_blast_checkpoint(tmp_path)
