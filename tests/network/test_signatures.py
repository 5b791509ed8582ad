"""``network.signatures``: networks as functions of tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structmat.network.signatures import named_tensors, signature_of
from training import tiny


class Two(nn.Module):
    def forward(self, tokens: Tensor, features: Tensor, scale: Tensor | None = None) -> Any:
        return {"sum": tokens.sum(1) + features.sum((1, 2)), "parts": (features, [tokens])}


def batch() -> tuple[Tensor, Tensor]:
    return torch.randint(9, (2, 3)), torch.randn(2, 3, 4)


def test_arguments_and_keywords() -> None:
    tokens, features = batch()
    for inputs in ((tokens, features), {"features": features, "tokens": tokens}):
        found = signature_of(Two(), inputs)
        assert set(found.inputs) == {"tokens", "features"}
        assert found.axes == {name: {0: "batch", 1: "sequence"} for name in found.inputs}
        assert found.outputs == ("sum", "parts.0", "parts.1.0")
        drawn = found.draw({"batch": 5, "sequence": 1}, torch.Generator().manual_seed(0))
        assert {tuple(value.shape) for value in drawn} == {(5, 1), (5, 1, 4)}
        drawn_tokens = drawn[found.inputs.index("tokens")]
        assert set(drawn_tokens.flatten().tolist()) <= set(tokens.flatten().tolist())
        assert len(found.module(*drawn)) == 3


def test_a_tensor_and_named_axes() -> None:
    found = signature_of(nn.Linear(3, 2), torch.zeros(1, 3), {"input": {}})
    assert (found.inputs, found.outputs, dict(found.sizes)) == (("input",), ("output",), {})
    masks = signature_of(nn.Identity(), torch.tensor([[0.0, -torch.inf]])).draw({"batch": 2}, torch.Generator())
    assert set(masks[0].flatten().tolist()) <= {0.0, -torch.inf}


@pytest.mark.parametrize(
    ("model", "inputs", "axes", "error", "words"),
    [
        (nn.Linear(3, 2), None, None, ValueError, "expected inputs=batch for a Linear"),
        (nn.Linear(3, 2), None, {"input": {}}, ValueError, "expected inputs to which the axes belong"),
        (nn.Linear(3, 2), {"input": 3}, None, TypeError, "expected inputs that are tensors, got a int for 'input'"),
        (nn.Linear(3, 2), (), None, TypeError, "expected inputs that are tensors, got none"),
        (nn.Linear(3, 2), torch.zeros(2, 3), {"x": {}}, ValueError, "expected axes of the inputs input, got "),
        (nn.Linear(3, 2), torch.zeros(2, 3), {"input": {2: "a"}}, ValueError, "expected axes from 0 to 1 of 'input'"),
        (Two(), (torch.ones(2, 3), torch.ones(4, 3, 1)), None, ValueError, "expected axes named 'batch' of one length"),
    ],
)  # fmt: skip
def test_what_is_refused(model: nn.Module, inputs: Any, axes: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        signature_of(model, inputs, axes)


def test_a_network_without_tensors() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return None

    with pytest.raises(ValueError, match="expected a network that returns tensors, got a Nothing"):
        signature_of(Nothing(), torch.zeros(2))
    assert named_tensors(3) == {}


def test_models_of_transformers_tell_their_inputs() -> None:
    llama = signature_of(tiny.llama().eval())
    assert llama.inputs[:4] == ("input_ids", "attention_mask", "position_ids", "past_key_values.0.key")
    assert llama.outputs == ("logits", "present.0.key", "present.0.value", "present.1.key", "present.1.value")
    sizes = {"batch": 2, "sequence_length": 1, "past_sequence_length": 4, "past_sequence_length + sequence_length": 5}
    tokens, mask, positions, *past = llama.draw(sizes, torch.Generator().manual_seed(0))
    assert (tokens.shape, positions.tolist(), mask.tolist()) == ((2, 1), [[4], [4]], [[0, 0, 1, 1, 1], [1] * 5])
    assert {tuple(one.shape) for one in past} == {(2, 2, 4, 16)}
    assert len(llama.module(tokens, mask, positions, *past)) == 5
    bert = signature_of(tiny.bert().eval())
    assert (bert.inputs, bert.outputs) == (("input_ids", "attention_mask", "token_type_ids"), ("logits",))
    vit = signature_of(tiny.vit().eval())
    assert vit.draw({"batch": 3}, torch.Generator())[0].shape == (3, 3, 16, 16)
    encoder = tiny.transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="expected inputs=batch for a T5"):
        signature_of(tiny.transformers.T5ForConditionalGeneration(encoder))
