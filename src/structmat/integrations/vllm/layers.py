"""What vLLM asks of a quantization method: which layers it has, their tensors, and their product.

vLLM merges layers that read one input, such as the projections to queries, keys and values. Each part of such a layer
keeps its own format and its own rank, and has parameters of its own; one operator multiplies with all of them. Where
several devices share the layers, each has rows or columns of every matrix, in the same formats.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config  # pyright: ignore[reportMissingImports]
from vllm.logger import init_logger  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod  # pyright: ignore
from vllm.model_executor.layers.quantization import register_quantization_config  # pyright: ignore
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig  # pyright: ignore
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead  # pyright: ignore

from structmat import _checks
from structmat.formats import Dense, Format
from structmat.integrations.recorded import QUANT_METHOD, Recorded
from structmat.integrations.vllm.product import layout_of, merged_matmul, tuned

AUTOTUNE = "structmat_autotune"
"""The key in vLLM's ``additional_config`` whose value is the numbers of tokens at which products are measured."""

LOGGER = init_logger(__name__)

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
            return StructuredMethod(prefix, names, formats, _tokens())
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


def _tokens() -> list[int]:
    """The numbers of tokens at which the user wants products to be measured."""
    tokens = get_current_vllm_config().additional_config.get(AUTOTUNE, [])
    return [_checks.positive_int(one, AUTOTUNE) for one in _checks.typed(tokens, list, AUTOTUNE)]


class StructuredMethod(LinearMethodBase):
    """The tensors and the product of one layer of vLLM, which may have several parts.

    Args:
        prefix: The name of the layer.
        names: The names of its parts.
        formats: The format of each part; None for dense ones.
        tokens: The numbers of tokens at which the ways to multiply are measured; none for the automatic way.
    """

    def __init__(
        self, prefix: str, names: Sequence[str], formats: Sequence[Format | None], tokens: Sequence[int] = ()
    ) -> None:
        self.prefix, self.names, self.given, self.tokens = prefix, names, formats, tuple(tokens)
        self.wholes: list[Format] = []  # those of the checkpoint
        self.formats: list[Format] = []  # those on this device
        self.cuts: list[tuple[int, int, int]] = []
        self.loaded: list[dict[str, Tensor]] = []
        self.placed: set[int] = set()
        self.height = 0
        self.layout = ""

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
        """Register the factors of each part, and for each name of a factor what vLLM's loader looks for.

        Args:
            layer: The layer.
            input_size_per_partition: The number of in features on this device.
            output_partition_sizes: The number of out features of each part on this device.
            input_size: The number of in features.
            output_size: The number of out features.
            params_dtype: The dtype of the weights.
            **others: What vLLM passes to other methods.

        Raises:
            ValueError: If the shape of a part is not that of the plan, or its matrix cannot be cut for the devices.
        """
        whole = len(self.given) == 1
        heights = [sum(output_partition_sizes)] if whole else list(output_partition_sizes)
        self.height = sum(heights)
        for name, given, height in zip(self.names, self.given, heights, strict=True):
            format = given or Dense(self._features(layer, name, height), input_size)
            if whole and len(output_partition_sizes) > 1 and height < format.M:
                raise ValueError(
                    f"expected layer {name!r} on one device, since its matrix holds those of several layers, got a "
                    "part of it; use --tensor-parallel-size 1"
                )
            self._add(layer, name, format, (height, input_size_per_partition), params_dtype)
        loaders = {name for format in self.wholes for name in format.factor_specs()} | {"weight"}  # for LoRA
        for name in sorted(loaders):
            parameter = nn.Parameter(torch.zeros(1, dtype=params_dtype), requires_grad=False)
            parameter.weight_loader = functools.partial(self._load, layer, name)  # pyright: ignore - vLLM looks for it
            layer.register_parameter(name, parameter)

    def _features(self, layer: nn.Module, name: str, height: int) -> int:
        """The number of out features of a dense part on all devices."""
        copies = getattr(layer, "num_kv_head_replicas", 1) if self.names.index(name) else 1
        return height * getattr(layer, "tp_size", 1) // copies

    def _add(self, layer: nn.Module, name: str, format: Format, shape: tuple[int, int], dtype: torch.dtype) -> None:
        """Register the factors of one part, or of what this device has of it."""
        rows, columns = shape
        if isinstance(layer, ParallelLMHead) and rows > format.M:
            rows = format.M  # vLLM pads the vocabulary
        axis, devices = int(columns < format.N), getattr(layer, "tp_size", 1)
        count = max(format.N // columns if axis else format.M // rows, 1)
        if devices % count or format.shape != ((rows, columns * count) if axis else (rows * count, columns)):
            raise ValueError(f"expected layer {name!r} of shape {shape}, but the checkpoint says {format}")
        cut = axis, getattr(layer, "tp_rank", 0) * count // devices, count  # devices may have the same part
        factors, own = format.init(device="meta", dtype=dtype), format
        if count > 1:
            try:
                own, factors = format.part(factors, *cut)
            except ValueError as error:
                raise ValueError(f"layer {name!r}: {error}; use --tensor-parallel-size 1") from error
        for key, factor in factors.items():
            empty = nn.Parameter(torch.zeros(factor.shape, dtype=factor.dtype), requires_grad=False)
            layer.register_parameter(f"{len(self.formats)}_{key}", empty)
        self.wholes.append(format)
        self.formats.append(own)
        self.cuts.append(cut)
        self.loaded.append({})

    def _load(self, layer: nn.Module, name: str, parameter: nn.Parameter, loaded: Tensor, shard: Any = None) -> None:
        """Take one tensor of a checkpoint; a part is put in its place when it has all of them."""
        part = SHARDS.get(shard, shard) or 0
        specs, found = self.wholes[part].factor_specs(), self.loaded[part]
        if name not in specs:
            return  # the byte that stands for the dense weight of a structured layer
        if tuple(loaded.shape) != specs[name].shape:
            raise ValueError(
                f"expected {name!r} of layer {self.names[part]!r} with shape {specs[name].shape}, got "
                f"{tuple(loaded.shape)}"
            )
        found[name] = loaded
        if len(found) == len(specs):
            self._place(layer, part)

    def _place(self, layer: nn.Module, part: int) -> None:
        """Copy what this device has of a part into its parameters, and forget the rest."""
        found, cut = self.loaded[part], self.cuts[part]
        own = found if cut[2] == 1 else self.wholes[part].part(found, *cut)[1]
        for name, factor in own.items():
            layer.get_parameter(f"{part}_{name}").data.copy_(factor)
        found.clear()
        self.placed.add(part)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that every tensor was there, since vLLM does not, and choose how to multiply."""
        missing = [
            f"{self.names[part]}.{name}"
            for part, format in enumerate(self.wholes)
            for name in format.factor_specs()
            if part not in self.placed and name not in self.loaded[part]
        ]
        if missing:
            raise ValueError(
                f"expected values for {', '.join(sorted(missing))}, but the checkpoint has none; it is incomplete"
            )
        self.layout = layout_of(self.formats, self.tokens)
        for part in range(len(self.formats)):
            self._measure(layer, part)

    def _measure(self, layer: nn.Module, part: int) -> None:
        """Measure how to multiply with a part, where the user wants that, and log it once for each format."""
        format = self.formats[part]
        if not self.tokens or not format.algorithms:
            return
        spec, before = format.factor_specs(), tuned.cache_info().misses
        factor = next(f for n, f in self._factors(layer, part).items() if spec[n].dtype is None)
        tuning, _ = tuned(format, self.tokens, factor.dtype, factor.device)
        if tuned.cache_info().misses > before:
            LOGGER.info("%s", tuning)

    def _factors(self, layer: nn.Module, part: int) -> dict[str, Tensor]:
        """The factors of a part by name."""
        return {name: layer.get_parameter(f"{part}_{name}") for name in self.formats[part].factor_specs()}

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product with each part, side by side, and 0 for the rows with which vLLM pads a vocabulary."""
        factors = [getattr(layer, f"{k}_{name}") for k, one in enumerate(self.formats) for name in one.factor_specs()]
        y = merged_matmul(x, factors, self.layout, self.height)
        return y if bias is None else y + bias
