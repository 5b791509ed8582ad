"""ONNX: one file of plain operators that onnxruntime and others run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structmat.export.checks import Exported, ExportError, appearing, dtype_of, largest_difference, runtime
from structmat.export.prepared import prepared
from structmat.network.calls import evaluating, undisturbed
from structmat.network.signatures import Axes, Signature, signature_of

LARGEST_FILE = 2**31 - 2**26
"""The most bytes of weights in one file with the graph; a file of protobuf has less than 2 GiB, and the graph takes a
part of it."""

EXTRA = "onnx"


@undisturbed()
def to_onnx(
    model: nn.Module, path: str | os.PathLike[str], inputs: Any = None, *, axes: Axes | None = None
) -> Exported:
    """Write a network as an ONNX model, and check it in onnxruntime.

    The graph has the operators of ONNX alone, and any batch size and sequence length. A causal language model of
    transformers takes and returns ``past_key_values``, under the names of optimum. A structure that is still learned
    is hardened in the file, and GBLR matrices are in tiles; the network itself does not change. Weights of 2 GB or more
    are in a second file beside the first, ``PATH.data``.

    Args:
        model: The network, on the CPU, in float32, float16, bfloat16 or float64. No CPU runs bfloat16 in onnxruntime;
            such a graph is checked with its weights in float32.
        path: The file to write; an existing one is replaced.
        inputs: A batch, as ``signature_of`` takes it; None for models of transformers, whose inputs are known.
        axes: The names of the axes that may have any length, by the names of inputs; None for the batch, and the
            sequence where there is one.

    Returns:
        What was written.

    Raises:
        ExportError: If PyTorch cannot export the network, or onnxruntime computes something else; no file is left then.
        ImportError: If onnx, onnxruntime or onnxscript is not installed.
        ValueError: If the inputs are missing or do not fit, or the network is not on the CPU.
    """
    onnx = runtime("onnx", EXTRA)
    for name in ("onnxscript", "onnxruntime"):
        runtime(name, EXTRA)
    new, gaps = prepared(model)
    path = Path(path)
    with evaluating(new), appearing(path) as temporary:
        signature = signature_of(new, inputs, axes)
        program = _program(signature, type(model).__name__)
        weights = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
        program.save(temporary, external_data=weights > LARGEST_FILE)
        names = sorted(file.name for file in temporary.parent.iterdir())
        graph = onnx.load(temporary, load_external_data=False).graph
        _check_domains(graph)
        dtype = dtype_of(new)
        difference, checked = _checked(signature, temporary, dtype)
        size = sum(file.stat().st_size for file in temporary.parent.iterdir())
    shapes, results = ({one.name: _shape(one) for one in ones} for ones in (graph.input, graph.output))
    files = tuple(path.parent / name for name in names)
    return Exported(path, files, size, shapes, results, difference, checked, gaps)


def _program(signature: Signature, kind: str) -> Any:
    """Record the graph."""
    example = signature.draw(signature.sizes, torch.Generator().manual_seed(0))
    shapes = tuple(dict(signature.axes.get(name, {})) for name in signature.inputs)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter
            program = torch.onnx.export(
                signature.module,
                example,
                dynamo=True,
                dynamic_shapes=(shapes,),
                input_names=list(signature.inputs),
                output_names=list(signature.outputs),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(
            f"expected a {kind} that torch.onnx can export, got: {_cause(error)}; where an axis must have one length, "
            "pass inputs=batch and axes without it"
        ) from error
    if program is None:
        raise ExportError(f"expected torch.onnx to return a program for a {kind}, got none")
    _forget_origins(program.model)
    return program


def _forget_origins(model: Any) -> None:
    """Remove what the exporter notes about the code behind each node, which names files of this machine."""
    model.metadata_props.clear()
    for graph in model.graphs():
        graph.metadata_props.clear()
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            values += node.outputs
        for value in values:
            value.metadata_props.clear()


def _cause(error: BaseException) -> str:
    """The first line of the error at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:400]}"


def _check_domains(graph: Any) -> None:
    others = sorted({node.domain for node in graph.node} - {"", "ai.onnx"})
    if others:
        raise ExportError(f"expected operators of ONNX alone, got some of {', '.join(others)}; nothing was written")


def _checked(signature: Signature, path: Path, dtype: torch.dtype) -> tuple[float, str]:
    """The largest difference between onnxruntime and PyTorch, and what was run."""
    onnxruntime = runtime("onnxruntime", EXTRA)
    what = f"onnxruntime {onnxruntime.__version__}"
    if dtype != torch.bfloat16:
        return largest_difference(signature, _session(path), dtype, what), what
    widened = runtime("structmat.export.widening", EXTRA)
    with widened.in_float32(signature, path) as (wide, twin):
        return largest_difference(wide, _session(twin), dtype, what), f"{what}, the weights in float32"


def _session(path: Path) -> Any:
    """Run a model in onnxruntime on the CPU."""
    onnxruntime = runtime("onnxruntime", EXTRA)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        raise ExportError(f"onnxruntime does not load the model: {line}; nothing was written") from error
    names = [one.name for one in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    return run


def _shape(value: Any) -> tuple[int | str, ...]:
    """The shape of an input or output of a graph."""
    return tuple(axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim)
