"""An ONNX model of bfloat16 with its numbers in float32, to check its graph on a CPU, where no bfloat16 runs."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from structmat.export.checks import runtime
from structmat.network.calls import copied, widened
from structmat.network.signatures import Signature


@contextmanager
def in_float32(signature: Signature, path: Path) -> Iterator[tuple[Signature, Path]]:
    """Write a twin of an ONNX model that computes in float32, while the context is entered.

    Args:
        signature: The network in bfloat16.
        path: The model.

    Yields:
        The network in float32, and the twin.
    """
    onnx = runtime("onnx", "onnx")
    model = onnx.load(path)
    _widen_graph(onnx, model.graph)

    def draw(sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        return tuple(widened(tensor, torch.float32) for tensor in signature.draw(sizes, generator))

    module = copied(signature.module).float()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        twin = Path(folder) / path.name
        onnx.save_model(model, twin, save_as_external_data=True, location=f"{path.name}.data")
        yield dataclasses.replace(signature, module=module, draw=draw), twin


def _widen_graph(onnx: Any, graph: Any) -> None:
    """Turn every type and every constant of bfloat16 into float32, in place."""
    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    del graph.value_info[:]  # onnxruntime finds the types itself
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    for tensor in graph.initializer:
        _widen_tensor(onnx, tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i == narrow:
                attribute.i = wide
            if attribute.HasField("t"):
                _widen_tensor(onnx, attribute.t)
            if attribute.HasField("g"):
                _widen_graph(onnx, attribute.g)


def _widen_tensor(onnx: Any, tensor: Any) -> None:
    if tensor.data_type == onnx.TensorProto.BFLOAT16:
        values = onnx.numpy_helper.to_array(tensor).astype("float32")
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
