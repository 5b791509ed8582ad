"""What is told of the calls inside a network, how a call ends early, and that no hook stays behind."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small_networks import Stack, Tied, mlp, padding, sequences
from structmat import LowRank, StructuredConv2d, StructuredLinear, apply_plan_
from structmat.network.calls import moved
from structmat.network.capture import Stop, capturing, count_vectors, hooked, stopping
from structmat.network.sites import find_sites


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_functions_are_told_of_calls_in_order() -> None:
    model, told = mlp(), []

    def before(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        told.append(("before", name, type(module).__name__, tuple(args[0].shape)))

    def after(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        told.append(("after", name, len(kwargs), tuple(output.shape)))

    with hooked({"a": model[0], "b": model[2]}, before=before, after=after):
        model(torch.zeros(3, 24))
    assert told == [
        ("before", "a", "Linear", (3, 24)),
        ("after", "a", 0, (3, 32)),
        ("before", "b", "Linear", (3, 32)),
        ("after", "b", 0, (3, 32)),
    ]
    model(torch.zeros(3, 24))
    assert len(told) == 4


def test_no_hook_stays_behind_after_an_error() -> None:
    model = mlp()
    with pytest.raises(RuntimeError), hooked({"a": model[0]}, before=lambda *_: None, after=lambda *_: None):
        model(torch.zeros(3, 5))
    assert hooks_of(model) == 0


def test_stop_ends_a_call_and_nothing_more() -> None:
    model, reached = mlp(), []

    def stop(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        reached.append(name)
        raise Stop

    with stopping(), hooked({"a": model[0], "b": model[2]}, before=stop):
        model(torch.zeros(3, 24))
    assert reached == ["a"]
    assert hooks_of(model) == 0
    with pytest.raises(ValueError, match="another"), stopping():
        raise ValueError("another")


def test_inputs_are_captured_without_masked_tokens_and_as_copies() -> None:
    model, x, mask = Stack(depth=2), sequences(1)[0], padding().bool()
    sites = {name: site for name, site in find_sites(model).items() if name in ("embed", "blocks.1.up")}
    with capturing(sites, lambda name, vectors: mask) as captured:
        model(x, mask)
    assert torch.equal(captured["embed"][0], x[mask])
    assert captured["blocks.1.up"][0].shape == (int(mask.sum()), 24)
    before = captured["embed"][0].clone()
    x.zero_()
    assert torch.equal(captured["embed"][0], before)


def test_the_first_input_can_end_the_call() -> None:
    model, after = Stack(depth=2), []
    sites = {"embed": find_sites(model)["embed"]}
    with hooked({"head": model.head}, after=lambda *_: after.append(1)), capturing(sites, stop=True) as captured:
        model(sequences(1)[0])
    assert len(captured["embed"]) == 1
    assert after == []


def test_every_module_of_a_shared_weight_is_captured() -> None:
    model = Tied()
    with capturing({"first": find_sites(model)["first"]}) as captured:
        model(torch.randn(5, 24))
    assert [len(vectors) for vectors in captured["first"]] == [5, 5]


def test_vectors_are_counted_for_dense_and_structured_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Flatten(1), nn.Linear(8 * 4 * 4, 6))
    expected = {"0": Counter({(2 * 16, torch.float32): 1}), "2": Counter({(2, torch.float32): 1})}
    images = torch.randn(2, 3, 9, 9)
    assert count_vectors(model, {"0": model[0], "2": model[2]}, images) == expected
    apply_plan_(model, {"0": LowRank(8, 27, 3), "2": LowRank(6, 128, 3)})
    assert isinstance(model[0], StructuredConv2d)
    assert isinstance(model[2], StructuredLinear)
    assert count_vectors(model, {"0": model[0], "2": model[2]}, images) == expected


def test_calls_on_no_vector_are_left_out() -> None:
    model = mlp()
    assert count_vectors(model, {"0": model[0]}, torch.zeros(0, 24)) == {"0": Counter()}


def test_what_is_moved_twice_is_held_once() -> None:
    x, seen = torch.ones(2), {}
    first = moved({"a": x, "b": [x, "text"]}, torch.device("meta"), seen)
    again = moved((x,), torch.device("meta"), seen)
    assert first["a"] is first["b"][0] is again[0]


def test_what_does_not_move_stays_the_same_object() -> None:
    batch = {"a": torch.ones(2), "b": [torch.ones(3), "text", None]}
    assert moved(batch, torch.device("cpu")) is batch
