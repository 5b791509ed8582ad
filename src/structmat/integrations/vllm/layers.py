"""What vLLM asks of a quantization method: which layers it has, their tensors, and their product.

vLLM merges layers that read one input, such as the projections to queries, keys and values. Each part of such a layer
keeps its own format and its own rank: the layer has one flat parameter for each name of a factor, in which the factors
of that name of all parts lie one after the other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod  # pyright: ignore
from vllm.model_executor.layers.quantization import register_quantization_config  # pyright: ignore
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig  # pyright: ignore
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead  # pyright: ignore

from structmat.formats import Dense, Format
from structmat.integrations.recorded import QUANT_METHOD, Recorded

ALIGNMENT = 64
"""The entries between which the factors of a part begin in a flat parameter, so that kernels find them aligned."""

SHARDS = {"q": 0, "k": 1, "v": 2}
"""The place of a part by the name that vLLM gives it where it is no number."""


@register_quantization_config(QUANT_METHOD)
class StructmatConfig(QuantizationConfig):
    """The ``quantization_config`` of a checkpoint.

    Args:
        layers: The format of each structured layer by its name in vLLM.
    """

    def __init__(self, layers: Mapping[str, Format]) -> None:
        super().__init__()
        self.layers = dict(layers)

    def get_name(self) -> Any:
        """The name of the method."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes in which such layers compute."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any device will do."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """The configuration of the model has everything."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> StructmatConfig:
        """Read the configuration of a checkpoint.

        Args:
            config: The ``quantization_config``.

        Returns:
            The configuration.

        Raises:
            ValueError: If layers share their factors, which vLLM cannot express.
        """
        recorded = Recorded(**config)
        if recorded.ties:
            raise ValueError(
                f"expected layers with factors of their own for vLLM, got {sorted(recorded.ties)}, which share those "
                "of others; write the model with structmat densify, or serve it with transformers"
            )
        return cls(dict(recorded.plan()))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take the names that vLLM gives the layers."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """The method of one layer; None for what is no linear layer."""
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            return None
        parent, _, own = prefix.rpartition(".")
        names = [prefix]
        if prefix not in self.layers:
            names = [f"{parent}.{part}" if parent else part for part in self.packed_modules_mapping.get(own, [own])]
        formats = [self.layers.get(name) for name in names]
        if any(format is not None for format in formats):
            return StructuredMethod(prefix, names, formats)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


class StructuredMethod(LinearMethodBase):
    """The tensors and the product of one layer of vLLM, which may have several parts.

    Args:
        prefix: The name of the layer.
        names: The names of its parts.
        formats: The format of each part; None for dense ones.
    """

    def __init__(self, prefix: str, names: Sequence[str], formats: Sequence[Format | None]) -> None:
        self.prefix, self.names, self.given = prefix, names, formats
        self.formats: list[Format] = []
        self.places: dict[str, dict[int, tuple[int, tuple[int, ...]]]] = {}
        self.dtypes: dict[tuple[str, int], torch.dtype] = {}
        self.missing: set[tuple[str, int]] = set()

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **others: Any,
    ) -> None:
        """Register one flat parameter for each name of a factor.

        Args:
            layer: The layer.
            input_size_per_partition: The number of in features on this device.
            output_partition_sizes: The number of out features of each part on this device.
            input_size: The number of in features.
            output_size: The number of out features.
            params_dtype: The dtype of the weights.
            **others: What vLLM passes to other methods.

        Raises:
            ValueError: If the layer is cut for tensor parallelism, or its shape is not that of the plan.
        """
        heights = [sum(output_partition_sizes)] if len(self.given) == 1 else list(output_partition_sizes)
        if input_size_per_partition != input_size or sum(heights) != output_size:
            raise ValueError(
                f"expected layer {self.prefix!r} whole, got a part of it; structured layers are not cut yet; use "
                "--tensor-parallel-size 1"
            )
        shapes = [(height, input_size) for height in heights]
        self.formats = [format or Dense(*shape) for format, shape in zip(self.given, shapes, strict=True)]
        for name, format, shape in zip(self.names, self.formats, shapes, strict=True):
            if format.shape != shape:
                raise ValueError(f"expected layer {name!r} of shape {shape}, but the checkpoint says {format}")
        dtypes = {"weight": params_dtype}
        sizes = {"weight": 1}  # LoRA looks for a weight
        for part, format in enumerate(self.formats):
            for name, spec in format.factor_specs().items():
                start = -(-sizes.get(name, 0) // ALIGNMENT) * ALIGNMENT
                self.places.setdefault(name, {})[part] = start, spec.shape
                sizes[name] = start + math.prod(spec.shape)
                dtype = spec.dtype or params_dtype
                dtypes[name] = torch.promote_types(dtypes.get(name, dtype), dtype)  # parts may differ
                self.dtypes[name, part] = dtype
                self.missing.add((name, part))
        for name, size in sizes.items():
            parameter = nn.Parameter(torch.zeros(size, dtype=dtypes[name]), requires_grad=False)
            parameter.weight_loader = functools.partial(self._load, name)  # pyright: ignore - vLLM looks for it
            layer.register_parameter(name, parameter)

    def _load(self, name: str, parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
        """Copy one tensor of a checkpoint into its place."""
        part = SHARDS.get(shard, shard) or 0
        if part not in self.places.get(name, {}):
            return  # the byte that stands for the dense weight of a structured layer
        start, shape = self.places[name][part]
        if tuple(loaded.shape) != shape:
            raise ValueError(
                f"expected {name!r} of layer {self.names[part]!r} with shape {shape}, got {tuple(loaded.shape)}"
            )
        parameter.data[start : start + loaded.numel()].view(shape).copy_(loaded)
        self.missing.discard((name, part))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that every tensor was there, since vLLM does not."""
        if self.missing:
            lost = sorted(f"{self.names[part]}.{name}" for name, part in self.missing)
            raise ValueError(f"expected values for {', '.join(lost)}, but the checkpoint has none; it is incomplete")

    def factors(self, layer: nn.Module, part: int) -> dict[str, Tensor]:
        """The factors of one part, as views."""
        found: dict[str, Tensor] = {}
        for name, places in self.places.items():
            if part in places:
                start, shape = places[part]
                values = getattr(layer, name)[start : start + math.prod(shape)].view(shape)
                found[name] = values.to(self.dtypes[name, part])
        return found

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of each part, side by side."""
        found = [format.matmul(x, self.factors(layer, part)) for part, format in enumerate(self.formats)]
        y = found[0] if len(found) == 1 else torch.cat(found, -1)
        return y if bias is None else y + bias
