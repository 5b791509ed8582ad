"""The recurrent layers of PyTorch with a layer for each matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from structmat.nn.split import SplitModule, linear_over, with_parameters

State = tuple[Tensor, ...]
"""The hidden state ``(B, H)``, and for an LSTM the cell's ``(B, H)``."""

PARTS = {"ih": "weight_ih", "hh": "weight_hh", "hr": "weight_hr"}
"""The names of the matrices: of the input, of the hidden state, and of an LSTM's projection."""


class SplitRecurrent(SplitModule):
    """``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` whose matrices are the layers ``ih_l0``, ``hh_l0``, ``ih_l0_reverse``, ….

    All steps are multiplied by the matrix of the input at once, and by that of the hidden state one after the other.

    Args:
        module: The module that this one stands in for; its parameters become those of the layers.
    """

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        self.kind, self.mode = type(module), module.mode
        self.input_size, self.hidden_size, self.proj_size = module.input_size, module.hidden_size, module.proj_size
        self.num_layers, self.bias, self.bidirectional = module.num_layers, module.bias, module.bidirectional
        self.batch_first, self.dropout = module.batch_first, module.dropout
        for layer in self.layers:
            for part, weight in PARTS.items():
                if part != "hr" or self.proj_size:
                    bias = getattr(module, f"bias_{part}_{layer}") if self.bias and part != "hr" else None
                    self.add_module(f"{part}_{layer}", linear_over(getattr(module, f"{weight}_{layer}"), bias))
        self.train(module.training)

    @property
    def layers(self) -> list[str]:
        """The names ``l0``, ``l0_reverse`` and so on of the layers, those of both directions in turn."""
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{k}{end}" for k in range(self.num_layers) for end in ends]

    def joined(self) -> nn.RNNBase:
        """PyTorch's own module with the same weights; every layer must be dense."""
        options: dict[str, Any] = (
            {"nonlinearity": self.mode.removeprefix("RNN_").lower()} if self.kind is nn.RNN else {}
        )
        options |= {"proj_size": self.proj_size} if self.kind is nn.LSTM else {}
        kind: Any = self.kind  # each has its own arguments
        module = kind(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
            device="meta",
            **options,
        )
        found: dict[str, Tensor | None] = {}
        for name, layer in self.named_children():
            part, _, rest = name.partition("_")
            found[f"{PARTS[part]}_{rest}"] = layer.get_parameter("weight")
            if layer.bias is not None:
                found[f"bias_{part}_{rest}"] = layer.get_parameter("bias")
        return with_parameters(module, found, self.training)

    def flatten_parameters(self) -> None:
        """Do nothing: there is no fused memory."""

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, Tensor]]:
        """Go over sequences, as the module of PyTorch does.

        Args:
            input: ``(T, B, N)``, ``(B, T, N)`` with ``batch_first``, ``(T, N)``, or packed sequences.
            hx: The first hidden state ``(layers, B, H)``, for an LSTM with the cell's; zeros where it is None.

        Returns:
            The outputs in the layout of the input, and the last state.

        Raises:
            ValueError: If a shape is wrong.
        """
        if isinstance(input, PackedSequence):
            sizes = input.batch_sizes.tolist()
            first = self._first(hx, sizes[0], input.data, input.sorted_indices)
            y, last = self._stacked(input.data, sizes, first)
            last = tuple(one if input.unsorted_indices is None else one[:, input.unsorted_indices] for one in last)
            return input._replace(data=y), self._state(last)
        if input.ndim not in (2, 3) or input.shape[-1] != self.input_size:
            raise ValueError(
                f"expected an input with 3 axes, or 2 without a batch, and {self.input_size} features, "
                f"got shape {tuple(input.shape)}"
            )
        batched, swap = input.ndim == 3, self.batch_first and input.ndim == 3
        x = input.transpose(0, 1) if swap else input if batched else input[:, None]
        given = _one_by_one(hx)
        if not batched:
            given = None if given is None else tuple(one[:, None] for one in given)
        y, last = self._stacked(x, None, self._first(given, x.shape[1], x, None))
        if not batched:
            return y[:, 0], self._state(tuple(one[:, 0] for one in last))
        return y.transpose(0, 1) if swap else y, self._state(last)

    def _first(self, hx: Tensor | State | None, batch: int, x: Tensor, order: Tensor | None) -> State:
        """The first state, ``(layers, B, H)`` each."""
        widths = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self.mode == "LSTM" else 1]
        given = _one_by_one(hx)
        if given is None:
            return tuple(x.new_zeros(len(self.layers), batch, width) for width in widths)
        wanted = [(len(self.layers), batch, width) for width in widths]
        if [tuple(one.shape) for one in given] != wanted:
            raise ValueError(f"expected a first state of shape {wanted}, got {[tuple(one.shape) for one in given]}")
        return given if order is None else tuple(one[:, order] for one in given)

    def _state(self, state: State) -> Tensor | tuple[Tensor, Tensor]:
        """The state as PyTorch returns it."""
        return (state[0], state[1]) if self.mode == "LSTM" else state[0]

    def _stacked(self, x: Tensor, sizes: list[int] | None, first: State) -> tuple[Tensor, State]:
        """Run all layers, one on top of the other."""
        last: list[State] = []
        ways = 2 if self.bidirectional else 1
        for k in range(self.num_layers):
            both: list[Tensor] = []
            for layer in self.layers[ways * k : ways * (k + 1)]:
                y, state = self._run(layer, x, sizes, tuple(one[len(last)] for one in first))
                both.append(y)
                last.append(state)
            x = both[0] if ways == 1 else torch.cat(both, -1)
            if self.dropout and self.training and k + 1 < self.num_layers:
                x = nn.functional.dropout(x, self.dropout)
        return x, tuple(torch.stack(one) for one in zip(*last, strict=True))

    def _run(self, layer: str, x: Tensor, sizes: list[int] | None, first: State) -> tuple[Tensor, State]:
        """Run one layer in one direction over ``(T, B, N)``, or over packed vectors with these numbers per step."""
        backward = layer.endswith("_reverse")
        gates = self.get_submodule(f"ih_{layer}")(x)
        steps: Sequence[Tensor] = gates.unbind(0) if sizes is None else gates.split(sizes)
        outputs: list[Tensor] = []
        ended: list[State] = []
        state = first if sizes is None or not backward else tuple(one[: sizes[-1]] for one in first)
        for step in reversed(steps) if backward else steps:
            if sizes is not None and backward and len(step) > len(state[0]):
                state = _rows([state, tuple(one[len(state[0]) : len(step)] for one in first)])
            elif sizes is not None and len(step) < len(state[0]):
                ended.append(tuple(one[len(step) :] for one in state))
                state = tuple(one[: len(step)] for one in state)
            state = self._step(layer, step, state)
            outputs.append(state[0])
        ordered = outputs[::-1] if backward else outputs
        return torch.stack(ordered) if sizes is None else torch.cat(ordered), _rows([state, *ended[::-1]])

    def _step(self, layer: str, gates: Tensor, state: State) -> State:
        """One step of one layer."""
        h = state[0]
        recurrent = self.get_submodule(f"hh_{layer}")(h)
        if self.mode == "LSTM":
            i, f, g, o = (gates + recurrent).chunk(4, -1)
            c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            return (self.get_submodule(f"hr_{layer}")(h) if self.proj_size else h), c
        if self.mode == "GRU":
            (r, z, n), (hr, hz, hn) = gates.chunk(3, -1), recurrent.chunk(3, -1)
            z, n = (z + hz).sigmoid(), (n + (r + hr).sigmoid() * hn).tanh()
            return ((1 - z) * n + z * h,)
        return ((gates + recurrent).tanh() if self.mode == "RNN_TANH" else (gates + recurrent).relu(),)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.mode}, {self.input_size}, {self.hidden_size}, num_layers={self.num_layers}"


def _one_by_one(hx: Tensor | State | None) -> State | None:
    """A state as PyTorch takes it, as a tuple."""
    return (hx,) if isinstance(hx, Tensor) else hx


def _rows(states: list[State]) -> State:
    """States one below the other."""
    return states[0] if len(states) == 1 else tuple(torch.cat(parts) for parts in zip(*states, strict=True))
