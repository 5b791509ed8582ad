"""Structured matrices as ordinary linear layers on slices of their input, for runtimes outside of PyTorch.

Runtimes lay the weights of linear layers out in advance and quantise them, but not the factors of batched products.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def linear(weight: Tensor) -> nn.Linear:
    """A linear layer without a bias.

    Args:
        weight: ``(out, in)``.

    Returns:
        The layer.
    """
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    return layer


class Chain(nn.Sequential):
    """Linear layers one after the other.

    Args:
        weights: The weights, the first one first.
    """

    def __init__(self, *weights: Tensor) -> None:
        super().__init__(*(linear(weight) for weight in weights))


class Sliced(nn.Module):
    """One linear layer for each part of the input, whose outputs are side by side.

    Args:
        weights: The weights ``(P, Q)``, one for each part.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(weight) for weight in weights)

    def parts(self, x: Tensor) -> list[Tensor]:
        """The outputs ``(..., P)`` of the parts of ``x (..., J Q)``."""
        Q = x.shape[-1] // len(self.layers)
        return [layer(x[..., j * Q : (j + 1) * Q]) for j, layer in enumerate(self.layers)]

    def forward(self, x: Tensor) -> Tensor:
        """The outputs side by side."""
        return torch.cat(self.parts(x), -1)


class Coupled(nn.Module):
    """Two rows of linear layers with couplings between them: the product with a BLAST matrix.

    Args:
        left: ``(I, P, R)``.
        diag: ``(I, J, R)``.
        right: ``(J, R, Q)``.
    """

    def __init__(self, left: Tensor, diag: Tensor, right: Tensor) -> None:
        super().__init__()
        self.inner, self.outer = Sliced(right.unbind()), nn.ModuleList(linear(block) for block in left)
        self.diag = nn.Parameter(diag.detach().contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., J Q)`` to ``(..., I P)``."""
        z = torch.stack(self.inner.parts(x))  # (J, ..., R)
        diag = self.diag.unflatten(2, (*[1] * (x.ndim - 1), -1))
        h = (z * diag).sum(1)  # (I, ..., R)
        return torch.cat([layer(part) for layer, part in zip(self.outer, h.unbind(), strict=True)], -1)


class CoupledByTerms(nn.Module):
    """The same with one product and one sum for each block, for runtimes that have no sum over an axis.

    Args:
        left: ``(I, P, R)``.
        diag: ``(I, J, R)``.
        right: ``(J, R, Q)``.
    """

    def __init__(self, left: Tensor, diag: Tensor, right: Tensor) -> None:
        super().__init__()
        self.inner, self.outer = Sliced(right.unbind()), nn.ModuleList(linear(block) for block in left)
        self.diag = nn.ParameterList(
            nn.Parameter(coupling.detach().contiguous(), requires_grad=False) for coupling in diag.flatten(0, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(..., J Q)`` to ``(..., I P)``."""
        z, outputs = self.inner.parts(x), []
        for i, layer in enumerate(self.outer):
            terms = [part * self.diag[i * len(z) + j] for j, part in enumerate(z)]
            outputs.append(layer(functools.reduce(torch.add, terms)))
        return torch.cat(outputs, -1)


class Regrouped(nn.Module):
    """Two rows of linear layers, each of the second takes a part of every output of the first: a Monarch matrix.

    Args:
        left: ``(I, P, J t)``.
        right: ``(J, I t, Q)``.
        permuted: Whether entry ``p`` of output block ``i`` comes at ``p I + i``.
    """

    def __init__(self, left: Tensor, right: Tensor, permuted: bool) -> None:
        super().__init__()
        self.inner, self.outer = Sliced(right.unbind()), nn.ModuleList(linear(block) for block in left)
        self.permuted = permuted

    def forward(self, x: Tensor) -> Tensor:
        """``(..., J Q)`` to ``(..., I P)``."""
        z, I = self.inner.parts(x), len(self.outer)
        t = z[0].shape[-1] // I
        outputs = [
            layer(torch.cat([part[..., i * t : (i + 1) * t] for part in z], -1)) for i, layer in enumerate(self.outer)
        ]
        return torch.stack(outputs, -1).flatten(-2) if self.permuted else torch.cat(outputs, -1)


class Rows(nn.Module):
    """One linear layer for each block row, which takes some of the parts of the input: a block-sparse matrix.

    Args:
        weights: The blocks ``(n_i, P, Q)`` of each block row.
        columns: The columns of the blocks of each block row.
        block_columns: The number of parts of the input.
        chain: The factors of a matrix that is added, as ``Chain`` takes them; empty for none.
    """

    def __init__(
        self, weights: Sequence[Tensor], columns: Sequence[Sequence[int]], block_columns: int, chain: Sequence[Tensor]
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(torch.cat(tuple(blocks), 1)) for blocks in weights if len(blocks))
        self.columns, self.block_columns, self.height = columns, block_columns, weights[0].shape[1]
        self.chain = Chain(*chain) if chain else None

    def forward(self, x: Tensor) -> Tensor:
        """``(..., J Q)`` to ``(..., I P)``."""
        Q, layers = x.shape[-1] // self.block_columns, iter(self.layers)
        outputs: list[Tensor] = []
        for row in self.columns:
            if row:
                outputs.append(next(layers)(torch.cat([x[..., j * Q : (j + 1) * Q] for j in row], -1)))
            else:
                outputs.append(x.new_zeros(*x.shape[:-1], self.height))
        y = torch.cat(outputs, -1)
        return y if self.chain is None else y + self.chain(x)
