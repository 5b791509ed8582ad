"""Losses that make a network answer like its dense teacher, as sums over valid tokens.

They are sums and not means, so that the caller divides by the number of valid tokens of the whole step: the result is
then the same however a batch is split into micro-batches and over processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The label of tokens that do not count."""


def distill_logits(student: Tensor, teacher: Tensor, valid: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence from the teacher's distribution to the student's (Hinton et al. 2015, section 2).

    Args:
        student: Logits ``(..., classes)``.
        teacher: Logits of the same shape; no gradient flows into them.
        valid: ``(...)``, true where the divergence counts.
        temperature: Divides both logits; the sum is multiplied by its square, so that the gradients keep their size.

    Returns:
        The sum over the valid places, in float32.

    Raises:
        ValueError: If the shapes differ, or the temperature is not positive.
    """
    _check_same(student, teacher, "logits")
    if valid.shape != student.shape[:-1]:
        raise ValueError(f"expected valid of shape {tuple(student.shape[:-1])}, got {tuple(valid.shape)}")
    if not temperature > 0:
        raise ValueError(f"expected a positive temperature, got {temperature}")
    expected = F.log_softmax(teacher.detach()[valid].float() / temperature, -1)
    found = F.log_softmax(student[valid].float() / temperature, -1)
    return F.kl_div(found, expected, reduction="sum", log_target=True) * temperature**2


def distill_hidden(student: Sequence[Tensor], teacher: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Relative squared error of the hidden states behind every block, per token.

    For each block and token it is ``|student - teacher|^2 / |teacher|^2``; relative per token, because a few tokens
    (the first one of a text above all) have hidden states that are hundreds of times larger than the others.

    Args:
        student: Hidden states as ``output_hidden_states`` returns them, the embeddings first (they are left out), each
            ``(B, T, width)``, or ``(B, channels, height, width)``, which counts as one token.
        teacher: The hidden states of the teacher, of the same number and shapes; no gradient flows into them.
        weights: ``(B, T)``, how much each token counts; ``(B, 1)`` for what all tokens of a row count together.

    Returns:
        The weighted sum over the tokens, averaged over the blocks, in float32.

    Raises:
        ValueError: If number or shapes differ, or there is no block.
    """
    if len(student) != len(teacher) or len(student) < 2:
        raise ValueError(
            "expected the hidden states of the embeddings and the same blocks from both networks, "
            f"got {len(student)} from the student and {len(teacher)} from the teacher"
        )
    total = student[0].new_zeros((), dtype=torch.float32)
    for ours, theirs in zip(student[1:], teacher[1:], strict=True):
        _check_same(ours, theirs, "hidden states")
        if ours.ndim != 3:
            ours, theirs = ours.flatten(1)[:, None], theirs.flatten(1)[:, None]  # (B, 1, everything)
        ours, theirs = ours.float(), theirs.detach().float()
        size = theirs.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        errors = (ours - theirs).square().sum(-1) / size  # (B, T)
        if weights.shape[0] != errors.shape[0] or weights.shape[1] not in (1, errors.shape[1]):
            raise ValueError(f"expected weights of shape {tuple(errors.shape)}, got {tuple(weights.shape)}")
        if weights.shape[1] == 1:
            errors = errors.mean(1, keepdim=True)
        total = total + (errors * weights).sum()
    return total / (len(student) - 1)


def next_token_mask(labels: Tensor) -> Tensor:
    """Where a causal language model's answers count, ``(B, T)``: the places whose next token has a label."""
    valid = torch.zeros_like(labels, dtype=torch.bool)
    valid[:, :-1] = labels[:, 1:] != IGNORED
    return valid


def row_weights(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """How much each token counts where an example has a label, ``(B, T)``; ``(B, 1)`` where there is no mask."""
    counts = (labels != IGNORED).float()[:, None]
    if attention_mask is None:
        return counts
    mask = attention_mask.float()
    return counts * mask / mask.sum(1, keepdim=True).clamp_min(1)


def _check_same(student: Tensor, teacher: Tensor, what: str) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"expected {what} of one shape from both networks, got {tuple(student.shape)} from the student and "
            f"{tuple(teacher.shape)} from the teacher; take a teacher of the same architecture and vocabulary"
        )
