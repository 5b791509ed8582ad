"""What is measured before and after a compression."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structmat.cli.results import budget_lines, result_lines
from structmat.cli.show import megabytes
from structmat.data.tokens import pad
from structmat.evaluate import accuracy
from structmat.evaluate.held_out import HeldOut, relative_error
from structmat.evaluate.language import row_loss
from structmat.plan import make_plan
from training import tiny

ROWS = [[1, 5, 12, 19], [1, 7], [1, 9, 16, 23, 30], [1]]


def test_rows_are_scored_from_their_second_token_on() -> None:
    model = tiny.llama().eval()
    expected = 0.0
    for row in ROWS:
        ids = torch.tensor([row])
        with torch.no_grad():
            logits = model(ids).logits
        expected += nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()
    batches = [pad(ROWS[:3], 0), pad(ROWS[3:], 0)]
    loss, tokens = row_loss(model, batches)
    assert (loss, tokens) == (pytest.approx(expected, rel=1e-5), 8)
    held_out = HeldOut(batches, causal=True)
    assert held_out.unit == "perplexity"
    assert held_out.measure(model) == pytest.approx(math.exp(expected / 8), rel=1e-5)


def test_classes_give_the_accuracy() -> None:
    model = tiny.vit()
    examples = tiny.images(8)
    batch: dict[str, Any] = {
        "pixel_values": torch.stack([one["pixel_values"] for one in examples]),
        "labels": torch.tensor([one["labels"] for one in examples]),
    }
    held_out = HeldOut([batch], causal=False)
    assert (held_out.unit, held_out.measure(model)) == ("accuracy", accuracy(model, [batch]).top1)


def test_anything_else_gives_the_error_of_the_outputs() -> None:
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * x

    held_out = HeldOut([{"x": torch.randn(4, 3)}, {"x": torch.randn(2, 3)}], causal=False)
    assert (held_out.unit, held_out.measure(Scaled(2.0))) == ("output error", 0.0)
    assert held_out.measure(Scaled(1.5)) == pytest.approx(0.25)
    assert relative_error([torch.ones(2)], [torch.zeros(2)]) == pytest.approx(2**0.5)


def test_the_error_that_was_minimised_comes_first() -> None:
    facts = {"error": 0.25, "output_error": 0.125, "parameters": 10, "dense_parameters": 20}
    measured = {"measured": "perplexity", "measured_before": 4.0, "measured_after": 5.0}
    assert result_lines({**facts, **measured}) == [
        "relative errors of the layers, root mean square: output error 0.1250, which was minimised; "
        "weight error 0.2500",
        "10 parameters in all, 0.500 of the dense model's",
        "perplexity on what is held out: 4 before, 5 after (+25.0%)",
    ]
    assert result_lines({**facts, "output_error": None})[0].endswith("weight error 0.2500, which was minimised")
    outputs = {"measured": "output error", "measured_before": 0.0, "measured_after": 0.1}
    assert result_lines({**facts, **outputs})[-1] == "output error of the whole model on what is held out: 0.1000"


def test_the_budget_in_parameters_and_bytes() -> None:
    model = tiny.llama()
    plan = make_plan(model, {r".*q_proj": "low_rank"}, keep=0.5)
    total = sum(parameter.numel() for parameter in model.parameters())
    lines = budget_lines(plan, model, torch.bfloat16)
    assert lines[0] == "2 layers of 2,048 parameters, to keep 1,024 (0.500)"
    assert lines[1].startswith(f"the whole model: {total:,} parameters before, {total - 1024:,} after")
    assert lines[1].endswith(f"{megabytes(2 * total)} before, {megabytes(2 * (total - 1024))} after in bfloat16")
    assert (megabytes(2e6), megabytes(3.5e9)) == ("2.0 MB", "3.50 GB")
