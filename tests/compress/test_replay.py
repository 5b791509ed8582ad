"""What parts of a block return is computed once, and only where that is all that they do."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small_networks import Stack, sequences
from structmat import LowRank, compress_, make_plan
from structmat.compress import replay as replay_module
from structmat.compress.replay import Replay


class Part(nn.Module):
    """Two layers, of which calls are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.calls += 1
        return self.b(torch.tanh(self.a(x))), None


class Body(nn.Module):
    """A part, and a layer after it."""

    def __init__(self, part: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part, self.last = part or Part(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.part(x)[0].mul_(2))  # changes what the part returned, in place


PLANNED = ("part.a", "part.b", "last")


def run(replay: Replay, body: nn.Module, x: Tensor, i: int = 0) -> Tensor:
    with torch.no_grad(), replay.of(body, i):
        return body(x)


def test_a_complete_part_is_called_once_for_each_batch() -> None:
    body, replay = Body(), Replay(PLANNED)
    xs = [torch.randn(3, 8) for _ in range(2)]
    expected = [body(x) for x in xs]
    replay.complete(["part.a"])
    assert torch.equal(run(replay, body, xs[0]), expected[0])
    replay.complete(["part.b"])
    before = body.part.calls
    for _ in range(3):
        for i, x in enumerate(xs):
            assert torch.equal(run(replay, body, x, i), expected[i])
    assert body.part.calls == before + 2
    assert replay.knows(0)
    assert not replay.knows(2)
    assert replay.nbytes == 2 * 3 * 8 * 4
    assert "forward" not in body.part.__dict__


def test_layers_alone_are_replayed_until_the_part_around_them_is_complete() -> None:
    body, replay = Body(), Replay(PLANNED)
    x, calls = torch.randn(3, 8), Counter[str]()
    for name in PLANNED:
        body.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    inner = [nn.Linear.forward, Counter[int]()]

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        inner[1][id(self)] += 1
        return inner[0](self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", counted)
        replay.complete(["part.a"])
        run(replay, body, x)
        run(replay, body, x)
        assert inner[1][id(body.part.a)] == 1
        assert inner[1][id(body.part.b)] == 2
        replay.complete(["part.b"])
        run(replay, body, x)
        run(replay, body, x)
    assert inner[1][id(body.part.a)] == 1
    assert inner[1][id(body.part.b)] == 3
    assert inner[1][id(body.last)] == 4


def test_nothing_is_kept_after_the_last_fit_or_when_fits_change() -> None:
    body, replay, x = Body(), Replay(PLANNED), torch.randn(3, 8)
    replay.complete(["part.a", "part.b"])
    run(replay, body, x)
    with torch.no_grad():
        body.part.a.weight.add_(1)
    stale = run(replay, body, x)
    replay.clear()
    assert not torch.equal(run(replay, body, x), stale)
    replay.clear()
    replay.keeping = False
    run(replay, body, x)
    assert not replay.knows(0)
    assert replay.nbytes == 0


def test_while_it_is_paused_everything_is_computed() -> None:
    body, replay, x = Body(), Replay(PLANNED), torch.randn(3, 8)
    replay.complete(["part.a", "part.b"])
    run(replay, body, x)
    calls = body.part.calls
    with replay.paused():
        run(replay, body, x)
    assert body.part.calls == calls + 1
    run(replay, body, x)
    assert body.part.calls == calls + 1


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    body, replay, x = Body(), Replay(PLANNED), torch.randn(3, 8)
    replay.complete(["part.a", "part.b"])
    monkeypatch.setattr(replay_module, "REPLAYED_BYTES", 3 * 8 * 4)
    run(replay, body, x, 0)
    run(replay, body, x, 1)
    assert (replay.knows(0), replay.knows(1)) == (True, False)


class Noisy(Part):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x)[0] + torch.randn(8), None


class Writing(Part):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x.add_(1)
        return super().forward(x)


class Peculiar(Part):
    def forward(self, x: Tensor) -> Any:
        return (super().forward(x)[0], object())


@pytest.mark.parametrize("kind", [Noisy, Writing, Peculiar])
def test_a_part_that_does_more_than_to_return_tensors_is_called_each_time(kind: type[Part]) -> None:
    body, replay = Body(kind()), Replay(PLANNED)
    replay.complete(["part.a", "part.b"])
    for _ in range(2):
        x = torch.ones(3, 8)
        torch.manual_seed(1)
        expected = body(x.clone())
        torch.manual_seed(1)
        assert torch.equal(run(replay, body, x), expected)
    assert body.part.calls == 4


class Keeping(Part):
    """A part that writes into a dictionary which it is given."""

    def forward(self, x: Tensor, kept: dict[str, Tensor]) -> tuple[Tensor, None]:
        kept["sum"] = x.sum()
        return super().forward(x)


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part, self.last = Keeping(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        kept: dict[str, Tensor] = {}
        return self.last(self.part(x, kept)[0]) + kept["sum"]


def test_what_a_part_writes_for_others_is_written() -> None:
    body, replay, x = Reading(), Replay(PLANNED), torch.randn(3, 8)
    replay.complete(["part.a", "part.b"])
    for _ in range(2):
        assert torch.equal(run(replay, body, x), body(x))


class Twice(nn.Module):
    """A part that is called twice, the second time after a layer that is fitted later."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.last = Part(), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.last(self.part(x)[0]))[0]


def test_a_part_that_is_called_twice_is_called_each_time() -> None:
    body, replay, x = Twice(), Replay(PLANNED), torch.randn(3, 8)
    replay.complete(["part.a", "part.b"])
    for _ in range(2):
        assert torch.equal(run(replay, body, x), body(x))


class Silent(Part):
    """A part that leaves something behind for others, which nobody can see."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.left = x.sum()
        return super().forward(x)


class Secretive(nn.Module):
    """A network whose last layer reads what a part left behind, and takes it away."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part, self.last, self.end = Silent(), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.part(x)[0])
        left = self.part.left
        del self.part.left
        return self.end(y + left)


def test_a_network_that_does_not_bear_it_is_fitted_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def fitted() -> dict[str, Tensor]:
        model = Secretive()
        data = [torch.randn(32, 8, generator=torch.Generator().manual_seed(k)) for k in range(3)]
        compress_(model, make_plan(model, LowRank, keep=0.6), batches=data, progress=False)
        return model.state_dict()

    one = fitted()
    monkeypatch.setattr(Replay, "_parts", lambda self, block: {})
    two = fitted()
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())


def test_fits_are_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = Stack(depth=2)

    def fitted() -> dict[str, Tensor]:
        model = copy.deepcopy(dense)
        compress_(model, make_plan(model, LowRank, keep=0.6), batches=sequences(4), progress=False)
        return model.state_dict()

    kept = Counter[str]()
    monkeypatch.setattr(
        Replay, "_kept", lambda self, name, *rest, old=Replay._kept: (kept.update([name]), old(self, name, *rest))[1]
    )
    one = fitted()
    assert kept
    monkeypatch.setattr(Replay, "_parts", lambda self, block: {})
    two = fitted()
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())
