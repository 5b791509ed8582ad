"""Networks for runtimes outside of PyTorch: ONNX, and ExecuTorch on phones and small computers.

``to_onnx`` and ``to_executorch`` write one file that the runtime loads without this library, and run it against PyTorch
on random inputs before it appears.
"""

from structmat.export.checks import Exported, ExportError
from structmat.export.executorch import to_executorch
from structmat.export.onnx import to_onnx
from structmat.export.quantize import quantize_

__all__ = ["ExportError", "Exported", "quantize_", "to_executorch", "to_onnx"]
