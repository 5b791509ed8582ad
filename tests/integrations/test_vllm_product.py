"""The operator with which layers of vLLM multiply; it needs no vLLM. ``tests/serving`` has the tests of the plugin."""

import pytest
import torch
from torch import Tensor

from structmat import Blast, Dense, LowRank
from structmat.formats import Format, Quantized
from structmat.integrations.vllm import product
from structmat.integrations.vllm.product import layout_of, merged_matmul, tuned

PARTS: list[Format] = [Blast(12, 16, (2, 2), 5), LowRank(8, 16, 3), Dense(4, 16)]


def made(formats: list[Format], dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    found = [format.init(dtype=dtype) for format in formats]
    names = [(one, name) for one, format in zip(found, formats, strict=True) for name in format.factor_specs()]
    return [one[name] for one, name in names], found


@pytest.mark.parametrize("shape", [(3, 16), (16,), (2, 3, 16), (0, 16)])
@pytest.mark.parametrize("height", [24, 30])
def test_the_parts_lie_side_by_side_and_zeros_follow(shape: tuple[int, ...], height: int) -> None:
    flat, factors = made(PARTS)
    x = torch.randn(shape)
    found = merged_matmul(x, flat, layout_of(PARTS), height)
    expected = [x @ format.to_dense(own).mT for format, own in zip(PARTS, factors, strict=True)]
    torch.testing.assert_close(found, torch.cat([*expected, x.new_zeros(*shape[:-1], height - 24)], -1))


def test_it_is_one_operator_of_a_compiled_graph_for_all_lengths() -> None:
    formats = [*PARTS, Quantized(12, 16, PARTS[0])]
    (flat, _), layout = made(formats), layout_of(formats)
    torch.library.opcheck(torch.ops.structmat.merged_matmul, (torch.randn(3, 16), flat, layout, 36))
    compiled = torch.compile(merged_matmul, fullgraph=True, dynamic=True, backend="eager")
    with torch.inference_mode():
        for tokens in (2, 3, 40):
            x = torch.randn(tokens, 16)
            torch.testing.assert_close(compiled(x, flat, layout, 36), merged_matmul(x, flat, layout, 36))


def test_the_way_hangs_on_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    format, used = PARTS[0], []
    flat, _ = made([format])
    found = {1: "vectors", 4: "whole"}
    monkeypatch.setattr(product, "tuned", lambda *asked: (asked, found))
    monkeypatch.setattr(Blast, "matmul", lambda self, x, factors, algorithm: used.append(algorithm) or x[:, :12])
    for tokens in (1, 3, 4, 5):
        merged_matmul(torch.randn(tokens, 16), flat, layout_of([format], [1, 4]), 12)
        merged_matmul(torch.randn(tokens, 16), flat, layout_of([format]), 12)
    assert used == ["vectors", "", "whole", "", "whole", "", "", ""]


def test_formats_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    measure = product.autotune_
    monkeypatch.setattr(product, "autotune_", lambda *a, **k: calls.append(k) or measure(*a, **k, rounds=1))
    arguments = Blast(12, 16, (2, 2), 7), (1, 4), torch.float32, torch.device("cpu")
    with torch.inference_mode():
        tuning, algorithms = tuned(*arguments)
    assert tuned(*arguments)[1] is algorithms
    assert calls == [{"tokens": (1, 4)}]
    chosen = {choice.tokens: choice.algorithm for choice in tuning.choices}
    assert algorithms == {tokens: name for tokens, name in chosen.items() if name != "automatic"}
