"""Small networks that the tests of surgery and compression share, and what is asked of them."""

from typing import Any

import torch
from torch import Tensor, nn


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.ReLU(), nn.Linear(32, 24))


class Tied(nn.Module):
    """Two layers of one weight with their own biases, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)
        self.second.weight = self.first.weight
        self.inner = nn.Sequential(nn.Linear(24, 24))
        self.again = self.inner[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.inner(self.second(self.first(x))))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that an operation that fails must leave as it was."""
    return {
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "parameters": [
            (name, id(p), p._version, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)
        ],
    }


def exact(weight: Tensor, rank: int) -> Tensor:
    """A weight of this rank and shape."""
    M, N = weight.shape
    return torch.randn(M, rank, generator=generator(1)) @ torch.randn(rank, N, generator=generator(2)) / N**0.5


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


class Block(nn.Module):
    """A transformer block: attention and a perceptron, each on a normalised input and added to the hidden state.

    Args:
        width: Of the hidden state.
        returns_tuple: Whether to return a tuple that begins with it.
        bias: Whether the layers have biases.
    """

    def __init__(self, width: int, returns_tuple: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=bias) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width, bias=bias), nn.Linear(2 * width, width, bias=bias)

    def forward(self, x: Tensor, scale: Tensor | None = None, *, mask: Tensor | None = None) -> Any:
        h = self.norms[0](x)
        q, k, v = (layer(h)[:, None] for layer in (self.query, self.key, self.value))
        bias = None if mask is None else torch.where(mask, 0.0, -torch.inf).to(x.dtype)[:, None, None]
        mixed = self.out(nn.functional.scaled_dot_product_attention(q, k, v, bias)[:, 0])
        x = x + (mixed if scale is None else mixed * scale)
        x = x + self.down(self.up(self.norms[1](x)).relu())
        return (x, None) if self.returns_tuple else x


class Stack(nn.Module):
    """Transformer blocks between a projection that embeds and a head.

    Args:
        width: Of the hidden state.
        depth: How many blocks.
        returns_tuple: As in ``Block``.
        bias: As in ``Block``, and of the projection and the head.
    """

    def __init__(self, width: int = 24, depth: int = 3, returns_tuple: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(12, width, bias=bias)
        self.blocks = nn.ModuleList(Block(width, returns_tuple, bias) for _ in range(depth))
        self.head = nn.Linear(width, 16, bias=bias)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = None if attention_mask is None else attention_mask.bool()
        scale = 1 + 0.1 * x[..., :1]  # differs from batch to batch
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, scale, mask=mask)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(x.relu())


def sequences(count: int, batch: int = 4, tokens: int = 9, seed: int = 0) -> list[Tensor]:
    """Correlated inputs of a ``Stack``, ``(batch, tokens, 12)`` each."""
    g = generator(seed)
    mixing = torch.randn(12, 12, generator=generator(99)) * torch.arange(1, 13).pow(-1.0) + 0.3
    return [torch.randn(batch, tokens, 12, generator=g) @ mixing for _ in range(count)]


def padding(batch: int = 4, tokens: int = 9) -> Tensor:
    """A mask in which the tokens at the ends of some rows do not count."""
    return (torch.arange(tokens)[None] < torch.tensor([tokens, 5, 3, tokens - 1])[:batch, None]).long()
