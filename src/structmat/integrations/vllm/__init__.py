"""Structured language models in vLLM, which serves them as it serves any other: ``vllm serve small``.

vLLM finds ``register`` by an entry point of the package. Nothing here imports vLLM before it asks for that.
"""

from __future__ import annotations

import importlib


def register() -> None:
    """Tell vLLM the quantization method ``"structmat"``; vLLM calls this in each of its processes."""
    importlib.import_module("structmat.integrations.vllm.layers")


__all__ = ["register"]
