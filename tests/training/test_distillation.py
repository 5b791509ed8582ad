"""Distillation losses are their definitions, token by token."""

import pytest
import torch
from torch import Tensor

from structmat.training import distill_hidden, distill_logits
from structmat.training.distillation import next_token_mask, row_weights


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logits_are_the_divergence_of_the_valid_tokens(temperature: float) -> None:
    student, teacher = torch.randn(3, 5, 7, requires_grad=True), torch.randn(3, 5, 7, requires_grad=True)
    valid = torch.rand(3, 5) < 0.5
    p, q = ((x / temperature).softmax(-1) for x in (teacher, student))
    divergence = (p * (p / q).log()).sum(-1) * temperature**2
    found = distill_logits(student, teacher, valid, temperature=temperature)
    torch.testing.assert_close(found, divergence[valid].sum())
    found.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert not student.grad[~valid].any()


def test_nothing_valid_is_zero() -> None:
    student = torch.randn(2, 3, 4, requires_grad=True)
    loss = distill_logits(student, torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0


def states(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape) for shape in shapes]


def test_hidden_states_are_compared_per_token_and_block() -> None:
    student, teacher = states(*[(2, 3, 8)] * 4), states(*[(2, 3, 8)] * 4)
    weights = torch.rand(2, 3)
    expected = sum(
        weights[b, t] * (s[b, t] - h[b, t]).square().sum() / h[b, t].square().sum() / 3
        for s, h in zip(student[1:], teacher[1:], strict=True)
        for b in range(2)
        for t in range(3)
    )
    torch.testing.assert_close(distill_hidden(student, teacher, weights), expected)


def test_the_weight_of_a_row_is_shared_by_its_tokens() -> None:
    student, teacher = states(*[(2, 3, 8)] * 2), states(*[(2, 3, 8)] * 2)
    rows = torch.tensor([[1.0], [0.0]])
    expected = distill_hidden(student, teacher, torch.tensor([[1 / 3] * 3, [0] * 3]))
    torch.testing.assert_close(distill_hidden(student, teacher, rows), expected)


def test_feature_maps_count_as_one_token() -> None:
    student, teacher = states((2, 3, 4, 4), (2, 6, 2, 2)), states((2, 3, 4, 4), (2, 6, 2, 2))
    errors = (student[1] - teacher[1]).square().sum((1, 2, 3)) / teacher[1].square().sum((1, 2, 3))
    torch.testing.assert_close(distill_hidden(student, teacher, torch.ones(2, 1)), errors.sum())


def test_a_teacher_state_of_zero_gives_no_nan() -> None:
    zero = [torch.zeros(1, 2, 4)] * 2
    assert distill_hidden(zero, zero, torch.ones(1, 2)).item() == 0


def test_masks() -> None:
    labels = torch.tensor([[5, 6, -100, 7], [-100, -100, 8, -100]])
    assert next_token_mask(labels).tolist() == [[True, False, True, False], [False, True, False, False]]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    weights = row_weights(torch.tensor([0, -100, 1]), mask)
    assert weights.tolist() == [[0.5, 0.5, 0], [0, 0, 0], [0, 0, 0]]
    assert row_weights(torch.tensor([3, -100]), None).tolist() == [[1], [0]]


def test_what_cannot_be_compared() -> None:
    logits, valid = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"expected logits of one shape from both networks, got \(2, 3, 4\) from the"):
        distill_logits(logits, torch.randn(2, 3, 5), valid)
    with pytest.raises(ValueError, match=r"expected valid of shape \(2, 3\), got \(2, 2\)"):
        distill_logits(logits, logits, valid[:, :2])
    with pytest.raises(ValueError, match="expected a positive temperature, got 0"):
        distill_logits(logits, logits, valid, temperature=0)
    weights = torch.ones(2, 3)
    with pytest.raises(ValueError, match="got 3 from the student and 2 from the teacher"):
        distill_hidden([logits] * 3, [logits] * 2, weights)
    with pytest.raises(ValueError, match="got 1 from the student and 1 from the teacher"):
        distill_hidden([logits], [logits], weights)
    with pytest.raises(ValueError, match="expected hidden states of one shape from both networks"):
        distill_hidden([logits] * 2, [logits[..., :2]] * 2, weights)
    with pytest.raises(ValueError, match=r"expected weights of shape \(2, 3\), got \(2, 2\)"):
        distill_hidden([logits] * 2, [logits] * 2, weights[:, :2])
