"""ExecuTorch: one ``.pte`` file for phones and small computers, whose products run in XNNPACK."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from structmat import _checks
from structmat.export.checks import Exported, ExportError, appearing, dtype_of, largest_difference, runtime
from structmat.export.prepared import MOST_LAYERS, prepared
from structmat.network.calls import evaluating, undisturbed
from structmat.network.signatures import BATCH, Axes, Signature, signature_of

EXTRA = "executorch"

LARGEST_BATCH, LARGEST_LENGTH = 8, 128
"""The largest lengths of the batch and of other axes where none are given; the runtime reserves memory for them."""


@undisturbed()
def to_executorch(
    model: nn.Module,
    path: str | os.PathLike[str],
    inputs: Any = None,
    *,
    axes: Axes | None = None,
    dynamic: bool = True,
    lengths: Mapping[str, int] | None = None,
    int8: bool = False,
) -> Exported:
    """Write a network as an ExecuTorch program for XNNPACK, and check it in ExecuTorch's own runtime.

    A structure that is still learned is hardened in the file, and GBLR matrices are in tiles; the network itself does
    not change. A causal language model of transformers takes and returns its past keys and values.

    Args:
        model: The network, on the CPU and in float32.
        path: The file to write; an existing one is replaced.
        inputs: A batch, as ``signature_of`` takes it; None for models of transformers, whose inputs are known.
        axes: The names of the axes that may have any length, as for ``to_onnx``.
        dynamic: Whether these axes vary; the program has fixed shapes otherwise, and more of it runs in XNNPACK.
        lengths: The largest length of each axis that varies, by its name, or with fixed shapes its length. Other axes
            vary up to ``LARGEST_BATCH`` or ``LARGEST_LENGTH``, or have the length of the example.
        int8: Whether XNNPACK's quantizer stores all linear layers in int8 for each row, and rounds their inputs while
            the program runs. Every structured matrix of blocks is unrolled into linear layers for this.

    Returns:
        What was written, with the number of parts that run in XNNPACK.

    Raises:
        ExportError: If the network cannot be exported, or the runtime computes something else; no file is left then.
        ImportError: If executorch is not installed.
        ValueError: If the inputs are missing or do not fit, or the network is not in float32 on the CPU.
    """
    runtime("executorch.exir", EXTRA)
    dtype = dtype_of(model)
    if dtype != torch.float32:
        raise ValueError(
            f"expected a model in float32 for ExecuTorch, got one in {dtype}; convert it with model.float()"
        )
    new, gaps = prepared(model, None if int8 else MOST_LAYERS, sums=False)
    path = Path(path)
    with evaluating(new), appearing(path) as temporary:
        signature = _with_lengths(signature_of(new, inputs, axes), lengths or {}, dynamic)
        edge = _lowered(signature, type(model).__name__, dynamic, int8)
        temporary.write_bytes(edge.to_executorch().buffer)
        what = f"ExecuTorch {runtime('executorch.version', EXTRA).__version__}"
        rounding = torch.int8 if int8 else dtype
        difference = largest_difference(signature, _Method(temporary), rounding, what, vary=dynamic)
        size = temporary.stat().st_size
    shapes = _shapes(signature, dynamic)
    return Exported(path, (path,), size, *shapes, difference, what, gaps, _delegates(edge))


def _with_lengths(signature: Signature, lengths: Mapping[str, int], dynamic: bool) -> Signature:
    """The signature with the largest length of each axis, or with fixed ones as those of the example."""
    names = [name for name in signature.sizes if "+" not in name]
    for name, length in lengths.items():
        _checks.one_of(name, names, "the name of an axis")
        _checks.positive_int(length, f"the length of {name!r}")
    found = dict(signature.sizes)
    if dynamic:
        limits = {name: LARGEST_BATCH if name == BATCH else LARGEST_LENGTH for name in names} | dict(lengths)
        small = [name for name, limit in limits.items() if limit < found[name]]
        if small:
            raise ValueError(
                f"expected a largest length of at least {found[small[0]]} for {small[0]!r}, that of the example, got "
                f"{limits[small[0]]}; pass a smaller example, or dynamic=False"
            )
        return signature.limited(limits)
    found |= lengths
    return signature.resized(found)


def _lowered(signature: Signature, kind: str, dynamic: bool, int8: bool) -> Any:
    """Record the graph and hand its parts to XNNPACK."""
    example = signature.draw(signature.sizes, torch.Generator().manual_seed(0))
    dims = {name: Dim.AUTO(min=1, max=limit) for name, limit in signature.limits.items()}
    named = [signature.axes.get(name, {}) if dynamic else {} for name in signature.inputs]
    shapes = tuple({axis: dims[own] for axis, own in one.items()} for one in named)
    partition = runtime("executorch.backends.xnnpack.partition.xnnpack_partitioner", EXTRA)
    exir = runtime("executorch.exir", EXTRA)
    record = functools.partial(torch.export.export, args=example)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter
            program = record(signature.module, dynamic_shapes=(shapes,))
            partitioners = [partition.XnnpackPartitioner()]
            if int8:
                program = record(_quantized(program.module(), example), dynamic_shapes=shapes)
                partitioners.insert(0, partition.XnnpackDynamicallyQuantizedPartitioner())
            return exir.to_edge_transform_and_lower(program, partitioner=partitioners)
    except Exception as error:
        line = " ".join(str(error).split())[:400]
        raise ExportError(
            f"expected a {kind} that ExecuTorch can export, got: {type(error).__name__}: {line}; where axes must have "
            "one length, pass dynamic=False"
        ) from error


def _quantized(module: nn.Module, example: Sequence[Tensor]) -> nn.Module:
    """A recorded network whose linear layers are quantised as XNNPACK's quantizer does."""
    quantizing = runtime("torchao.quantization.pt2e.quantize_pt2e", EXTRA)
    xnnpack = runtime("executorch.backends.xnnpack.quantizer.xnnpack_quantizer", EXTRA)
    quantizer = xnnpack.XNNPACKQuantizer()
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer.set_operator_type(torch.ops.aten.linear.default, config)
    quantizer.transform_for_annotation = lambda model: model  # it makes the scalars beside whole numbers floats
    observed = quantizing.prepare_pt2e(module, quantizer)
    observed(*example)
    return quantizing.convert_pt2e(observed)


def _delegates(edge: Any) -> int:
    """The number of parts of a program that a backend takes over."""
    nodes = edge.exported_program().graph_module.graph.nodes
    return sum(node.op == "call_function" and "executorch_call_delegate" in str(node.target) for node in nodes)


class _Method:
    """A program in ExecuTorch's runtime, with everything in memory that its method reads."""

    def __init__(self, path: Path) -> None:
        self.content = path.read_bytes()
        self.program = runtime("executorch.runtime", EXTRA).Runtime.get().load_program(self.content)
        self.method = self.program.load_method("forward")

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [output.clone() for output in self.method.execute(list(inputs))]  # or the next call writes into them


def _shapes(signature: Signature, dynamic: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The shapes of the inputs and outputs by name, those of axes that vary by their names."""
    inputs = signature.draw(signature.sizes, torch.Generator().manual_seed(0))
    outputs = signature.module(*inputs)
    found = {name: tuple(tensor.shape) for name, tensor in zip(signature.inputs, inputs, strict=True)}
    if dynamic:
        named = {name: signature.axes.get(name, {}) for name in found}
        found = {
            name: tuple(
                f"{own} up to {signature.limits[own]}" if (own := named[name].get(axis)) else size
                for axis, size in enumerate(shape)
            )
            for name, shape in found.items()
        }
    return found, {name: tuple(tensor.shape) for name, tensor in zip(signature.outputs, outputs, strict=True)}
