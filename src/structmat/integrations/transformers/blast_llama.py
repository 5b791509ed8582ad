"""Read the checkpoints that the authors of BLAST published (Lee et al. 2024, compressed Llama)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from structmat import _checks
from structmat._files import read_tensors
from structmat.formats import Blast
from structmat.integrations.transformers.skeletons import empty_model
from structmat.network.surgery import apply_plan_

FACTORS = ("B", "C", "D")
"""Names of a layer's tensors in such a checkpoint: bases of the rows, of the columns, and the couplings."""


def import_blast_checkpoint(folder: str | os.PathLike[str]) -> LlamaForCausalLM:
    """Build a Llama whose linear layers are BLAST matrices from a folder of the authors' layout.

    A structured layer in such a folder has the tensors ``B (I, P, R)``, ``C (J, R, Q)`` and ``D (I, J, R)``; block
    ``(i, j)`` of its weight is ``B_i Diag(D_ij) C_j``. ``B`` may be transposed to ``(I, R, P)`` and ``C`` to
    ``(J, Q, R)`` if the shapes leave no doubt. Other tensors are those of a dense Llama. This reads the files itself:
    the helpers of ``huggingface_hub`` load into a model, whose names must be those of the files.

    Args:
        folder: A folder with the ``config.json`` of a Llama, whose other keys are ignored, and the weights in
            ``*.safetensors`` or ``pytorch_model*.bin`` files.

    Returns:
        The model, in the dtype of the files, ready for ``save_pretrained``.

    Raises:
        FileNotFoundError: If the folder has no ``config.json`` or no weights.
        ValueError: If a tensor is there twice, is missing, is extra, or has a shape that does not fit.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"expected the config.json of a Llama in {os.fspath(folder)!r}, found none")
    tensors = _read_all(folder)
    config = LlamaConfig.from_pretrained(folder)
    config.__dict__.pop("auto_map", None)  # the authors' code beside the checkpoint, which this class replaces
    model = empty_model(LlamaForCausalLM, config)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    shapes = {name: (module.out_features, module.in_features) for name, module in linears.items()}
    structured = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in FACTORS}
    unknown = sorted(structured - set(shapes))
    if unknown:
        raise ValueError(f"expected BLAST factors of linear layers of a Llama alone, got some of {unknown}")
    plan = {name: _format(name, shapes[name], tensors) for name in shapes if name in structured}
    state = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] not in FACTORS}
    state |= {f"{name}.diag": tensors[f"{name}.D"].flatten(0, 1) for name in plan}
    for own, factor in (("B", "left"), ("C", "right")):
        transposed = _is_transposed(own, plan, tensors)
        for name in plan:
            tensor = tensors[f"{name}.{own}"]
            state[f"{name}.{factor}"] = (tensor.mT if transposed else tensor).flatten(0, 1).contiguous()
    if "lm_head" in plan:
        config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    return _filled(model, plan, state, os.fspath(folder))


def _read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the folder's weight files."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(
            f"expected weights, *.safetensors or pytorch_model*.bin, in {os.fspath(folder)!r}, found none"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        part = (
            read_tensors(file)[0]
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
        twice = sorted(set(part) & set(tensors))
        if twice:
            raise ValueError(f"expected every tensor in one file, but {file.name} has {twice} again")
        tensors.update(part)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}


def _format(name: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Blast:
    """The format of one layer of this dense shape."""
    missing = [f"{name}.{own}" for own in FACTORS if f"{name}.{own}" not in tensors]
    if missing:
        raise ValueError(f"expected B, C and D of layer {name!r}, but the checkpoint has no {', '.join(missing)}")
    D = tensors[f"{name}.D"]
    if D.ndim != 3 or not D.numel() or shape[0] % D.shape[0] or shape[1] % D.shape[1]:
        raise ValueError(f"expected D (I, J, R) for layer {name!r} of shape {shape}, got {tuple(D.shape)}")
    return Blast(*shape, (D.shape[0], D.shape[1]), D.shape[2])


def _is_transposed(own: str, plan: Mapping[str, Blast], tensors: Mapping[str, Tensor]) -> bool:
    """Whether ``B`` or ``C`` is stored transposed throughout, as every layer tells whose blocks are not square."""
    says: dict[bool, str] = {}
    for name, format in plan.items():
        (I, J), (P, Q), R = format.blocks, format.block_shape, format.rank
        expected, got = ((I, P, R) if own == "B" else (J, R, Q)), tuple(tensors[f"{name}.{own}"].shape)
        transposed = (expected[0], expected[2], expected[1])
        if got not in (expected, transposed):
            raise ValueError(
                f"expected {own} {expected} or {transposed} for layer {name!r}, whose D says {format}, got {got}"
            )
        if expected != transposed:
            says.setdefault(got == transposed, name)
    if len(says) > 1:
        raise ValueError(
            f"expected {own} in one orientation, but it is transposed in {says[True]!r}, not {says[False]!r}"
        )
    if plan and not says:
        raise ValueError(
            f"expected some layer whose shapes tell the orientation of {own}, but all of their blocks are square; "
            "build the factors of Blast from the tensors and use apply_plan_"
        )
    return True in says


def _filled(
    model: LlamaForCausalLM, plan: Mapping[str, Blast], state: dict[str, Tensor], where: str
) -> LlamaForCausalLM:
    """The skeleton with structured layers and all values, after checking that there is one for everything."""
    apply_plan_(model, plan)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _checks.same_shapes(
        {name: tuple(tensor.shape) for name, tensor in state.items()}, expected, f"the checkpoint {where!r}"
    )
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.eval()
